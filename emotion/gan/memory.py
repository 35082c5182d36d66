"""Predict the peak memory of the GAN's training with fake tensors, without any computation."""

import functools

import torch

from emotion.audio.partition import Partition
from emotion.config import GanConfig, MelConfig
from emotion.gan.losses import Batch, Terms, discriminator_backward, generator_backward
from emotion.gan.networks import Discriminator, Generator
from emotion.training.device import Device, LossScaler
from emotion.training.memory_account import MemoryAccount, MemoryRecorder, add_adam_and_ema, fake_tensors, persistent_tensors
from emotion.training.memory_backoff import PREDICTED_PARTS, MemoryBackoff, micro_batches


def gan_backoff(partition: Partition, config: GanConfig, device: Device) -> MemoryBackoff:
    training = partition.training
    return MemoryBackoff(
        "gan",
        config,
        device,
        predict=lambda micro: predicted_memory(config, training.mel, device, micro),
        host_bytes=lambda step: step["parameters"] + step["optimizer"] + step["averages"] + training.nbytes,
        features_bytes=training.nbytes,
        settings="gan.width, gan.clip_seconds or gan.batch_size",
    )


@functools.cache
def predicted_memory(config: GanConfig, mel: MelConfig, device: Device, micro: int) -> MemoryAccount:
    """Peak memory of a step with gradient penalties. micro: size of the micro-batch."""
    frames, scaler = Generator.whole(mel.frames(config.clip_seconds)), LossScaler(device.device.type, enabled=False)
    parts = micro_batches(config.batch_size, micro)[:PREDICTED_PARTS]
    with torch.device("meta"):
        G, D = Generator(mel.mels, config.latent, config.width), Discriminator(mel.mels, config.width)
    with fake_tensors():
        for network in (G, D):
            network.to_empty(device=device.device)
        for parameter in G.parameters():
            parameter.grad = torch.empty_like(parameter)  # as the previous step leaves it
        clips = torch.empty(config.batch_size, 1, mel.mels, frames, device=device.device)
        labels = torch.empty(config.batch_size, 2, device=device.device)
        columns = 1 + Generator.columns(frames)
        noise = torch.empty(2, config.batch_size, config.latent, columns, device=device.device)
        batch, persistent = Batch(clips, labels, noise), functools.partial(persistent_tensors, (G, D))
        terms = Terms(penalty=config.penalty_weight, matching=config.matching_weight)
        with MemoryRecorder(device.device, persistent, (clips, labels, noise)) as recorder:
            discriminator_backward(G, D, batch, parts, terms=terms, device=device, scaler=scaler)
            generator_backward(G, D, batch, parts, terms=terms, device=device, scaler=scaler)
        D.requires_grad_(True)
    return add_adam_and_ema(recorder.account, (G, D), G)
