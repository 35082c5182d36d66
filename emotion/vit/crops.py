"""Predict whole songs from crops, in forward passes of one fixed size.

Evaluation and the command `predict` use `predict_songs`, validation `mean_over_crops`. All of them, and curves over time
(emotion/vit/curve.py), run `predict_crops`.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from emotion.audio.clips import normalised, some_of, spread_starts
from emotion.audio.feature_store import cut_clip
from emotion.progress_bar import LINE_SECONDS
from emotion.terminal import shown_for_now
from emotion.training.device import Device
from emotion.vit.network import Array, Preprocessing, network_input

SongLogMel = npt.NDArray[np.floating[Any]]

log = logging.getLogger(__name__)


def crops_per_forward(preprocessing: Preprocessing, device: Device) -> int:
    """Number of crops per forward pass.

    On a CPU few, so that a pass of a ViT-B takes about a second and padding wastes at most one crop of a song in fp32: matrix
    products of 400 rows are as fast as larger ones. More in bf16, where each pass first converts all weights. On a GPU enough
    that launching the kernels takes no longer than computing.
    """
    if device.device.type == "cuda":
        pixels, most = 2**23, 128
    else:
        pixels, most = 2**17 if device.precision == "fp32" else 2**19, 8
    rows, columns = preprocessing.input_size
    return max(1, min(most, pixels // (rows * columns)))


def predict_songs(
    network: nn.Module,
    preprocessing: Preprocessing,
    device: Device,
    songs: Sequence[SongLogMel],
    *,
    check_stop: Callable[[], None] = lambda: None,
    crops: int | None = None,
    per_forward: int | None = None,
) -> Array:
    """[songs, 2] valence and arousal: `mean_over_crops` of the network's outputs, clipped to [-1, 1]. Same arguments."""
    means = mean_over_crops(network, preprocessing, device, songs, check_stop=check_stop, crops=crops, per_forward=per_forward)
    return means.clip(-1, 1)


def mean_over_crops(
    network: Callable[[Tensor], Tensor],
    preprocessing: Preprocessing,
    device: Device,
    songs: Sequence[SongLogMel],
    *,
    check_stop: Callable[[], None] = lambda: None,
    crops: int | None = None,
    per_forward: int | None = None,
) -> Array:
    """[songs, outputs]: the mean of the network's outputs over crops that are spread over the whole song.

    songs: [frames, mels] in dB each, of any length and all of one type; only their crops are read. crops: largest number of
    crops per song, if below `max_crops`. per_forward, check_stop: see `predict_crops`.
    """
    starts = [spread_starts(len(song), preprocessing.frames, preprocessing.max_crops) for song in songs]
    if crops is not None:
        starts = [some_of(found, crops) for found in starts]
    pending = [(song, start) for song, found in zip(songs, starts, strict=True) for start in found]
    predicted = predict_crops(network, preprocessing, device, pending, check_stop=check_stop, per_forward=per_forward)
    ends = np.cumsum([len(found) for found in starts])
    return np.stack([of_song.mean(axis=0) for of_song in np.split(predicted, ends[:-1])])


@torch.no_grad()
def predict_crops(
    network: Callable[[Tensor], Tensor],
    preprocessing: Preprocessing,
    device: Device,
    pending: Sequence[tuple[SongLogMel, int]],
    *,
    check_stop: Callable[[], None] = lambda: None,
    per_forward: int | None = None,
) -> Array:
    """[crops, outputs] of the network. pending: the song and the first frame of each crop; at least one.

    per_forward: overrides `crops_per_forward`. check_stop: called before each forward pass; its exceptions propagate.

    All forward passes have the same shape; the last one is padded with copies of a crop. So the result for a song does not depend
    on the other songs: the order of summation in a matrix product depends on its shape (see also `RowwiseHead`). Results are
    copied to the host once, at the end. Every LINE_SECONDS a log line has the number of crops so far.
    """
    size = per_forward or crops_per_forward(preprocessing, device)
    block = np.empty((size, preprocessing.frames, preprocessing.mel.mels), pending[0][0].dtype)
    mean_db, sd_db = (
        device.send(torch.from_numpy(constant))
        for constant in (preprocessing.normalisation.mean_db, preprocessing.normalisation.sd_db)
    )
    outputs = []
    logged_at = time.monotonic()
    for first in range(0, len(pending), size):
        check_stop()
        if first > 0 and time.monotonic() - logged_at >= LINE_SECONDS:
            logged_at = time.monotonic()
            shown = shown_for_now(f"ViT: {first} of {len(pending)} crops")
            log.info("vit crops=%d/%d", first, len(pending), extra=shown)
        chosen = pending[first : first + size]
        for row in range(size):
            song, start = chosen[min(row, len(chosen) - 1)]
            block[row] = cut_clip(song, start, preprocessing.frames)
        clips = normalised(device.send(torch.from_numpy(block)), mean_db, sd_db)
        with device.autocast():
            outputs.append(network(network_input(clips, preprocessing)).float())
    predicted: Array = torch.cat(outputs).cpu().numpy()[: len(pending)]
    return predicted
