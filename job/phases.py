"""The whole job on one page: what runs, in which order, from what.

    spec → stage → features → gan → synth → quality → vit → evaluate → publish

Each phase is a plain function of its inputs' folders, the spec and an output folder. Its key is made of its name, its
version (raise it when its outputs change for the same inputs), the spec sections it uses, its facts and the digests of the
phases it needs: nothing else may influence its outputs. The science is imported when it is needed, as torch takes seconds.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from emotion.errors import StorageError
from emotion.files import sha256_of
from emotion.splits import Split
from job.spec import JobSpec
from job.stage import source_facts, stage

if TYPE_CHECKING:
    from emotion.device import Device
    from emotion.features import Features


@dataclass
class Work:
    """What a phase is given: the spec, the folders of the phases it needs, its own folder, the run's, and whether to stop."""

    spec: JobSpec
    inputs: dict[str, Path]
    out: Path
    run_folder: Path
    should_stop: Callable[[], bool]

    @cached_property
    def device(self) -> "Device":
        from emotion.device import resolve_device

        return resolve_device(self.spec.device, self.spec.precision)

    @cached_property
    def features(self) -> "Features":
        from emotion.features import Features

        return Features(self.inputs["features"])

    @cached_property
    def synthetic(self) -> "Features":
        from emotion.features import Features

        return Features(self.inputs["synth"])

    def songs(self, split: str) -> list[int]:
        """Positions in the songs table of "train", "validation" or "test"."""
        from emotion.splits import assign_splits

        songs = self.features.songs
        found = assign_splits([song.song_id for song in songs], [song.group for song in songs], self.spec.split)
        return [index for index, name in enumerate(found) if name == split]


@dataclass(frozen=True)
class Phase:
    name: str
    version: int
    run: Callable[[Work], None]
    needs: tuple[str, ...] = ()
    sections: tuple[str, ...] = ()
    facts: Callable[[JobSpec], dict[str, Any]] = field(default=lambda _spec: {})
    check: Callable[[JobSpec], None] = field(default=lambda _spec: None)
    """Asked before the first phase runs, so that a mistake shows now and not after the phases before this one."""
    still_stands: Callable[[JobSpec, Path], bool] = field(default=lambda _spec, _run_folder: True)
    """Whether what a finished phase left outside its own folder is still there."""
    place: Literal["work", "scratch"] = "work"


def run_stage(work: Work) -> None:
    stage(work.spec.data.source, work.out, work.should_stop)


def run_features(work: Work) -> None:
    from emotion.deam import read_songs
    from emotion.features import extract_features
    from job.environment import available_threads

    staged = work.inputs["stage"]
    threads = work.spec.device.threads or available_threads()
    extract_features(read_songs(staged / "songs.csv"), staged, work.spec.mel, work.out, threads, work.should_stop)


def run_gan(work: Work) -> None:
    from emotion.gan.train import train_gan

    spec = work.spec
    train_gan(
        work.features,
        work.songs("train"),
        spec.gan,
        spec.checkpoint,
        spec.seed,
        work.device,
        work.out,
        work.should_stop,
    )


def run_synth(work: Work) -> None:
    from emotion.synth import synthesize

    spec = work.spec
    synthesize(
        work.features,
        work.songs("train"),
        work.inputs["gan"],
        spec.synth,
        spec.seed,
        work.device,
        work.out,
        work.should_stop,
    )


def run_quality(work: Work) -> None:
    from emotion.quality import measure_quality

    measure_quality(
        work.features,
        work.songs("train"),
        work.songs("validation"),
        work.synthetic,
        work.spec.quality,
        work.spec.seed,
        work.out,
        work.should_stop,
    )


def run_vit(work: Work) -> None:
    from emotion.vit.train import train_vit

    spec = work.spec
    train_vit(
        work.features,
        work.songs("train"),
        work.songs("validation"),
        work.synthetic,
        spec.vit,
        spec.checkpoint,
        spec.seed,
        work.device,
        work.out,
        work.should_stop,
    )


def check_vit(spec: JobSpec) -> None:
    from emotion.vit.network import check_model

    check_model(spec.vit, spec.mel)


def split_facts(spec: JobSpec) -> dict[str, Any]:
    """Lists of song ids are known by their content."""
    folder = spec.split.lists
    return {"lists": {name: digest_of_file(Path(folder) / f"{name}.txt") for name in get_args(Split)}} if folder else {}


def vit_facts(spec: JobSpec) -> dict[str, Any]:
    """Weights from a file are known by their content, too."""
    weights = spec.vit.weights_path
    return split_facts(spec) | ({"weights": digest_of_file(weights)} if weights else {})


def digest_of_file(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise StorageError(
            f"{path}: {error.strerror}, but the spec names it. Correct the spec or put the file there."
        ) from error


def run_evaluate(work: Work) -> None:
    from emotion.evaluate import evaluate

    spec = work.spec
    evaluate(
        work.features,
        work.songs("train"),
        work.songs("validation"),
        work.songs("test"),
        spec.split.fold,
        work.inputs["vit"] / "model",
        spec.evaluate,
        spec.seed,
        work.device,
        work.out,
        work.should_stop,
    )


def run_publish(work: Work) -> None:
    from job.publish import publish

    publish(
        work.spec,
        work.inputs,
        work.run_folder,
        published_folder(work.spec, work.run_folder),
        work.device,
        work.out,
        work.should_stop,
    )


def published_folder(spec: JobSpec, run_folder: Path) -> Path:
    """Where the run is published: DESTINATION/NAME-KEY12, by default beside the run folder in `published/`."""
    destination = spec.artifacts.destination
    return (Path(destination) if destination else run_folder.parent / "published") / run_folder.name


PHASES = (
    Phase("stage", 1, run_stage, facts=lambda spec: source_facts(spec.data.source), place="scratch"),
    Phase("features", 1, run_features, needs=("stage",), sections=("mel",), place="scratch"),
    Phase("gan", 1, run_gan, needs=("features",), sections=("seed", "precision", "split", "gan"), facts=split_facts),
    Phase(
        "synth",
        1,
        run_synth,
        needs=("features", "gan"),
        sections=("seed", "precision", "split", "synth"),
        facts=split_facts,
    ),
    Phase(
        "quality", 1, run_quality, needs=("features", "synth"), sections=("seed", "split", "quality"), facts=split_facts
    ),
    Phase(
        "vit",
        1,
        run_vit,
        needs=("features", "synth"),
        sections=("seed", "precision", "split", "vit"),
        facts=vit_facts,
        check=check_vit,
    ),
    Phase(
        "evaluate",
        1,
        run_evaluate,
        needs=("features", "vit"),
        sections=("seed", "precision", "split", "evaluate"),
        facts=split_facts,
    ),
    Phase(
        "publish",
        1,
        run_publish,
        needs=("features", "gan", "synth", "quality", "vit", "evaluate"),
        facts=lambda spec: {"spec": spec.what(), "destination": spec.artifacts.destination},
        still_stands=lambda spec, run_folder: (published_folder(spec, run_folder) / "manifest.json").is_file(),
    ),
)
