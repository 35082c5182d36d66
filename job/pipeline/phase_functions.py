"""What a phase is given, and each phase's call into the science, which is imported only then: torch takes seconds."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from emotion.config import VitConfig
from emotion.errors import Interrupted
from job.pipeline.warm_start import check_initial
from job.run_folder.conditions import note_conditions
from job.spec.location import S3
from job.spec.model import JobSpec
from job.storage.open import place_of
from job.storage.stage import stage

if TYPE_CHECKING:
    pass
from job.pipeline.context import Work


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
