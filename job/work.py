"""What a phase is given, and each phase's call into the science, which is imported only then: torch takes seconds."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from job.spec import JobSpec
from job.stage import stage

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
