"""The training loop of the GAN."""

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from emotion.audio.clips import normalisation_of
from emotion.audio.partition import Partition
from emotion.config import GanConfig, MelConfig
from emotion.data.leaks import identities, refuse_leak, write_seen
from emotion.errors import Interrupted
from emotion.files import write_json
from emotion.gan.density import kernel_shape
from emotion.gan.losses import Batch, Terms, discriminator_backward, generator_backward
from emotion.gan.networks import Discriminator, Generator
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
from emotion.training.schedule import Ema, steps_of
from emotion.training.seeding import derive, seed_step, step_generator
from emotion.training.step_records import Numbers, Record, step_records
from emotion.training.stopped import Stop, write_stops
from emotion.training.weight_files import load_strictly, safetensors_errors_as_os_errors


def train_gan(
    partition: Partition,
    *,
    config: GanConfig,
    context: TrainingContext,
    backoff: MemoryBackoff,
    warm_start: WarmStart = COLD_START,
) -> None:
    """Train on the training songs. Writes `generator.safetensors` (the EMA), `discriminator.safetensors` (for a warm start),
    `config.json` and the list of the songs seen. The weights are those of the last step, or of the step at which the time budget
    was used up.

    Call it through `backoff.run`. Raises ModelError if the GAN or the run it starts from has seen a validation or test song, or
    if weights or losses stay NaN or infinite; Interrupted, after saving a checkpoint, when asked to stop.
    """
    training, device, seed = partition.training, context.device, context.seed
    seen = identities(training.songs) | warm_start.seen
    refuse_leak("the GAN", seen, partition.held_out)
    normalisation = warm_start.normalisation or normalisation_of(training)
    kernel = torch.from_numpy(kernel_shape(training.labels)).float()
    steps = steps_of(config.epochs, len(training.songs), config.batch_size)

    torch.manual_seed(derive(seed, "gan", "weights"))
    G = Generator(training.mel.mels, config.latent, config.width)
    D = Discriminator(training.mel.mels, config.width)
    if warm_start.weights is not None:
        load_networks(G, D, warm_start.weights)
    G, D = G.to(device.device), D.to(device.device)
    ema = Ema(G, config.ema_decay, head_start=0 if warm_start.weights is None else steps)
    g_adam = torch.optim.Adam(G.parameters(), config.generator_learning_rate, betas=(0.0, 0.99), fused=True)
    d_adam = torch.optim.Adam(D.parameters(), config.discriminator_learning_rate, betas=(0.0, 0.99), fused=True)
    g_opt, d_opt = GuardedOptimizer(g_adam, device.scaler()), GuardedOptimizer(d_adam, device.scaler())
    state: dict[str, Stateful] = {"generator": G, "discriminator": D, "ema": ema.network}
    state |= {"g_opt": g_opt, "d_opt": d_opt, "backoff": backoff}
    checkpoint = Checkpoint(context.out / "checkpoints", context.checkpoints, **state)
    persistent = functools.partial(persistent_tensors, (G, D), (g_adam, d_adam), (ema.network,))

    def update(clips: Tensor, labels: Tensor, noise: Tensor, *, parts: Sequence[slice], terms: Terms) -> tuple[Tensor, ...]:
        batch = Batch(clips, labels, noise)
        d_loss, d_accuracy = discriminator_backward(G, D, batch, parts, terms=terms, device=device, scaler=d_opt.scaler)
        d_opt.step(d_loss)
        g_loss = generator_backward(G, D, batch, parts, terms=terms, device=device, scaler=g_opt.scaler)
        g_opt.step(g_loss)
        ema.update(G)
        return d_loss, d_accuracy, g_loss

    first, done = checkpoint.restore(), steps
    frames, on_device = Generator.whole(training.mel.frames(config.clip_seconds)), backoff.features_on_device
    source = ClipSource([Stream("gan", training, config.batch_size)], frames, normalisation, device, on_device=on_device)
    numbers = functools.partial(step_numbers, source, config=config, frames=frames, kernel=kernel, seed=seed)
    records = step_records(numbers, range(first, steps), device, ahead=not on_device)
    with checkpoint, contextlib.closing(records), Progress(context.out, "gan", first, steps) as progress:
        progress.warn_once(f"micro_batch_{backoff.micro_batch}", backoff.advice())
        readings = Readings(device, functools.partial(report, progress, checkpoint))
        no_graphs = functools.partial(readings.flush_then, progress.warn_once, "cuda_graphs")
        graphed = GraphedSteps(context.graphs, (G, D), no_graphs)
        for step in range(first, steps):
            if step > 0 and context.is_used_up(step):
                done = step
                readings.flush()
                checkpoint.save(done)  # a resumed training ends here again
                break
            seed_step(seed, "gan", step)
            batch = make_batch(source, next(records))
            penalise = config.penalty_weight > 0 and step % config.penalty_every_steps == 0
            gamma = config.penalty_weight * config.penalty_every_steps if penalise else 0.0
            terms = Terms(penalty=gamma, matching=config.matching_weight)
            before = G.out.weight.detach().clone() if progress.due(step + 1) else None
            update_so = functools.partial(update, parts=backoff.parts(), terms=terms)
            key = (backoff.micro_batch, penalise)
            ema.begin(step)
            is_largest = step > first and (penalise or config.penalty_weight == 0)
            inputs = (batch.clips, batch.labels, batch.noise)
            with backoff.measure(step, is_largest, persistent, (*inputs, *source.resident)):
                d_loss, d_accuracy, g_loss = graphed.run(key, update_so, *inputs)

            if before is not None:
                change = health.relative_change(G.out.weight, before)
                losses = {"d_loss": d_loss, "g_loss": g_loss, "d_accuracy": d_accuracy}
                readings.send(step + 1, **losses, update_ratio=change, discriminator=d_opt.health(), generator=g_opt.health())
            readings.poll()
            progress.advance(step + 1)
            if config.clear_cache_every_steps and (step + 1) % config.clear_cache_every_steps == 0:
                torch.cuda.empty_cache()
            if checkpoint.due() or context.should_stop():
                with progress.paused():
                    readings.flush()
                    checkpoint.save(step + 1)
                if context.should_stop():
                    checkpoint.wait_until_durable()
                    raise Interrupted(f"gan: stopped after step {step + 1} of {steps}")

        readings.flush()
        graphed.free()
        stop = Stop(done, steps) if done < steps else None
        progress.warn_once("budget", stop.advice() if stop else None, done)

    with safetensors_errors_as_os_errors(context.out):
        save_file(ema.network.state_dict(), context.out / "generator.safetensors")
        save_file(D.state_dict(), context.out / "discriminator.safetensors")
    write_seen(context.out, seen)
    write_stops(context.out, {"gan": stop} if stop else {})
    shape = {"latent": config.latent, "width": config.width, "frames": frames, "steps": done}
    sound = {"mel": training.mel.model_dump(), "normalisation": normalisation.to_json()}
    write_json(context.out / "config.json", {**shape, **sound})


def load_networks(G: Generator, D: Discriminator, folder: Path) -> None:
    """Load both networks for a warm start. A new discriminator would destroy what the generator has learnt.

    folder: as `train_gan` writes it. Raises DataError if a file does not fit its network.
    """
    load_strictly(G, folder / "generator.safetensors", "init_from")
    load_strictly(D, folder / "discriminator.safetensors", "init_from")


def check_weights(config: GanConfig, mel: MelConfig, folder: Path) -> None:
    """Raise the errors of a warm start from this folder early, before other phases take hours."""
    load_networks(Generator(mel.mels, config.latent, config.width), Discriminator(mel.mels, config.width), folder)


def step_numbers(source: ClipSource, step: int, *, config: GanConfig, frames: int, kernel: Tensor, seed: int) -> Numbers:
    """The numbers from which `make_batch` builds the effective batch of a step. They depend on (seed, step) only.

    kernel: [2, 2], see `kernel_shape`. Noise is added to each song's label, so that labels between songs are learnt, too (Ding
    et al. 2021, CcGAN).
    """
    draws = step_generator(seed, "gan", step)
    of_clips, own_labels = source.draw(seed, step)
    labels = torch.from_numpy(own_labels) + torch.randn(config.batch_size, 2, generator=draws) @ kernel.T
    noise = torch.randn(2, config.batch_size, config.latent, 1 + Generator.columns(frames), generator=draws)
    return {**of_clips, "labels": labels.numpy(), "noise": noise.numpy()}


def make_batch(source: ClipSource, record: Record) -> Batch:
    """The effective batch of a step, on the device of its record."""
    return Batch(source.clips(record), record["labels"], record["noise"])


def report(progress: Progress, checkpoint: Checkpoint, reading: Reading) -> None:
    """Record the numbers of a step and log warnings. Raises ModelError if the training has failed."""
    step = reading.step
    networks = {name: OptimizerHealth(*reading.numbers.pop(name)) for name in ("discriminator", "generator")}
    progress.record(step, {name: value for name, (value,) in reading.numbers.items()}, reading.time)
    check_finite(progress, step, "gan.generator_learning_rate and gan.discriminator_learning_rate", **networks)
    progress.warn_once("checkpoint", checkpoint.failure, step)
    accuracy = health.discriminator_accuracy(progress.values("d_accuracy"), step == progress.steps)
    progress.warn_once("discriminator", accuracy, step)
    dead = health.dead_learning_rate(progress.values("update_ratio"), "gan.generator_learning_rate")
    progress.warn_once("dead_learning_rate", dead, step)
    scale = min(network.loss_scale for network in networks.values())
    progress.warn_once("overflow", health.fp16_overflow(scale), step)
