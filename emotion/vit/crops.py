"""From whole songs to predictions: crops of many songs, in forward passes of one size.

`predict_songs` is the one path: validation, evaluation and the command `predict` all use it. Its passes, `predict_crops`, are
also those of a curve over time (emotion/vit/curve.py).
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from emotion.audio.clips import normalised, some_of, spread_starts
from emotion.audio.feature_store import cut_clip
from emotion.training.device import Device
from emotion.vit.network import Array, Preprocessing, network_input

SongLogMel = npt.NDArray[np.floating[Any]]


def crops_per_forward(preprocessing: Preprocessing, device: Device) -> int:
    """How many crops go through the network at once.

    On a CPU so few that a pass of a ViT-B takes about a second and that one song, in fp32, wastes at most one crop: products of
    400 rows are as fast as larger ones. In bf16 each pass first converts all weights, so more crops share it. On a GPU so many
    that launching takes no longer than computing.
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
    """[songs, 2] valence and arousal in [-1, 1]: `mean_over_crops` of the network's outputs. crops, per_forward, check_stop: see
    there."""
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

    songs: [frames, mels] in dB each, of any length and all of one type; only their crops are read. crops: at most so many of a
    song's, fewer than `max_crops`. per_forward, check_stop: see `predict_crops`.
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
    """[crops, outputs], as the network gives them. pending: the song of each crop, and its first frame; at least one.

    per_forward: instead of `crops_per_forward`. check_stop: called before each forward pass; its exceptions pass through.

    All forward passes have one shape, the last one filled with copies of a crop. So a song gets the same numbers whatever songs
    are beside it: the order of the sums in a matrix product depends on its shape (see also `RowwiseHead`). The results are
    fetched once, at the end.
    """
    size = per_forward or crops_per_forward(preprocessing, device)
    block = np.empty((size, preprocessing.frames, preprocessing.mel.mels), pending[0][0].dtype)
    mean_db, sd_db = (
        device.send(torch.from_numpy(constant))
        for constant in (preprocessing.normalisation.mean_db, preprocessing.normalisation.sd_db)
    )
    outputs = []
    for first in range(0, len(pending), size):
        check_stop()
        chosen = pending[first : first + size]
        for row in range(size):
            song, start = chosen[min(row, len(chosen) - 1)]
            block[row] = cut_clip(song, start, preprocessing.frames)
        clips = normalised(device.send(torch.from_numpy(block)), mean_db, sd_db)
        with device.autocast():
            outputs.append(network(network_input(clips, preprocessing)).float())
    predicted: Array = torch.cat(outputs).cpu().numpy()[: len(pending)]
    return predicted
