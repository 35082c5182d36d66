"""Context of a training (device, seed, folders, stop checks) and its warm start from an earlier run."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from emotion.audio.clips import Normalisation
from emotion.audio.partition import Partition
from emotion.config import CheckpointConfig, InitConfig, Part
from emotion.data.leaks import SEEN, TRAINED, read_seen, refuse_leak
from emotion.files import read_json
from emotion.training.device import Device
from emotion.training.graphed_step import GraphBackend


def never(_step: int) -> bool:
    return False


@dataclass(frozen=True)
class TrainingContext:
    """out: folder of results and checkpoints. should_stop: asked at every step; True means save and raise Interrupted. graphs: of
    the steps of GAN and ViT, on a GPU; None: without. is_used_up: asked before each step but the first of a training, with the
    steps of its phase that are done; True means end the training here, as its budget is used up, and use what there is."""

    seed: int
    device: Device
    checkpoints: CheckpointConfig
    out: Path
    should_stop: Callable[[], bool]
    graphs: GraphBackend | None = None
    is_used_up: Callable[[int], bool] = never


@dataclass(frozen=True)
class WarmStart:
    """State taken from an earlier run. Default: none, so new weights and a normalisation from the training songs.

    weights: a folder as `train_gan` or `train_vit` writes it. trained_on: identities of the songs that weights or
    normalisation were made from. seen: these, and the songs that chose the weights.
    """

    weights: Path | None = None
    normalisation: Normalisation | None = None
    trained_on: frozenset[str] = frozenset()
    seen: frozenset[str] = frozenset()


COLD_START = WarmStart()


def read_warm_start(part: Part, config: InitConfig | None) -> WarmStart:
    """The warm start of GAN or ViT. `config.run` is a local folder.

    A part with new weights may still keep the normalisation of the run; then it has seen the songs behind that.
    """
    if config is None:
        return COLD_START
    takes_weights = config.gan if part == "gan" else config.vit
    keeps_normalisation = config.normalisation == "kept"
    if not takes_weights and not keeps_normalisation:
        return COLD_START
    other: Part = "vit" if part == "gan" else "gan"
    source = part if takes_weights else other
    if source == "gan":
        folder, constants, trained = Path(config.run) / "gan", "config.json", SEEN
    else:
        folder, constants, trained = Path(config.run) / "model", "preprocessing.json", TRAINED
    normalisation = None
    if keeps_normalisation:
        normalisation = Normalisation.from_json(read_json(folder / constants)["normalisation"])
    trained_on = frozenset(read_seen(folder, trained))
    return WarmStart(
        weights=folder if takes_weights else None,
        normalisation=normalisation,
        trained_on=trained_on,
        seen=frozenset(read_seen(folder)) if takes_weights else trained_on,
    )


def refuse_known_songs(warm_start: WarmStart, partition: Partition, run: str) -> None:
    """Raise ModelError where the earlier run, of this name, has seen a test song or was trained on a validation song.

    Songs that validated it may validate again, so a warm start with the same split is always possible.
    """
    name = f"the run {run}, which init_from names,"
    to_do = "Keep the split of that run, or put songs that it has not seen into {}.txt and name that folder in split.lists."
    refuse_leak(name, warm_start.seen, partition.test.songs, f"They are test songs here. {to_do.format('test')}")
    refuse_leak(
        name, warm_start.trained_on, partition.validation.songs, f"They are validation songs here. {to_do.format('validation')}"
    )
