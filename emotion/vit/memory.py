"""Predict the peak memory of the ViT's training with fake tensors, without any computation."""

import functools

import torch

from emotion.audio.feature_store import Features
from emotion.audio.partition import Partition
from emotion.config import MelConfig, VitConfig
from emotion.training.device import Device, LossScaler
from emotion.training.memory_account import MemoryAccount, MemoryRecorder, add_adam_and_ema, fake_tensors, persistent_tensors
from emotion.training.memory_backoff import PREDICTED_PARTS, MemoryBackoff, micro_batches
from emotion.vit.layers import install_noise, layer_numbers, recompute, unfreeze
from emotion.vit.network import identity_normalisation, network_on_meta, preprocessing_for
from emotion.vit.objective import Objective, backward, loss_function
from emotion.vit.teacher import LABELS, Pupil, dimensions_of


def vit_backoff(partition: Partition, synthetic: Features, config: VitConfig, device: Device) -> MemoryBackoff:
    learnt_from = partition.training.nbytes + synthetic.nbytes * (config.synthetic_per_batch > 0)
    mapped = learnt_from + partition.validation.nbytes
    dimensions = dimensions_of(config)
    # The host holds the best weights twice (the second copy for a checkpoint), and so those of a rival.
    averages = 5 if config.synthetic == "auto" else 3
    return MemoryBackoff(
        "vit",
        config,
        device,
        predict=lambda micro: predicted_memory(config, partition.training.mel, device, micro, dimensions),
        host_bytes=lambda step: step["parameters"] + step["optimizer"] + averages * step["averages"] + mapped,
        features_bytes=learnt_from,
        settings="vit.clip_seconds or vit.image_size, choose a smaller vit.model",
    )


@functools.cache
def predicted_memory(
    config: VitConfig, mel: MelConfig, device: Device, micro: int, dimensions: int | None = None
) -> MemoryAccount:
    """Peak memory of a step with all layers unfrozen. micro: size of the micro-batch. dimensions: of the teacher's embeddings."""
    preprocessing = preprocessing_for(config, mel, identity_normalisation(mel))
    scaler = LossScaler(device.device.type, enabled=False)
    batch = min(config.batch_size, PREDICTED_PARTS * micro)
    if dimensions is None:  # the teacher's file is not available yet; its memory is small
        config = config.model_copy(update={"teacher": None})
    network = learning = network_on_meta(config, preprocessing)
    noise = install_noise(network)
    recompute(network, config.recomputed_blocks)
    unfreeze(network.train(), layer_numbers(network), lowest=0)
    if dimensions is not None:
        with torch.device("meta"):  # a layer created from fake tensors cannot always be moved
            learning = Pupil(network, dimensions, seed=0)
    with fake_tensors():
        learning.to_empty(device=device.device)
        clips = torch.empty(config.batch_size, 1, mel.mels, preprocessing.frames, device=device.device)
        labels = torch.empty(config.batch_size, LABELS if dimensions is None else LABELS + dimensions + 1, device=device.device)
        loss = loss_function(config, torch.empty(2, device=device.device))
        objective = Objective(learning, noise, preprocessing, loss, device)
        persistent = functools.partial(persistent_tensors, (learning,))
        with MemoryRecorder(device.device, persistent, (clips, labels)) as recorder:
            parts = micro_batches(batch, micro)
            noise.draw(0, batch, device)
            backward(objective, clips[:batch], labels[:batch], parts, scaler=scaler)
    return add_adam_and_ema(recorder.account, (learning,), network)
