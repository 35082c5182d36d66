"""What a training starts from where it goes on from a published run: weights, constants, and the songs behind them."""

from dataclasses import dataclass
from pathlib import Path

from emotion.audio.clips import Normalisation
from emotion.audio.feature_store import Features
from emotion.config import InitConfig, Part
from emotion.data.leaks import SEEN, TRAINED, read_seen, refuse_leak
from emotion.files import read_json


@dataclass(frozen=True)
class Initial:
    """By default nothing: new weights, and constants of the songs at hand.

    weights: a folder as `train_gan` or `train_vit` writes it. trained_on, seen: identities of the songs that weights or
    constants were made from, and of these with those that chose them.
    """

    weights: Path | None = None
    normalisation: Normalisation | None = None
    trained_on: frozenset[str] = frozenset()
    seen: frozenset[str] = frozenset()


NOTHING = Initial()


def initial_of(part: Part, config: InitConfig | None) -> Initial:
    """What GAN or ViT start from, `config.run` being a local folder.

    One that does not start from the run may still use its constants, and so knows its songs.
    """
    if config is None:
        return NOTHING
    starts = config.gan if part == "gan" else config.vit
    kept = config.normalisation == "kept"
    if not starts and not kept:
        return NOTHING
    other: Part = "vit" if part == "gan" else "gan"
    source = part if starts else other
    if source == "gan":
        folder, constants, trained = Path(config.run) / "gan", "config.json", SEEN
    else:
        folder, constants, trained = Path(config.run) / "model", "preprocessing.json", TRAINED
    trained_on = frozenset(read_seen(folder, trained))
    return Initial(
        weights=folder if starts else None,
        normalisation=Normalisation.from_json(read_json(folder / constants)["normalisation"]) if kept else None,
        trained_on=trained_on,
        seen=frozenset(read_seen(folder)) if starts else trained_on,
    )


def refuse_known(initial: Initial, name: str, validation: Features, test: Features) -> None:
    """Raise ModelError where the run `name` has seen a song that tests here, or was trained on one that validates.

    Songs that validated there may validate again, so with the same split a training can always go on.
    """
    what = f"the run {name}, which init_from names,"
    to_do = "Keep the split of that run, or put songs that it does not know into {}.txt and name that folder in split.lists."
    refuse_leak(what, initial.seen, test.songs, f"They test here. {to_do.format('test')}")
    refuse_leak(what, initial.trained_on, validation.songs, f"They validate here. {to_do.format('validation')}")
