"""Each phase's call into the science, which is imported only when the phase runs: torch takes seconds.
`check_…` of a phase is called before the first phase runs, so that a mistake shows at once and not after hours of other work."""

import logging
import os
import shutil
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from emotion.data.out_of_fold import OUT_OF_FOLD
from emotion.errors import AccessError, Interrupted, StorageError
from emotion.files import read_json
from emotion.training.stopped import Stop, read_stops
from job.entry import stop_signals_held
from job.environment import available_threads, prepare_environment, temporary_caches
from job.pipeline.context import PhaseContext
from job.pipeline.fetch_inputs import FetchedInputs, named_file_digests, split_lists
from job.pipeline.warm_start import check_warm_start, warm_start_record
from job.results.manifest import MANIFEST, published_at, stored_manifest
from job.run_folder.conditions import record_conditions
from job.run_folder.receipts import RECEIPT, parse_receipt
from job.spec.location import S3, Local
from job.spec.model import JobSpec, run_name
from job.storage.local_folder import refuse_link_out, require_possible_folder
from job.storage.open import open_storage
from job.storage.stage import stage, staged_scale

log = logging.getLogger(__name__)


def run_stage(context: PhaseContext) -> None:
    from emotion.data.faults import read_faults

    manifests = context.run_folder.parent / "datasets"
    context.digests, notes = stage(context.spec.data, context.spec.storage, manifests, context.out, context.should_stop)
    context.notes |= notes
    if faults := read_faults(context.out / "faults.csv"):
        text = "phase=stage faults=%d, the first: %s; the phase features reports all, with those of the audio"
        log.warning(text, len(faults), faults[0])


def run_features(context: PhaseContext) -> None:
    from emotion.audio.extract import extract_features
    from emotion.audio.song_workers import Workers
    from emotion.data.dynamic import DYNAMIC_TABLE
    from emotion.data.faults import read_faults, write_faults
    from emotion.data.songs import Dataset, read_songs

    spec, staged = context.spec, context.inputs["stage"]
    receipt = parse_receipt(staged, read_json(staged / RECEIPT))
    digests = {name: record.sha256 for name, record in receipt.outputs.items()}
    scale = staged_scale(staged)
    dataset = Dataset(staged, read_songs(staged / "songs.csv"), read_faults(staged / "faults.csv"), digests, scale)
    faults = extract_features(
        dataset,
        spec.data,
        spec.mel,
        out=context.out,
        faults_table=context.run_folder / "faults.csv",
        workers=Workers(spec.device.threads or available_threads(), stop_signals_held, context.add_processes_bytes),
        should_stop=context.should_stop,
    )
    write_faults(context.out / "left_out.csv", faults)
    if (staged / DYNAMIC_TABLE).exists():
        shutil.copyfile(staged / DYNAMIC_TABLE, context.out / DYNAMIC_TABLE)


def run_split(context: PhaseContext) -> None:
    from emotion.data.faults import read_faults
    from emotion.data.out_of_fold import refuse_other_songs
    from emotion.data.splits import make_split, write_split

    songs = context.features.songs
    labels = [(valence, arousal) for valence, arousal in context.features.labels.tolist()]
    if context.out_of_fold is not None:
        refuse_other_songs(context.out_of_fold, songs, labels)
    faults = read_faults(context.inputs["features"] / "left_out.csv")
    left_out = [fault.song_id for fault in faults if fault.song_id is not None]
    ids, groups = [song.song_id for song in songs], [song.group for song in songs]
    split = make_split(ids, groups, context.spec.split, left_out, [song.split for song in songs], labels)
    context.fetched.require_unchanged(*split_lists(context.spec).values())
    write_split(context.out / "split.csv", split)
    # Published data come from this output: the features are large and may no longer be on this machine.
    shutil.copyfile(context.inputs["features"] / "left_out.csv", context.out / "left_out.csv")


def check_gan(spec: JobSpec, fetched: FetchedInputs, _should_stop: Callable[[], bool]) -> None:
    from emotion.training.device import resolve_device

    run = fetched.warm_start_run
    check_warm_start(spec, run)
    resolve_device(spec.device, spec.precision)
    if run is not None and spec.init_from is not None and spec.init_from.gan:
        from emotion.gan.train import check_weights

        check_weights(spec.gan, spec.mel, run / "gan")


def run_gan(context: PhaseContext) -> None:
    from emotion.gan.memory import gan_backoff
    from emotion.gan.train import train_gan

    partition, config, warm_start = context.partition, context.spec.gan, context.warm_start("gan")
    context.require_teacher()
    backoff = gan_backoff(partition, config, context.device)
    context.memory = backoff.run(
        lambda: train_gan(partition, config=config, context=context.training, backoff=backoff, warm_start=warm_start)
    )
    note_conditions(context, read_stops(context.out).get("gan"))


def run_synth(context: PhaseContext) -> None:
    from emotion.gan.synth import synthesize

    synthesize(context.partition, gan=context.inputs["gan"], config=context.spec.synth, context=context.training)


def run_quality(context: PhaseContext) -> None:
    from emotion.gan.quality import measure_quality, write_pictures

    write_pictures(context.partition.training, context.synthetic, context.out)
    measure_quality(
        context.partition,
        synthetic=context.synthetic,
        config=context.spec.quality,
        seed=context.spec.seed,
        out=context.out,
        threads=context.spec.device.threads or available_threads(),
        should_stop=context.should_stop,
    )


def check_vit(spec: JobSpec, fetched: FetchedInputs, _should_stop: Callable[[], bool]) -> None:
    from emotion.training.device import resolve_device
    from emotion.vit.network import check_model
    from emotion.vit.teacher import dimensions_of

    check_warm_start(spec, fetched.warm_start_run)
    resolve_device(spec.device, spec.precision)
    config = fetched.vit_config(spec)
    check_model(config, spec.mel)
    dimensions_of(config)  # reads the teacher's file


def load_named_weights(spec: JobSpec) -> str:
    """Load a local file of vit.weights into the network, as `run` does before its first phase. Returns a text that says that it
    fits; empty without such a file or without timm."""
    file = spec.weights_file
    if not isinstance(file, Local) or find_spec("timm") is None:
        return ""
    prepare_environment(spec.device.threads or available_threads())
    with temporary_caches():
        from emotion.vit.network import check_model

        check_model(spec.vit, spec.mel)
    return f"the weights in {file} fit"


def run_vit(context: PhaseContext) -> None:
    from emotion.vit.gate import FoundByFolds
    from emotion.vit.memory import vit_backoff
    from emotion.vit.train import train_vit
    from emotion.vit.weights import hub_weights_sha256

    partition, synthetic, warm_start = context.partition, context.synthetic, context.warm_start("vit")
    context.fetched.require_unchanged(context.fetched.weights)
    context.require_teacher()
    config = context.fetched.vit_config(context.spec)
    found = context.out_of_fold
    weights = hub_weights_sha256(config)
    if weights:
        context.notes["weights_sha256"] = weights
    backoff = vit_backoff(partition, synthetic, config, context.device)
    context.memory = backoff.run(
        lambda: train_vit(
            partition,
            synthetic=synthetic,
            config=config,
            context=context.training,
            backoff=backoff,
            warm_start=warm_start,
            folds=None if found is None else FoundByFolds(found.stop_epoch, found.keeps_synthetic),
        )
    )
    summary = read_json(context.out / "summary.json")
    context.notes |= {name: summary[name] for name in ("synthetic_clips", "stopped_by_budget") if name in summary}
    stop = summary.get("stopped_by_budget", {}).get("vit")
    note_conditions(context, Stop(**stop) if stop else None)


def note_conditions(context: PhaseContext, stop: Stop | None = None) -> None:
    """Record the conditions of a training: the micro-batches that it used, whether its steps were CUDA graphs (on a GPU), and the
    step after which the budget ended it."""
    assert context.memory is not None
    if stop is not None:
        record_conditions(context.out, {"stopped_after": stop.step})
    for micro in context.memory["micro_batches"] or [context.memory["micro_batch"]]:  # a linear probe has no steps
        record_conditions(context.out, {"micro_batch": micro})
    if context.graphs is not None:
        record_conditions(context.out, {"cuda_graphs": context.graphs.failure is None})


def predicted_memory(spec: JobSpec) -> dict[str, dict[str, int]]:
    """Training phase → its micro-batch, and component → bytes at the peak of a step."""
    from emotion.gan import memory as gan
    from emotion.training.device import resolve_device
    from emotion.training.memory_backoff import choose_micro_batch
    from emotion.vit import memory as vit

    device = resolve_device(spec.device, spec.precision)
    free = device.free_bytes()
    predict_gan = partial(gan.predicted_memory, spec.gan, spec.mel, device)
    predict_vit = partial(vit.predicted_memory, spec.vit, spec.mel, device)
    gan_micro = choose_micro_batch(spec.gan.batch_size, spec.gan.micro_batch, free, predict_gan)
    vit_micro = choose_micro_batch(spec.vit.batch_size, spec.vit.micro_batch, free, predict_vit)
    return {
        "gan": {"micro_batch": gan_micro, **predict_gan(gan_micro)},
        "vit": {"micro_batch": vit_micro, **predict_vit(vit_micro)},
    }


def run_stack(context: PhaseContext) -> None:
    # In fp32, as in evaluate.
    device = context.device_in("fp32")
    if context.should_stop():
        raise Interrupted("stack: stopped before it began")
    from emotion.vit.embedder import read_embedder

    model = context.inputs["vit"] / "model"
    if context.out_of_fold is not None:
        from emotion.evaluation.final import fit_final_stack

        fit_final_stack(
            context.partition,
            found=context.out_of_fold,
            embed=read_embedder(model, device),
            seed=context.spec.seed,
            threads=device.threads,
            out=context.out,
            should_stop=context.should_stop,
        )
        return
    from emotion.evaluation.stack import fit_stack
    from emotion.vit.predict import SongPredictor

    fit_stack(
        context.partition,
        predict=SongPredictor(model, device),
        embed=read_embedder(model, device),
        seed=context.spec.seed,
        threads=device.threads,
        out=context.out,
        should_stop=context.should_stop,
    )


def run_evaluate(context: PhaseContext) -> None:
    # In fp32 regardless of the training precision, so that `predict` gives the same numbers on another machine.
    device = context.device_in("fp32")
    # Where only this phase is left, torch and timm have not been imported yet, and each of them takes a second.
    if context.should_stop():
        raise Interrupted("evaluate: stopped before it began")
    spec, training = context.spec, read_json(context.inputs["vit"] / "summary.json")
    if context.out_of_fold is not None:
        from emotion.evaluation.final import evaluate_by_folds

        found = context.out_of_fold
        evaluate_by_folds(context.partition, found=found, config=spec.evaluate, seed=spec.seed, out=context.out, summary=training)
        shutil.copyfile(str(spec.split.out_of_fold), context.out / OUT_OF_FOLD)
        return
    from emotion.evaluation.evaluate import TrainedModel, evaluate
    from emotion.vit.embedder import read_embedder
    from emotion.vit.predict import SongPredictor

    folder, stack = context.inputs["vit"] / "model", context.inputs["stack"] / "stack"
    predictor, embed = SongPredictor(folder, device), read_embedder(folder, device)
    evaluate(
        context.partition,
        model=TrainedModel(folder, stack, predictor, predictor.curve, embed=embed, threads=device.threads, training=training),
        fold=spec.split.fold,
        config=spec.evaluate,
        seed=spec.seed,
        out=context.out,
        should_stop=context.should_stop,
    )


def run_publish(context: PhaseContext) -> None:
    from job.results.publish import NamedInputs, publish

    spec, fetched = context.spec, context.fetched
    init, run = spec.init_from, fetched.warm_start_run
    storage = open_storage(published_at(spec, context.run_folder), spec.storage, context.should_stop)
    publish(
        spec,
        context.inputs,
        NamedInputs(named_file_digests(spec, fetched), warm_start_record(init, run) if init and run else None),
        run_folder=context.run_folder,
        out=context.out,
        storage=storage,
        should_stop=context.should_stop,
    )
    context.notes["published"] = {entry.name: entry.tag for entry in storage.entries()}


def check_destination(spec: JobSpec, _fetched: FetchedInputs, should_stop: Callable[[], bool]) -> None:
    """Raise an error for a destination that cannot be used, without writing to it: object storage that does not answer; a file in
    the place of a folder, a folder that is not writable, links that lead out of it."""
    if isinstance(spec.destination, S3):
        problem = open_storage(spec.destination, spec.storage, should_stop).problem()
        if problem is not None:
            raise type(problem)(f"artifacts.destination: {problem}")
    elif isinstance(spec.destination, Local):
        root = spec.destination.path
        published = root / run_name(spec)
        require_possible_folder(published, "artifacts.destination")
        for path in (published, *published.rglob("*")):
            refuse_link_out(path, root)
        lowest = next(path for path in (published, *published.parents) if path.exists())
        if os.statvfs(lowest).f_flag & os.ST_RDONLY:
            raise StorageError(f"artifacts.destination: {lowest} is on a read-only file system. Name another folder.")
        if not os.access(lowest, os.W_OK | os.X_OK):
            raise AccessError(f"artifacts.destination: {lowest} may not be written to. Name another folder.")


def is_published(spec: JobSpec, run_folder: Path, notes: dict[str, Any], verify: bool, should_stop: Callable[[], bool]) -> bool:
    """Whether manifest and artifacts are those that this run has published, or found published and verified. notes: those of its
    receipt. Equal size and version (time, ETag) are trusted; if the version differs, or with `verify`, the digest decides."""
    storage = open_storage(published_at(spec, run_folder), spec.storage, should_stop)
    manifest = stored_manifest(storage)
    if manifest is None:
        return False
    if verify:
        return not manifest.changed(storage)
    entries, known = {entry.name: entry for entry in storage.entries()}, notes.get("published", {})
    if MANIFEST not in entries or entries[MANIFEST].tag != known.get(MANIFEST):
        return False  # the phase verifies it
    if any(name not in entries or entries[name].size != artifact.size for name, artifact in manifest.artifacts.items()):
        return False
    return not manifest.changed(storage, [name for name in manifest.artifacts if entries[name].tag != known.get(name)])
