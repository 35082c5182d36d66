"""The training loop of the ViT on real and synthetic clips. With `vit.synthetic: auto` it runs twice."""

import contextlib
import functools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from emotion.audio.clips import normalisation_of
from emotion.audio.feature_store import Features
from emotion.audio.partition import Partition
from emotion.config import VitConfig
from emotion.data.leaks import TRAINED, identities, read_seen, refuse_leak, write_seen
from emotion.errors import Interrupted
from emotion.files import make_folder, write_json
from emotion.training import health
from emotion.training.checkpoint import Checkpoint, Stateful
from emotion.training.clip_source import ClipSource, Stream
from emotion.training.context import COLD_START, TrainingContext, WarmStart
from emotion.training.graphed_step import GraphedSteps
from emotion.training.guarded_optimizer import GuardedOptimizer, OptimizerHealth, check_finite
from emotion.training.memory_account import persistent_tensors
from emotion.training.memory_backoff import MemoryBackoff
from emotion.training.progress import Progress
from emotion.training.readings import Reading, Readings
from emotion.training.schedule import Ema, steps_of, warmup_cosine
from emotion.training.seeding import derive, seed_step
from emotion.training.step_records import Numbers, Record, step_records
from emotion.training.stopped import Stop, read_stops
from emotion.vit.augment import blend, draw_keep, draw_mixup, mask
from emotion.vit.embedder import inherited, lower_half_of, write_embedder
from emotion.vit.gate import FoundByFolds, Trial, trials_of, undecided, verdict
from emotion.vit.layers import head_groups, install_noise, layer_numbers, lowest_learning, parameter_groups, recompute, unfreeze
from emotion.vit.linear_probe import fit_head
from emotion.vit.network import create_network, preprocessing_for, save_model
from emotion.vit.objective import Objective, backward, loss_function
from emotion.vit.teacher import LABELS, Pupil, Teacher, read_teacher
from emotion.vit.validation import predictions, probe_of, validate
from emotion.vit.weights import seen_by_weights

log = logging.getLogger(__name__)


class BestWeights:
    """The weights with the best validation CCC so far, on the host, their epoch, and the last epoch that was validated.

    Part of the checkpoint. first_epoch: 0 if the weights before the first step are a candidate, else 1.
    """

    def __init__(self, first_epoch: int) -> None:
        self.ccc, self.epoch, self.validated_epoch = -math.inf, 0, first_epoch - 1
        self.weights: dict[str, Tensor] = {}

    def update(self, ccc: float, epoch: int, network: nn.Module) -> None:
        """Keep the weights of a validated epoch if its CCC is better."""
        self.validated_epoch = epoch
        if ccc > self.ccc:
            self.ccc, self.epoch = ccc, epoch
            self.weights = {name: value.detach().to("cpu", copy=True) for name, value in network.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        return vars(self).copy()

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        vars(self).update(state)


def train_vit(
    partition: Partition,
    *,
    synthetic: Features,
    config: VitConfig,
    context: TrainingContext,
    backoff: MemoryBackoff,
    warm_start: WarmStart = COLD_START,
    folds: FoundByFolds | None = None,
) -> None:
    """Train on real songs and on synthetic clips. Writes `model/` (with the lists of the songs seen) and `summary.json`.

    The model is the EMA with the best CCC over the validation songs (mean of valence and arousal). With config.synthetic "auto"
    the better of two trainings is chosen, and `summary.json` says which and why: see emotion/vit/gate.py. Pretrained weights
    start with a fitted head (emotion/vit/linear_probe.py). warm_start.weights: a `model/` to start from instead of
    config.weights. Both count as epoch 0, which becomes the model if no epoch is better. config.teacher: a local file.
    folds: for a partition without validation songs. The model is then the EMA after folds.stop_epoch, on the learning rate
    schedule of all config.epochs, as in the trainings that determined this epoch. If the budget ends the training, the state at
    that step is validated as an epoch, and the model is the best so far; `summary.json` says so.

    Call it through `backoff.run`. Raises ModelError if the ViT, the GAN of the synthetic clips or the run it starts from has seen
    a test song or was trained on a validation song, or if weights or losses stay NaN or infinite; Interrupted when asked to stop,
    after saving a checkpoint, except while the head is fitted.
    """
    for trial in trials_of(config, folds):
        _train(partition, synthetic, config, context=context, backoff=backoff, warm_start=warm_start, trial=trial)


def _train(
    partition: Partition,
    synthetic: Features,
    config: VitConfig,
    *,
    context: TrainingContext,
    backoff: MemoryBackoff,
    warm_start: WarmStart,
    trial: Trial,
) -> None:
    """One training. The first of two stores its result in the rival; the last or only one writes the files."""
    training, device, seed, folds = partition.training, context.device, context.seed, trial.folds
    is_warm = warm_start.weights is not None
    if is_warm:
        config = config.model_copy(update={"weights": str(warm_start.weights)})
    # Songs seen by weights that another job has published.
    learned_from, chosen_by = (set[str](), set[str]()) if is_warm else seen_by_weights(config)
    refuse_leak("the model that vit.weights names", learned_from, partition.validation.songs)
    refuse_leak("the model that vit.weights names", chosen_by, partition.test.songs)
    trained = identities(training.songs) | read_seen(synthetic.folder) | warm_start.trained_on | learned_from
    refuse_leak("what the ViT learns from", trained, partition.validation.songs)
    seen = trained | identities(partition.validation.songs) | warm_start.seen | chosen_by
    refuse_leak("what the ViT learns from or is chosen by", seen, partition.test.songs)
    label_variance = torch.from_numpy(training.labels.var(axis=0)).clamp(min=1e-3).to(device.device)
    normalisation = warm_start.normalisation or normalisation_of(training)
    preprocessing = preprocessing_for(config, training.mel, normalisation, training.scale)
    probe = probe_of(training, partition.validation, seed)
    # From the spec in all trials, so that all have equally many steps and validations.
    real_per_batch = config.batch_size - config.synthetic_per_batch
    steps_per_epoch = steps_of(1, len(training.songs), real_per_batch)
    steps = steps_of(config.epochs, len(training.songs), real_per_batch)
    last = steps if folds is None else min(steps, folds.stop_epoch * steps_per_epoch)

    network = create_network(config, preprocessing, None if is_warm else training.labels.mean(axis=0), seed)
    embedder, no_embedder = None, None
    if warm_start.weights is not None:
        embedder, no_embedder = inherited(warm_start.weights, preprocessing)
    elif config.weights != "random" and not chosen_by:
        embedder = lower_half_of(network)
    noise = install_noise(network)
    teacher, pupil = None, None
    if config.teacher is not None:
        teacher = Teacher(read_teacher(Path(config.teacher)), training.songs, training.mel, preprocessing.frames)
        pupil = Pupil(network, teacher.dimensions, seed)
    learning = network if pupil is None else pupil
    learning.to(device.device).train()
    objective = Objective(learning, noise, preprocessing, loss_function(config, label_variance), device)
    ema = Ema(network, config.ema_decay, head_start=steps if is_warm else 0)
    recompute(network, config.recomputed_blocks)
    begins_with_probe = config.weights != "random" and not is_warm
    best = BestWeights(first_epoch=0 if begins_with_probe or is_warm else 1)
    head = network.get_classifier()  # type: ignore[operator]
    layers = layer_numbers(network)
    groups = parameter_groups(network, layers, config) + ([] if pupil is None else head_groups(pupil.regressor, config))
    adamw = torch.optim.AdamW(groups, fused=True)
    optimizer = GuardedOptimizer(adamw, device.scaler(), config.gradient_clip)
    state: dict[str, Stateful] = {"network": learning, "ema": ema.network}
    state |= {"best": best, "optimizer": optimizer, "backoff": backoff}
    if trial.rival is not None:
        state["rival"] = trial.rival
    part = trial.part(steps)
    checkpoint = Checkpoint(context.out / "checkpoints", context.checkpoints, part.before, **state)
    persistent = functools.partial(persistent_tensors, (learning,), (adamw,), (ema.network,))

    def update(clips: Tensor, labels: Tensor, *, parts: Sequence[slice]) -> tuple[Tensor, ...]:
        adamw.zero_grad(set_to_none=True)
        loss = backward(objective, clips, labels, parts, scaler=optimizer.scaler)
        optimizer.step(loss)
        ema.update(network)
        return (loss,)

    def scores_of_epoch() -> dict[str, float]:
        micro = backoff.micro_batch
        return validate(ema.network, preprocessing, partition.validation, probe, context=context, micro_batch=micro)

    def predicted_by_best() -> Tensor:
        ema.network.load_state_dict(best.weights)
        micro = backoff.micro_batch
        found = predictions(ema.network, preprocessing, [partition.validation], context=context, micro_batch=micro)
        return torch.from_numpy(found)

    first, learning_from, is_cut = checkpoint.restore(), -1, False
    if first > steps:
        return  # the checkpoint is of the next trial; the rival is restored from it
    on_device = backoff.features_on_device
    streams = [Stream("vit", training, config.batch_size - trial.synthetic_per_batch)]
    if trial.synthetic_per_batch:
        streams.append(Stream("vit-synthetic", synthetic, trial.synthetic_per_batch))
    source = ClipSource(streams, preprocessing.frames, normalisation, device, on_device=on_device)
    shape = (training.mel.mels, preprocessing.frames)
    longest_mask = round(config.time_mask_seconds * training.mel.sample_rate_hz / training.mel.hop_samples)
    numbers_of = functools.partial(
        step_numbers, source, config=config, shape=shape, longest_mask=longest_mask, seed=seed, teacher=teacher
    )
    records = step_records(numbers_of, range(first, last), device, ahead=not on_device)
    with checkpoint, contextlib.closing(records), Progress(context.out, "vit", first, last, part) as progress:
        progress.warn_once(f"micro_batch_{backoff.micro_batch}", backoff.advice())
        progress.warn_once("no_embedder", no_embedder)
        readings = Readings(device, functools.partial(report, progress, checkpoint))
        no_graphs = functools.partial(readings.flush_then, progress.warn_once, "cuda_graphs")
        graphed = GraphedSteps(context.graphs, (learning,), no_graphs)
        if begins_with_probe and not checkpoint.is_restored:
            groups_of_songs, micro = partition.training_groups, backoff.micro_batch
            with progress.paused():
                fit_head(ema.network, preprocessing, training, groups=groups_of_songs, context=context, micro_batch=micro)
            network.load_state_dict(ema.network.state_dict())
            if checkpoint.due():  # for many songs the fit takes minutes on a CPU
                checkpoint.save(0)
        for step in range(first, last + 1):
            if 0 < step < last and context.is_used_up(part.before + step):
                is_cut = True
                readings.flush()
                checkpoint.save(step)  # a resumed training ends here again
            epoch = math.ceil(step / steps_per_epoch) if step == steps or is_cut else step // steps_per_epoch
            if folds is None and best.validated_epoch < epoch:
                readings.flush()
                with progress.paused(), saved_if_stopped(checkpoint, step):
                    scores = graphed.beside(scores_of_epoch)
                best.update(scores["validation_ccc"], epoch, ema.network)
                record_validation(progress, scores, step, epoch, config.epochs)
            if step == last or is_cut or (folds is None and epoch - best.epoch >= config.patience_epochs):
                readings.flush()
                if folds is None and steps > 0:
                    progress.warn_once("no_better_epoch", health.no_better_epoch(best.epoch))
                break

            seed_step(seed, "vit", step)
            clips, labels = make_batch(source, next(records))
            noise.draw(derive(seed, "vit", "noise", step), config.batch_size, device)
            lowest = lowest_learning(layers, config, step / steps_per_epoch)
            if lowest != learning_from:
                unfreeze(network, layers, lowest)
                learning_from = lowest
            rate_factor = warmup_cosine(step, steps, config.warmup_fraction)
            optimizer.set_rates(rate_factor)
            ema.begin(step)
            epoch_ends = (step + 1) % steps_per_epoch == 0 or step + 1 == last
            before = head.weight.detach().clone() if progress.due(step + 1) or epoch_ends else None
            is_largest = step > first and step / steps_per_epoch >= config.frozen_epochs + config.unfreeze_epochs
            update_so = functools.partial(update, parts=backoff.parts())
            with backoff.measure(step, is_largest, persistent, (clips, labels, *source.resident)):
                (loss,) = graphed.run((backoff.micro_batch, lowest), update_so, clips, labels)

            if before is not None:
                numbers: dict[str, Tensor | float] = {"loss": loss, "learning_rate": config.learning_rate * rate_factor}
                if rate_factor > 0.05:
                    numbers["update_ratio"] = health.relative_change(head.weight, before)
                readings.send(step + 1, **numbers, network=optimizer.health())
            readings.poll()
            progress.advance(step + 1)
            if checkpoint.due() or context.should_stop():
                with progress.paused():
                    readings.flush()
                    checkpoint.save(step + 1)
                if context.should_stop():
                    checkpoint.wait_until_durable()
                    raise Interrupted(f"vit: stopped after step {step + 1} of at most {last}")

        graphed.free()
        stops = read_stops(synthetic.folder)
        earlier = None if trial.rival is None else trial.rival.stopped_at
        stopped_at = part.before + step if earlier is None and is_cut else earlier
        if stopped_at is not None:
            stops["vit"] = Stop(stopped_at, part.total or last)
            progress.warn_once("budget", stops["vit"].advice() if earlier is None else None, step)
        decided: dict[str, Any] = {}
        if trial.rival is not None:
            with progress.paused(), saved_if_stopped(checkpoint, step):
                predicted = predicted_by_best()
            if trial.synthetic_per_batch == 0:
                trial.rival.take(best.weights, best.epoch, best.ccc, predicted, stopped_at)
                return
            if stopped_at is None:
                both = predicted.numpy(), trial.rival.predicted.numpy()
                decided = verdict(*both, partition.validation.labels, partition.validation_groups)
            else:
                decided = undecided(partition.validation_groups)
            decided |= {"best_epoch_with": best.epoch, "best_epoch_without": trial.rival.epoch}
            log.info("phase=vit synthetic clips %s", decided["why"])
            if not decided["kept"]:
                best.weights, best.epoch, best.ccc = trial.rival.weights, trial.rival.epoch, trial.rival.ccc

    summary: dict[str, Any] = {"steps_per_epoch": steps_per_epoch}
    if folds is None:
        ema.network.load_state_dict(best.weights)
        summary |= {"best_epoch": best.epoch, "validation_ccc": best.ccc}
    else:
        summary |= {"stop_epoch": folds.stop_epoch}
    if begins_with_probe and (best.epoch if folds is None else folds.stop_epoch) == 0:
        summary["is_linear_probe"] = True
    model = context.out / "model"
    make_folder(model)
    save_model(ema.network, preprocessing, model)
    if embedder is not None:
        write_embedder(embedder, model)
    write_seen(model, seen)
    write_seen(model, trained, TRAINED)
    summary["synthetic_per_batch"] = trial.synthetic_per_batch if decided.get("kept", True) else 0
    summary |= {"synthetic_clips": decided} if decided else {}
    summary |= {"stopped_by_budget": {phase: asdict(stop) for phase, stop in stops.items()}} if stops else {}
    write_json(context.out / "summary.json", summary)


@contextlib.contextmanager
def saved_if_stopped(checkpoint: Checkpoint, step: int) -> Iterator[None]:
    """Save a checkpoint if the block, a validation, is interrupted: a resumed training repeats the validation."""
    try:
        yield
    except Interrupted:
        checkpoint.save(step)
        checkpoint.wait_until_durable()
        raise


def step_numbers(
    source: ClipSource,
    step: int,
    *,
    config: VitConfig,
    shape: tuple[int, int],
    longest_mask: int,
    seed: int,
    teacher: Teacher | None = None,
) -> Numbers:
    """The numbers from which `make_batch` builds the augmented batch of a step. They depend on (seed, step) only.

    shape: mels and frames of a clip. With a teacher, labels also hold the target embeddings, see `Teacher.beside`.
    """
    songs, starts = source.places(seed, step)
    numbers, labels = source.numbers(songs, starts), source.labels(songs)
    if teacher is not None:
        labels = teacher.beside(labels, songs[0], starts[0])
    if config.mixup_alpha > 0:
        partners, shares = draw_mixup(labels[:, :LABELS], config, seed, step)
        numbers |= {"partners": partners, "shares": shares}
        blended = blend(*map(torch.from_numpy, (labels, partners, shares))).numpy()
        if teacher is not None:  # a clip mixed with a synthetic one has no known embedding
            blended[:, -1] = np.minimum(labels[:, -1], labels[partners, -1])
        labels = blended
    keep_mels, keep_frames = draw_keep(len(labels), shape, config, longest_mask, seed, step)
    return {**numbers, "labels": labels, "keep_mels": keep_mels, "keep_frames": keep_frames}


def make_batch(source: ClipSource, record: Record) -> tuple[Tensor, Tensor]:
    """The augmented batch of a step, on the device of its record: clips [batch, 1, mels, frames] and labels."""
    clips = source.clips(record)
    if "partners" in record:
        clips = blend(clips, record["partners"], record["shares"])
    return mask(clips, record["keep_mels"], record["keep_frames"]), record["labels"]


def record_validation(progress: Progress, scores: dict[str, float], step: int, epoch: int, epochs: float) -> None:
    """Record the scores of an epoch and log warnings."""
    # After a kill, a repeated validation may be recorded already.
    if epoch not in progress.values("epoch"):
        progress.advance(step, epoch=epoch, **scores)
    # Without epoch 0, before the first step.
    training, validation = (progress.values(name)[-epoch:] for name in ("training_ccc", "validation_ccc"))
    progress.warn_once("not_learning", health.not_learning(training, epochs))
    progress.warn_once("overfitting", health.overfitting(training, validation))


def report(progress: Progress, checkpoint: Checkpoint, reading: Reading) -> None:
    """Record the numbers of a step and log warnings. Raises ModelError if the training has failed."""
    step, network = reading.step, OptimizerHealth(*reading.numbers.pop("network"))
    progress.record(step, {name: value for name, (value,) in reading.numbers.items()}, reading.time)
    check_finite(progress, step, "vit.learning_rate", network=network)
    progress.warn_once("checkpoint", checkpoint.failure, step)
    dead = health.dead_learning_rate(progress.values("update_ratio"), "vit.learning_rate")
    progress.warn_once("dead_learning_rate", dead, step)
    progress.warn_once("overflow", health.fp16_overflow(network.loss_scale), step)
