"""Training of the GAN: one loop, read from top to bottom."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from emotion.audio.clips import clip_batch, normalisation_of
from emotion.audio.feature_store import Features, SongFeatures
from emotion.config import CheckpointConfig, GanConfig, MelConfig
from emotion.data.leaks import identities, refuse_leak, write_seen
from emotion.errors import Interrupted
from emotion.files import write_json
from emotion.gan.density import kernel_shape
from emotion.gan.losses import discriminator_loss, generator_loss, gradient_penalty
from emotion.gan.networks import Discriminator, Generator
from emotion.training import health
from emotion.training.checkpoint import Checkpoint
from emotion.training.device import Device, LossScaler
from emotion.training.guarded_optimizer import Updates, refuse_nan
from emotion.training.memory_account import (
    Account,
    TensorBytes,
    gradients_of,
    state_of,
    weights_of,
    with_adam_and_ema,
    without_memory,
)
from emotion.training.memory_backoff import MOST_PARTS, Memory, parts_of
from emotion.training.progress import Progress
from emotion.training.schedule import Ema, steps_of
from emotion.training.seeding import batch_indices, crop_starts, derive, seed_step
from emotion.training.warm_start import NOTHING, Initial
from emotion.training.weight_files import system_errors


def train_gan(
    training: Features,
    held_out: Sequence[SongFeatures],
    config: GanConfig,
    checkpoints: CheckpointConfig,
    seed: int,
    device: Device,
    out: Path,
    should_stop: Callable[[], bool],
    initial: Initial = NOTHING,
) -> dict[str, Any]:
    """Train on these songs; write `generator.safetensors` (the average), `discriminator.safetensors` (from which one can go
    on), `config.json` and the list of the songs seen.

    held_out: songs that validate and test. initial: a folder of these files. Returns the account of its memory. Raises ModelError
    where a held-out song is among the training songs or those behind what it starts from, when the numbers are none any more, or
    where memory does not suffice for one clip at a time; Interrupted with a checkpoint saved when asked to stop.
    """
    memory = Memory(
        "gan",
        config.batch_size,
        config.micro_batch,
        device,
        lambda micro: predicted_memory(config, training.mel, device, micro),
        lambda step: step["parameters"] + step["optimizer"] + step["averages"] + training.nbytes,
    )

    def attempt() -> None:
        _train(training, held_out, config, checkpoints, seed, device, initial, memory, out, should_stop)

    return memory.kept_within(attempt, "gan.width, gan.clip_seconds or gan.batch_size")


def _train(
    training: Features,
    held_out: Sequence[SongFeatures],
    config: GanConfig,
    checkpoints: CheckpointConfig,
    seed: int,
    device: Device,
    initial: Initial,
    memory: Memory,
    out: Path,
    should_stop: Callable[[], bool],
) -> None:
    seen = identities(training.songs) | initial.seen
    refuse_leak("the GAN", seen, held_out)
    normalisation = initial.normalisation or normalisation_of(training)
    labels_of = torch.from_numpy(training.labels)
    lengths = np.array([song.frames for song in training.songs])
    kernel = torch.from_numpy(kernel_shape(training.labels)).float()
    frames = training.mel.frames(config.clip_seconds)
    columns = 1 + Generator.columns(frames)
    steps = steps_of(config.epochs, len(training.songs), config.batch_size)

    torch.manual_seed(derive(seed, "gan", "weights"))
    G = Generator(training.mel.mels, config.latent, config.width)
    D = Discriminator(training.mel.mels, config.width)
    if initial.weights is not None:
        G.load_state_dict(load_file(initial.weights / "generator.safetensors"))
        # Both: a new discriminator would undo, while it learns, what the generator has learnt.
        D.load_state_dict(load_file(initial.weights / "discriminator.safetensors"))
    G.to(device.device)
    D.to(device.device)
    ema = Ema(G, config.ema_decay, head_start=0 if initial.weights is None else steps)
    g_opt = torch.optim.Adam(G.parameters(), config.generator_learning_rate, betas=(0.0, 0.99), fused=True)
    d_opt = torch.optim.Adam(D.parameters(), config.discriminator_learning_rate, betas=(0.0, 0.99), fused=True)
    g_updates, d_updates = Updates(g_opt, device.scaler()), Updates(d_opt, device.scaler())
    checkpoint = Checkpoint(
        out / "checkpoints",
        checkpoints,
        generator=G,
        discriminator=D,
        ema=ema,
        g_opt=g_opt,
        d_opt=d_opt,
        g_updates=g_updates,
        d_updates=d_updates,
        memory=memory,
    )

    def persistent() -> dict[str, Iterable[Tensor]]:
        return {
            "parameters": weights_of(G, D),
            "gradients": gradients_of(G, D),
            "optimizer": state_of(g_opt, d_opt),
            "averages": weights_of(ema.network),
        }

    first = checkpoint.restore()
    with checkpoint, Progress(out, "gan", first, steps) as progress:
        progress.warn(f"micro_batch_{memory.micro_batch}", memory.told())
        for step in range(first, steps):
            # Everything random of this step, for the whole effective batch, before it is cut into micro-batches.
            draws = seed_step(seed, "gan", step)
            songs = batch_indices(seed, "gan", step, config.batch_size, len(training.songs))
            starts = crop_starts(seed, "gan", step, lengths[songs], frames)
            # Vicinal labels: the nets also learn the labels around each song's own (Ding et al. 2021, CcGAN).
            labels = labels_of[songs] + torch.randn(config.batch_size, 2, generator=draws) @ kernel.T
            noise = torch.randn(2, config.batch_size, config.latent, columns, generator=draws)
            penalise = config.penalty_weight > 0 and step % config.penalty_every_steps == 0
            reals = device.send(clip_batch(training, songs, starts, frames, normalisation))
            conditions, noise = device.send(labels), device.send(noise)
            told = progress.due(step + 1)
            before = G.out.weight.detach().clone() if told else None
            penalty_weight = config.penalty_weight * config.penalty_every_steps if penalise else 0.0
            parts = memory.parts(config.batch_size)
            with memory.counted(
                step,
                step > first and (penalise or config.penalty_weight == 0),
                persistent,
                (reals, conditions, noise),
            ):
                d_loss, d_right = _discriminator_backward(
                    G, D, reals, conditions, noise[0], parts, penalty_weight, device, d_updates.scaler
                )
                d_updates.step(d_loss)
                g_loss = _generator_backward(G, D, reals, conditions, noise[1], parts, device, g_updates.scaler)
                g_updates.step(g_loss)
                ema.update(G, step)

            if before is not None:
                changed = health.change_of(G.out.weight, before)
                progress.advance(
                    step + 1,
                    d_loss=d_loss.item(),
                    g_loss=g_loss.item(),
                    d_accuracy=d_right.item(),
                    update_ratio=changed,
                )
                rates = "gan.generator_learning_rate and gan.discriminator_learning_rate"
                refuse_nan(progress, rates, step + 1 == steps, discriminator=d_updates, generator=g_updates)
                accuracies, ratios = progress.told("d_accuracy"), progress.told("update_ratio")
                progress.warn("checkpoint", checkpoint.failure)
                progress.warn("discriminator", health.discriminator_accuracy(accuracies, step + 1 == steps))
                progress.warn("dead_learning_rate", health.update_ratio(ratios, "gan.generator_learning_rate"))
                scale = min(updates.scaler.get_scale() for updates in (d_updates, g_updates))
                progress.warn("overflow", health.overflow(scale))
            else:
                progress.advance(step + 1)
            if config.clear_cache_every_steps and (step + 1) % config.clear_cache_every_steps == 0:
                torch.cuda.empty_cache()
            if checkpoint.due() or should_stop():
                checkpoint.save(step + 1)
                if should_stop():
                    checkpoint.leave()
                    raise Interrupted(f"gan: stopped after step {step + 1} of {steps}")

    with system_errors():
        save_file(ema.network.state_dict(), out / "generator.safetensors")
        save_file(D.state_dict(), out / "discriminator.safetensors")
    write_seen(out, seen)
    write_json(
        out / "config.json",
        {
            "latent": config.latent,
            "width": config.width,
            "frames": frames,
            "steps": steps,
            "mel": training.mel.model_dump(),
            "normalisation": normalisation.to_json(),
        },
    )


def _discriminator_backward(
    G: Generator,
    D: Discriminator,
    reals: Tensor,
    labels: Tensor,
    noise: Tensor,
    parts: Sequence[slice],
    penalty_weight: float,
    device: Device,
    scaler: LossScaler,
) -> tuple[Tensor, Tensor]:
    """Leave the discriminator's gradient over the whole effective batch; its loss, and the share of pairs told apart.

    reals: [batch, 1, mels, frames]; parts: the micro-batches. penalty_weight 0: without the penalties.
    """
    loss_of_all, right = torch.zeros((), device=device.device), torch.zeros((), device=device.device)
    D.requires_grad_(True)
    D.zero_grad(set_to_none=True)
    for part in parts:
        real, label = reals[part], labels[part]
        share = len(real) / len(reals)
        with torch.no_grad(), device.autocast():
            fake = G(label, noise[part], reals.shape[3])
        with device.autocast():
            real_logits, fake_logits = D(real, label), D(fake, label)
            loss = discriminator_loss(real_logits, fake_logits)
        right += share * (real_logits > fake_logits).float().mean()
        loss_of_all += share * loss.detach()
        if penalty_weight > 0:
            penalty = gradient_penalty(D, real, label) + gradient_penalty(D, fake.float(), label)
            loss = loss + penalty_weight * penalty
        scaler.scale(loss * share).backward()
    return loss_of_all, right


def _generator_backward(
    G: Generator,
    D: Discriminator,
    reals: Tensor,
    labels: Tensor,
    noise: Tensor,
    parts: Sequence[slice],
    device: Device,
    scaler: LossScaler,
) -> Tensor:
    """Leave the generator's gradient over the whole effective batch; its loss."""
    loss_of_all = torch.zeros((), device=device.device)
    # The loss passes through D, but must leave no gradient there for D's next update.
    D.requires_grad_(False)
    G.zero_grad(set_to_none=True)
    for part in parts:
        real, label = reals[part], labels[part]
        share = len(real) / len(reals)
        with device.autocast():
            with torch.no_grad():
                real_logits = D(real, label)
            fake_logits = D(G(label, noise[part], reals.shape[3]), label)
            loss = generator_loss(real_logits, fake_logits)
        loss_of_all += share * loss.detach()
        scaler.scale(loss * share).backward()
    return loss_of_all


def predicted_memory(config: GanConfig, mel: MelConfig, device: Device, micro: int) -> Account:
    """What a step with penalties takes at its peak, with this micro-batch; nothing is computed."""
    frames, scaler = mel.frames(config.clip_seconds), LossScaler(device.device.type, enabled=False)
    parts = parts_of(config.batch_size, micro)[:MOST_PARTS]
    with torch.device("meta"):
        G, D = Generator(mel.mels, config.latent, config.width), Discriminator(mel.mels, config.width)
    with without_memory():
        for network in (G, D):
            network.to_empty(device=device.device)
        # What the step before has left.
        for parameter in G.parameters():
            parameter.grad = torch.empty_like(parameter)
        reals = torch.empty(config.batch_size, 1, mel.mels, frames, device=device.device)
        labels = torch.empty(config.batch_size, 2, device=device.device)
        columns = 1 + Generator.columns(frames)
        noise = torch.empty(2, config.batch_size, config.latent, columns, device=device.device)
        with TensorBytes(
            device.device,
            lambda: {"parameters": weights_of(G, D), "gradients": gradients_of(G, D)},
            (reals, labels, noise),
        ) as counted:
            _discriminator_backward(G, D, reals, labels, noise[0], parts, config.penalty_weight, device, scaler)
            _generator_backward(G, D, reals, labels, noise[1], parts, device, scaler)
        D.requires_grad_(True)
    return with_adam_and_ema(counted.account, (G, D), G)
