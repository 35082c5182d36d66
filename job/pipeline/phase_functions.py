"""What a phase is given, and each phase's call into the science, which is imported only then: torch takes seconds."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emotion.config import Part, Precision, VitConfig
from emotion.errors import DataError, Interrupted
from job.pipeline.warm_start import check_initial
from job.results.provenance import device_conditions, note_conditions
from job.run_folder.receipts import notes_of
from job.spec.location import S3
from job.spec.model import JobSpec
from job.storage.open import place_of
from job.storage.stage import stage

if TYPE_CHECKING:
    from emotion.audio.feature_store import Features
    from emotion.data.splits import Split
    from emotion.training.device import Device
    from emotion.training.warm_start import Initial


FEWEST: dict["Split", int] = {"train": 3, "validation": 2}
"""A density of labels needs three points, and a concordance two."""


@dataclass
class Work:
    """What a phase is given: the spec, the folders of the phases it needs, its own folder, the run's, and whether to stop."""

    spec: JobSpec
    inputs: dict[str, Path]
    out: Path
    run_folder: Path
    should_stop: Callable[[], bool]
    notes: dict[str, Any] = field(default_factory=dict)
    """What a phase wants to have in its receipt, and with it in the manifest, beside its outputs."""
    digests: dict[str, str] = field(default_factory=dict)
    """SHA-256 of outputs that were read or written as a whole, so that the receipt need not read them again."""
    memory: dict[str, Any] | None = None
    """The account of a phase that predicts and measures its memory by component."""

    @cached_property
    def device(self) -> "Device":
        return self.device_in(self.spec.precision)

    def device_in(self, precision: Precision) -> "Device":
        """The device, resolved, and noted as a condition under which this phase was made."""
        from emotion.training.device import resolve_device

        device = resolve_device(self.spec.device, precision)
        note_conditions(self.out, device_conditions(device.describe()))
        return device

    @property
    def used_device(self) -> dict[str, Any] | None:
        """Where the phase computed, for its receipt; None if it needed no device."""
        return self.device.describe() if "device" in self.__dict__ else None

    @cached_property
    def features(self) -> "Features":
        from emotion.audio.feature_store import Features

        return Features(self.inputs["features"])

    @cached_property
    def synthetic(self) -> "Features":
        from emotion.audio.feature_store import Features

        return Features(self.inputs["synth"])

    @cached_property
    def splits(self) -> "list[Split]":
        """The split of each song of the table. Raises DataError where one is too small to work with."""
        from emotion.data.splits import assign_splits

        songs = self.features.songs
        left_out = {fault["song_id"] for fault in notes_of(self.inputs["features"])["left_out"]}
        ids, groups = [song.song_id for song in songs], [song.group for song in songs]
        found = assign_splits(ids, groups, self.spec.split, left_out)
        for name, fewest in FEWEST.items():
            if found.count(name) < fewest:
                raise DataError(
                    f"split: {name} has {found.count(name)} of {len(songs)} songs and needs {fewest}. Use more songs or "
                    f"groups, fewer folds or other fractions."
                )
        return found

    def songs(self, *splits: "Split") -> "Features":
        """The songs of these splits, one after another, and no others."""
        chosen = [index for split in splits for index, name in enumerate(self.splits) if name == split]
        return self.features.only(chosen)

    def initial(self, part: Part) -> "Initial":
        """What GAN or ViT start from. Raises ModelError where either knows a song that it must not, before both are trained."""
        from emotion.training.warm_start import initial_of, refuse_known

        init = self.spec.init_from
        found: dict[Part, Initial] = {"gan": initial_of("gan", init), "vit": initial_of("vit", init)}
        for initial in found.values():
            refuse_known(initial, Path(init.run).name if init else "", self.songs("validation"), self.songs("test"))
        return found[part]

    def units(self, *splits: "Split") -> list[str]:
        """Per song of these splits, what splits and cross-validation never divide."""
        from emotion.data.splits import units_of

        songs = self.songs(*splits).songs
        return units_of([song.song_id for song in songs], [song.group for song in songs], self.spec.split)


def run_stage(work: Work) -> None:
    manifests = work.run_folder.parent / "datasets"
    found = stage(work.spec.data, work.spec.storage, manifests, work.out, work.should_stop)
    work.digests, notes = found
    work.notes |= notes


def run_features(work: Work) -> None:
    from emotion.audio.extract import extract_features
    from emotion.data.deam import Dataset, read_songs
    from emotion.data.faults import read_faults
    from job.environment import available_threads

    staged = work.inputs["stage"]
    threads = work.spec.device.threads or available_threads()
    spec = work.spec
    dataset = Dataset(read_songs(staged / "songs.csv"), read_faults(staged / "faults.csv"))
    table = work.run_folder / "faults.csv"
    faults = extract_features(dataset, staged, spec.data, spec.mel, work.out, table, threads, work.should_stop)
    work.notes["left_out"] = [asdict(fault) for fault in faults]


def check_gan(spec: JobSpec, _should_stop: Callable[[], bool]) -> None:
    from emotion.training.device import resolve_device

    check_initial(spec)
    resolve_device(spec.device, spec.precision)


def run_gan(work: Work) -> None:
    from emotion.gan.train import train_gan

    spec = work.spec
    work.memory = train_gan(
        work.songs("train"),
        work.songs("validation", "test").songs,
        spec.gan,
        spec.checkpoint,
        spec.seed,
        work.device,
        work.out,
        work.should_stop,
        work.initial("gan"),
    )
    note_micro_batches(work)


def run_synth(work: Work) -> None:
    from emotion.gan.synth import synthesize

    spec = work.spec
    synthesize(
        work.songs("train"),
        work.songs("validation", "test").songs,
        work.inputs["gan"],
        spec.synth,
        spec.seed,
        work.device,
        work.out,
        work.should_stop,
    )


def run_quality(work: Work) -> None:
    from emotion.gan.quality import measure_quality, write_pictures

    write_pictures(work.songs("train"), work.synthetic, work.out)
    measure_quality(
        work.songs("train"),
        work.songs("validation"),
        work.units("train"),
        work.synthetic,
        work.spec.quality,
        work.spec.seed,
        work.out,
        work.should_stop,
    )


def run_vit(work: Work) -> None:
    from emotion.vit.train import train_vit
    from emotion.vit.weights import hub_weights_sha256

    spec = work.spec
    weights = hub_weights_sha256(started_vit(spec))
    if weights:
        work.notes["weights_sha256"] = weights
    work.memory = train_vit(
        work.songs("train"),
        work.songs("validation"),
        work.songs("test").songs,
        work.synthetic,
        spec.vit,
        spec.checkpoint,
        spec.seed,
        work.device,
        work.out,
        work.should_stop,
        work.initial("vit"),
    )
    note_micro_batches(work)


def note_micro_batches(work: Work) -> None:
    """Those that the training has used are among the conditions under which it was made."""
    assert work.memory is not None
    for micro in work.memory["micro_batches"]:
        note_conditions(work.out, {"micro_batch": micro})


def check_vit(spec: JobSpec, _should_stop: Callable[[], bool]) -> None:
    from emotion.training.device import resolve_device
    from emotion.vit.network import check_model

    check_initial(spec)
    resolve_device(spec.device, spec.precision)
    check_model(started_vit(spec), spec.mel)


def started_vit(spec: JobSpec) -> VitConfig:
    """The section of the ViT, its weights those of the run that it starts from."""
    init = spec.init_from
    return spec.vit.model_copy(update={"weights": f"{init.folder}/model"}) if init and init.vit else spec.vit


def predicted_memory(spec: JobSpec) -> dict[str, dict[str, int]]:
    """Training phase → its micro-batch, and component → bytes at the peak of a step."""
    from emotion.gan import train as gan
    from emotion.training.device import resolve_device
    from emotion.training.memory_account import Account
    from emotion.training.memory_backoff import chosen_micro_batch
    from emotion.vit import train as vit

    device = resolve_device(spec.device, spec.precision)

    def of_gan(micro: int) -> Account:
        return gan.predicted_memory(spec.gan, spec.mel, device, micro)

    def of_vit(micro: int) -> Account:
        return vit.predicted_memory(spec.vit, spec.mel, device, micro)

    free = device.free_bytes()
    of_gans = chosen_micro_batch(spec.gan.batch_size, spec.gan.micro_batch, free, of_gan)
    of_vits = chosen_micro_batch(spec.vit.batch_size, spec.vit.micro_batch, free, of_vit)
    return {
        "gan": {"micro_batch": of_gans, **of_gan(of_gans)},
        "vit": {"micro_batch": of_vits, **of_vit(of_vits)},
    }


def run_evaluate(work: Work) -> None:
    spec = work.spec
    # Whatever training used: in fp32, so that `predict` says the same on another machine.
    device = work.device_in("fp32")
    # Where only this phase is left, torch and timm have not been imported yet, and each of them takes a second.
    if work.should_stop():
        raise Interrupted("evaluate: stopped before it began")
    from emotion.evaluation.evaluate import evaluate

    evaluate(
        work.songs("train"),
        work.songs("validation"),
        work.songs("test"),
        work.units("train", "validation"),
        spec.split.fold,
        work.inputs["vit"] / "model",
        spec.evaluate,
        spec.seed,
        device,
        work.out,
        work.should_stop,
    )


def run_publish(work: Work) -> None:
    from job.results.publish import publish

    place = place_of(published_at(work.spec, work.run_folder), work.spec.storage, work.should_stop)
    publish(work.spec, work.inputs, work.run_folder, place, work.out, work.should_stop)


def check_destination(spec: JobSpec, should_stop: Callable[[], bool]) -> None:
    """Raise StorageError for a store that cannot be had; whether it may be written to is found out by writing."""
    destination = spec.artifacts.destination
    if destination is None or not destination.startswith(S3):
        return
    problem = place_of(destination, spec.storage, should_stop).problem()
    if problem is not None:
        raise type(problem)(f"artifacts.destination: {problem}")


def published_at(spec: JobSpec, run_folder: Path) -> str:
    """Where the run is published, as path or URL: DESTINATION/NAME-KEY12, by default beside the run folder in `published/`."""
    return f"{spec.artifacts.destination or run_folder.parent / 'published'}/{run_folder.name}"


def is_published(spec: JobSpec, run_folder: Path, verify: bool, should_stop: Callable[[], bool]) -> bool:
    """Whether everything that the published manifest lists is there: by its size, or by its digest with `verify`."""
    from job.results.publish import unlike_manifest

    return not unlike_manifest(place_of(published_at(spec, run_folder), spec.storage, should_stop), verify)
