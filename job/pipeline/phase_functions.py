"""Each phase's call into the science, which is imported only then: torch takes seconds.

`check_…` of a phase is called before the first phase runs, so that a mistake shows now and not after hours of other work.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from emotion.errors import Interrupted
from job.pipeline.context import PhaseContext
from job.pipeline.fetch_inputs import FetchedInputs
from job.pipeline.input_digests import named_file_digests
from job.pipeline.warm_start import check_initial, initial_record
from job.run_folder.conditions import note_conditions
from job.spec.location import S3, Local, StoredLocation
from job.spec.model import JobSpec
from job.storage.open import open_storage
from job.storage.stage import stage


def run_stage(context: PhaseContext) -> None:
    manifests = context.run_folder.parent / "datasets"
    found = stage(context.spec.data, context.spec.storage, manifests, context.out, context.should_stop)
    context.digests, notes = found
    context.notes |= notes


def run_features(context: PhaseContext) -> None:
    from emotion.audio.extract import extract_features
    from emotion.data.deam import Dataset, read_songs
    from emotion.data.faults import read_faults, write_faults
    from job.environment import available_threads

    spec, staged = context.spec, context.inputs["stage"]
    threads = spec.device.threads or available_threads()
    dataset = Dataset(read_songs(staged / "songs.csv"), read_faults(staged / "faults.csv"))
    table = context.run_folder / "faults.csv"
    faults = extract_features(dataset, staged, spec.data, spec.mel, context.out, table, threads, context.should_stop)
    write_faults(context.out / "left_out.csv", faults)


def run_split(context: PhaseContext) -> None:
    from emotion.data.faults import read_faults
    from emotion.data.splits import make_split, write_split

    songs = context.features.songs
    faults = read_faults(context.inputs["features"] / "left_out.csv")
    left_out = [fault.song_id for fault in faults if fault.song_id is not None]
    ids, groups = [song.song_id for song in songs], [song.group for song in songs]
    write_split(context.out / "split.csv", make_split(ids, groups, context.spec.split, left_out))
    # What is published comes from here: the features themselves are large, and need not be on this machine any more.
    shutil.copyfile(context.inputs["features"] / "left_out.csv", context.out / "left_out.csv")


def check_gan(spec: JobSpec, fetched: FetchedInputs, _should_stop: Callable[[], bool]) -> None:
    from emotion.training.device import resolve_device

    check_initial(spec, fetched.initial_run)
    resolve_device(spec.device, spec.precision)


def run_gan(context: PhaseContext) -> None:
    from emotion.gan.train import train_gan

    spec, partition = context.spec, context.partition
    context.memory = train_gan(
        partition.training,
        partition.held_out,
        spec.gan,
        spec.checkpoint,
        spec.seed,
        context.device,
        context.out,
        context.should_stop,
        context.initial("gan"),
    )
    note_micro_batches(context)


def run_synth(context: PhaseContext) -> None:
    from emotion.gan.synth import synthesize

    spec, partition = context.spec, context.partition
    synthesize(
        partition.training,
        partition.held_out,
        context.inputs["gan"],
        spec.synth,
        spec.seed,
        context.device,
        context.out,
        context.should_stop,
    )


def run_quality(context: PhaseContext) -> None:
    from emotion.gan.quality import measure_quality, write_pictures

    write_pictures(context.partition.training, context.synthetic, context.out)
    measure_quality(
        context.partition,
        synthetic=context.synthetic,
        config=context.spec.quality,
        seed=context.spec.seed,
        out=context.out,
        should_stop=context.should_stop,
    )


def check_vit(spec: JobSpec, fetched: FetchedInputs, _should_stop: Callable[[], bool]) -> None:
    from emotion.training.device import resolve_device
    from emotion.vit.network import check_model

    check_initial(spec, fetched.initial_run)
    resolve_device(spec.device, spec.precision)
    check_model(fetched.vit_config(spec), spec.mel)


def run_vit(context: PhaseContext) -> None:
    from emotion.vit.train import train_vit
    from emotion.vit.weights import hub_weights_sha256

    spec, partition, config = context.spec, context.partition, context.fetched.vit_config(context.spec)
    weights = hub_weights_sha256(config)
    if weights:
        context.notes["weights_sha256"] = weights
    context.memory = train_vit(
        partition.training,
        partition.validation,
        partition.test.songs,
        context.synthetic,
        config,
        spec.checkpoint,
        spec.seed,
        context.device,
        context.out,
        context.should_stop,
        context.initial("vit"),
    )
    note_micro_batches(context)


def note_micro_batches(context: PhaseContext) -> None:
    """Those that the training has used are among the conditions under which it was made."""
    assert context.memory is not None
    for micro in context.memory["micro_batches"]:
        note_conditions(context.out, {"micro_batch": micro})


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


def run_evaluate(context: PhaseContext) -> None:
    # In fp32 whatever the training used, so that `predict` gives the same numbers on another machine.
    device = context.device_in("fp32")
    # Where only this phase is left, torch and timm have not been imported yet, and each of them takes a second.
    if context.should_stop():
        raise Interrupted("evaluate: stopped before it began")
    from emotion.evaluation.evaluate import TrainedModel, evaluate
    from emotion.vit.network import load_model, predict_song

    spec, folder = context.spec, context.inputs["vit"] / "model"
    network, preprocessing = load_model(folder, device)
    evaluate(
        context.partition,
        model=TrainedModel(folder, lambda log_mel: predict_song(network, preprocessing, device, log_mel)),
        fold=spec.split.fold,
        config=spec.evaluate,
        seed=spec.seed,
        out=context.out,
        should_stop=context.should_stop,
    )


def run_publish(context: PhaseContext) -> None:
    from job.results.publish import publish

    spec, fetched = context.spec, context.fetched
    init, run = spec.init_from, fetched.initial_run
    publish(
        spec,
        context.inputs,
        context.run_folder,
        open_storage(published_at(spec, context.run_folder), spec.storage, context.should_stop),
        context.out,
        context.should_stop,
        named=named_file_digests(spec, fetched),
        initial=initial_record(init, run) if init and run else None,
    )


def check_destination(spec: JobSpec, _fetched: FetchedInputs, should_stop: Callable[[], bool]) -> None:
    """Raise StorageError for object storage that cannot be used; whether it may be written to is found out by writing."""
    if not isinstance(spec.destination, S3):
        return
    problem = open_storage(spec.destination, spec.storage, should_stop).problem()
    if problem is not None:
        raise type(problem)(f"artifacts.destination: {problem}")


def published_at(spec: JobSpec, run_folder: Path) -> StoredLocation:
    """Where the run is published: DESTINATION/NAME-KEY12, by default beside the run folder in `published/`."""
    return (spec.destination or Local(run_folder.parent / "published")) / run_folder.name


def is_published(spec: JobSpec, run_folder: Path, verify: bool, should_stop: Callable[[], bool]) -> bool:
    """Whether everything that the published manifest lists is there: by its size, or by its digest with `verify`."""
    from job.results.publish import unlike_manifest

    return not unlike_manifest(open_storage(published_at(spec, run_folder), spec.storage, should_stop), verify)
