"""Fine-tuning of the ViT on real and synthetic clips: one loop, read from top to bottom."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from emotion.audio.clips import clip_batch, normalisation_of
from emotion.audio.feature_store import Features, SongFeatures
from emotion.config import CheckpointConfig, MelConfig, VitConfig
from emotion.data.leaks import TRAINED, identities, read_seen, refuse_leak, write_seen
from emotion.errors import Interrupted
from emotion.evaluation.metrics import concordance
from emotion.files import write_json
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
from emotion.training.schedule import Ema, steps_of, warmup_cosine
from emotion.training.seeding import batch_indices, crop_starts, derive, generator, seed_step
from emotion.training.warm_start import NOTHING, Initial
from emotion.vit.augment import mixup, spec_augment
from emotion.vit.network import (
    Preprocessing,
    create_network,
    layer_numbers,
    network_input,
    no_normalisation,
    predict_song,
    preprocessing_for,
    save_model,
    shape_of_network,
)
from emotion.vit.noise import BatchNoise, install_noise


class BestWeights:
    """The weights with the best validation CCC so far, kept on the host, after which epoch that was, and the last one offered.

    It travels inside the checkpoint, so that going on from any checkpoint knows the best of exactly those steps, and whether the
    epoch that ended with them has been validated yet. first: 0 where the weights before the first step may be the best.
    """

    def __init__(self, first: int) -> None:
        self.ccc, self.epoch, self.offered = -math.inf, 0, first - 1
        self.weights: dict[str, Tensor] = {}

    def offer(self, ccc: float, epoch: int, network: nn.Module) -> None:
        self.offered = epoch
        if ccc > self.ccc:
            self.ccc, self.epoch = ccc, epoch
            self.weights = {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        return {"ccc": self.ccc, "epoch": self.epoch, "offered": self.offered, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        self.ccc, self.epoch, self.offered = state["ccc"], state["epoch"], state["offered"]
        self.weights = state["weights"]


def train_vit(
    training: Features,
    validation: Features,
    held_out: Sequence[SongFeatures],
    synthetic: Features,
    config: VitConfig,
    checkpoints: CheckpointConfig,
    seed: int,
    device: Device,
    out: Path,
    should_stop: Callable[[], bool],
    initial: Initial = NOTHING,
) -> dict[str, Any]:
    """Train on real songs and on synthetic clips; write `model/` (with the lists of the songs seen) and `summary.json`.

    The averaged weights with the best CCC over the validation songs (mean of valence and arousal) are the model. held_out:
    songs that test. initial: a `model/` to start from instead of config.weights; where no epoch is better, it stays the model.
    Returns the account of its memory. Raises ModelError where one of the held-out songs is among the others, where what made the
    synthetic clips, or what it starts from, has seen one of them or was trained on a validation song, when the numbers are none
    any more, and where memory does not suffice for one clip at a time; Interrupted with a checkpoint saved when asked to stop.
    """
    memory = Memory(
        "vit",
        config.batch_size,
        config.micro_batch,
        device,
        lambda micro: predicted_memory(config, training.mel, device, micro),
        # The best weights lie on the host, and once more in the copy of a checkpoint.
        lambda step: (
            step["parameters"]
            + step["optimizer"]
            + 3 * step["averages"]
            + sum(features.nbytes for features in (training, validation, synthetic))
        ),
    )

    def attempt() -> None:
        _train(
            training,
            validation,
            held_out,
            synthetic,
            config,
            checkpoints,
            seed,
            device,
            initial,
            memory,
            out,
            should_stop,
        )

    return memory.kept_within(attempt, "vit.clip_seconds, vit.image_size or vit.max_crops, choose a smaller vit.model")


def _train(
    training: Features,
    validation: Features,
    held_out: Sequence[SongFeatures],
    synthetic: Features,
    config: VitConfig,
    checkpoints: CheckpointConfig,
    seed: int,
    device: Device,
    initial: Initial,
    memory: Memory,
    out: Path,
    should_stop: Callable[[], bool],
) -> None:
    starts_trained = initial.weights is not None
    if starts_trained:
        config = config.model_copy(update={"weights": str(initial.weights)})
    trained = identities(training.songs) | read_seen(synthetic.folder) | initial.trained_on
    refuse_leak("what the ViT learns from", trained, validation.songs)
    seen = trained | identities(validation.songs) | initial.seen
    refuse_leak("what the ViT learns from or is chosen by", seen, held_out)
    labels_of = torch.from_numpy(training.labels)
    label_mean = None if starts_trained else training.labels.mean(axis=0)
    label_variance = torch.from_numpy(training.labels.var(axis=0)).clamp(min=1e-3).to(device.device)
    lengths = np.array([song.frames for song in training.songs])
    normalisation = initial.normalisation or normalisation_of(training)
    preprocessing = preprocessing_for(config, training.mel, normalisation)
    frames = preprocessing.frames
    longest_mask = round(config.time_mask_seconds * training.mel.sample_rate_hz / training.mel.hop_samples)
    synthetic_batch = config.synthetic_per_batch
    real_batch = config.batch_size - synthetic_batch
    # As many training songs as there are validation songs, to see the gap between the two open.
    probe = training.only(
        generator(seed, "vit", "probe").permutation(len(training.songs))[: len(validation.songs)].tolist()
    )
    steps_per_epoch = steps_of(1, len(training.songs), real_batch)
    steps = steps_of(config.epochs, len(training.songs), real_batch)

    network = create_network(config, preprocessing, label_mean, seed)
    noise = install_noise(network)
    network.to(device.device).train()
    ema = Ema(network, config.ema_decay, head_start=steps if starts_trained else 0)
    best = BestWeights(first=0 if starts_trained else 1)
    head = network.get_classifier()  # type: ignore[operator]
    layers = layer_numbers(network)
    optimizer = torch.optim.AdamW(parameter_groups(network, layers, config), fused=True)
    updates = Updates(optimizer, device.scaler(), config.gradient_clip)
    checkpoint = Checkpoint(
        out / "checkpoints",
        checkpoints,
        network=network,
        ema=ema,
        best=best,
        optimizer=optimizer,
        updates=updates,
        memory=memory,
    )
    objective = objective_of(config, label_variance)

    def persistent() -> dict[str, Iterable[Tensor]]:
        return {
            "parameters": weights_of(network),
            "gradients": gradients_of(network),
            "optimizer": state_of(optimizer),
            "averages": weights_of(ema.network),
        }

    first = checkpoint.restore()
    with checkpoint, Progress(out, "vit", first, steps) as progress:
        progress.warn(f"micro_batch_{memory.micro_batch}", memory.told())
        for step in range(first, steps + 1):
            epochs = math.ceil(step / steps_per_epoch) if step == steps else step // steps_per_epoch
            if best.offered < epochs:
                try:
                    valence, arousal = _concordances(ema.network, preprocessing, device, validation, should_stop)
                    learnt = sum(_concordances(ema.network, preprocessing, device, probe, should_stop)) / 2
                except Interrupted:
                    # Going on begins with this validation.
                    checkpoint.save(step)
                    checkpoint.leave()
                    raise
                held = (valence + arousal) / 2
                best.offer(held, epochs, ema.network)
                # Told already where this is made up for after a kill.
                if epochs not in progress.told("epoch"):
                    progress.advance(
                        step,
                        epoch=epochs,
                        validation_ccc_valence=valence,
                        validation_ccc_arousal=arousal,
                        validation_ccc=held,
                        training_ccc=learnt,
                    )
                # Without those of the weights it starts from.
                cccs = [progress.told(name)[-epochs:] for name in ("training_ccc", "validation_ccc")]
                progress.warn("not_learning", health.not_learning(cccs[0], config.epochs))
                progress.warn("overfitting", health.gap(*cccs))
            if step == steps or epochs - best.epoch >= config.patience_epochs:
                progress.warn("no_better_epoch", health.no_better_epoch(best.epoch))
                break
            seed_step(seed, "vit", step)
            songs = batch_indices(seed, "vit", step, real_batch, len(training.songs))
            starts = crop_starts(seed, "vit", step, lengths[songs], frames)
            clips, labels = clip_batch(training, songs, starts, frames, preprocessing.normalisation), labels_of[songs]
            if synthetic_batch:
                made = batch_indices(seed, "vit-synthetic", step, synthetic_batch, len(synthetic.songs))
                lasting = [synthetic.songs[index].frames for index in made]
                starts = crop_starts(seed, "vit-synthetic", step, lasting, frames)
                clips = torch.cat([clips, clip_batch(synthetic, made, starts, frames, preprocessing.normalisation)])
                labels = torch.cat([labels, torch.from_numpy(synthetic.labels[made])])
            clips, labels = mixup(clips, labels, config, seed, step)
            clips = device.send(spec_augment(clips, config, longest_mask, seed, step))
            labels = device.send(labels)

            thaw(network, layers, config, step / steps_per_epoch)
            factor = warmup_cosine(step, steps, config.warmup_fraction)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * group["scale"] * factor
            epoch_ends = (step + 1) % steps_per_epoch == 0 or step + 1 == steps
            before = head.weight.detach().clone() if progress.due(step + 1) or epoch_ends else None
            with memory.counted(
                step,
                step > first and step / steps_per_epoch >= config.frozen_epochs + config.unfreeze_epochs,
                persistent,
                (clips, labels),
            ):
                optimizer.zero_grad(set_to_none=True)
                parts = memory.parts(config.batch_size)
                loss = _backward(
                    network, noise, clips, labels, preprocessing, parts, objective, device, updates.scaler, seed, step
                )
                updates.step(loss)
                ema.update(network, step)

            told: dict[str, float] = {}
            if before is not None:
                changed = health.change_of(head.weight, before)
                told = {"loss": loss.item(), "learning_rate": config.learning_rate * factor}
                if factor > 0.05:
                    told["update_ratio"] = changed
            progress.advance(step + 1, **told)
            if told:
                refuse_nan(progress, "vit.learning_rate", step + 1 == steps, network=updates)
                progress.warn("checkpoint", checkpoint.failure)
                progress.warn(
                    "dead_learning_rate", health.update_ratio(progress.told("update_ratio"), "vit.learning_rate")
                )
                progress.warn("overflow", health.overflow(updates.scaler.get_scale()))
            if checkpoint.due() or should_stop():
                checkpoint.save(step + 1)
                if should_stop():
                    checkpoint.leave()
                    raise Interrupted(f"vit: stopped after step {step + 1} of at most {steps}")

    ema.network.load_state_dict(best.weights)
    (out / "model").mkdir(exist_ok=True)
    save_model(ema.network, preprocessing, out / "model")
    write_seen(out / "model", seen)
    write_seen(out / "model", trained, TRAINED)
    write_json(
        out / "summary.json", {"best_epoch": best.epoch, "validation_ccc": best.ccc, "steps_per_epoch": steps_per_epoch}
    )


def objective_of(config: VitConfig, label_variance: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """(predicted, labels), [batch, 2] each → the loss. label_variance: [2], of the training songs."""

    def objective(predicted: Tensor, labels: Tensor) -> Tensor:
        mse = ((predicted - labels).square().mean(dim=0) / label_variance).mean()
        return config.ccc_weight * (1 - batch_concordance(predicted, labels)) + (1 - config.ccc_weight) * mse

    return objective


def batch_concordance(predicted: Tensor, labels: Tensor) -> Tensor:
    """Mean over valence and arousal of Lin's concordance in a batch, [batch, 2] each; 0 where nothing varies."""
    assert predicted.shape == labels.shape, f"{predicted.shape} predictions and {labels.shape} labels"
    covariance = ((predicted - predicted.mean(dim=0)) * (labels - labels.mean(dim=0))).mean(dim=0)
    spread = predicted.var(dim=0, unbiased=False) + labels.var(dim=0, unbiased=False)
    bias = (predicted.mean(dim=0) - labels.mean(dim=0)).square()
    return (2 * covariance / (spread + bias + 1e-6)).mean()


def parameter_groups(network: nn.Module, layers: dict[str, int], config: VitConfig) -> list[dict[str, Any]]:
    """One group per layer and kind: `scale` is layer_decay ** (layers above); biases, norms and embeddings do not decay.

    Source: Clark et al. 2020 (ELECTRA), layer-wise learning rates, as used by BEiT and MAE.
    """
    undecayed = set(network.no_weight_decay()) if hasattr(network, "no_weight_decay") else set()  # type: ignore[operator]
    top = max(layers.values())
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        decays = parameter.ndim > 1 and name not in undecayed
        group = groups.setdefault(
            (layers[name], decays),
            {
                "params": [],
                "scale": config.layer_decay ** (top - layers[name]),
                "weight_decay": config.weight_decay if decays else 0.0,
                "lr": config.learning_rate,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def thaw(network: nn.Module, layers: dict[str, int], config: VitConfig, epoch: float) -> None:
    """Let learn what is due at this (fractional) epoch: first the head with the last norm, then block after block from the top.

    Frozen weights get no gradient, so the optimizer leaves them and its state of the others alone.
    """
    top = max(layers.values())
    if epoch < config.frozen_epochs:
        lowest = top
    elif epoch < config.frozen_epochs + config.unfreeze_epochs:
        lowest = top - 1 - int((epoch - config.frozen_epochs) / config.unfreeze_epochs * top)
    else:
        lowest = 0
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(layers[name] >= lowest)


def _backward(
    network: nn.Module,
    noise: BatchNoise,
    clips: Tensor,
    labels: Tensor,
    preprocessing: Preprocessing,
    parts: Sequence[slice],
    objective: Callable[[Tensor, Tensor], Tensor],
    device: Device,
    scaler: torch.amp.GradScaler,
    seed: int,
    step: int,
) -> Tensor:
    """Add the gradient of the objective over the whole effective batch and return its value.

    A concordance is no mean over samples. So where the batch does not fit at once, all predictions are made first without
    a graph, the objective's gradient with respect to them is taken, and each part is sent through once more to carry its
    share back. The noise of a sample is the same both times. parts: the micro-batches.
    """
    batch = len(clips)

    def forward(rows: slice) -> Tensor:
        noise.at(derive(seed, "vit", "noise", step), batch, rows)
        with device.autocast():
            predicted: Tensor = network(network_input(clips[rows], preprocessing))
        return predicted.float()

    if len(parts) == 1:
        loss = objective(forward(slice(0, batch)), labels)
        scaler.scale(loss).backward()
        return loss.detach()
    with torch.no_grad():
        predicted = torch.cat([forward(rows) for rows in parts])
    predicted.requires_grad_()
    loss = objective(predicted, labels)
    (gradient,) = torch.autograd.grad(scaler.scale(loss), predicted)
    for rows in parts:
        forward(rows).backward(gradient[rows])
    return loss.detach()


def predicted_memory(config: VitConfig, mel: MelConfig, device: Device, micro: int) -> Account:
    """What a step with all layers that ever learn takes at its peak, with this micro-batch; nothing is computed."""
    preprocessing = preprocessing_for(config, mel, no_normalisation(mel))
    scaler = LossScaler(device.device.type, enabled=False)
    batch = min(config.batch_size, MOST_PARTS * micro)
    network = shape_of_network(config, preprocessing)
    noise = install_noise(network)
    thaw(network.train(), layer_numbers(network), config, config.epochs)
    with without_memory():
        network.to_empty(device=device.device)
        clips = torch.empty(config.batch_size, 1, mel.mels, preprocessing.frames, device=device.device)
        labels = torch.empty(config.batch_size, 2, device=device.device)
        objective = objective_of(config, torch.empty(2, device=device.device))
        with TensorBytes(
            device.device,
            lambda: {"parameters": weights_of(network), "gradients": gradients_of(network)},
            (clips, labels),
        ) as counted:
            parts = parts_of(batch, micro)
            _backward(
                network, noise, clips[:batch], labels[:batch], preprocessing, parts, objective, device, scaler, 0, 0
            )
    return with_adam_and_ema(counted.account, (network,), network)


def _concordances(
    network: nn.Module,
    preprocessing: Preprocessing,
    device: Device,
    features: Features,
    should_stop: Callable[[], bool],
) -> tuple[float, float]:
    """CCC of valence and of arousal over whole songs. Raises Interrupted when asked to stop."""
    rows = []
    for index in range(len(features.songs)):
        if should_stop():
            raise Interrupted(f"vit: stopped after {index} of {len(features.songs)} songs of a validation")
        rows.append(predict_song(network, preprocessing, device, features.song(index)))
    predicted = np.stack(rows)
    actual = features.labels
    return concordance(predicted[:, 0], actual[:, 0]), concordance(predicted[:, 1], actual[:, 1])
