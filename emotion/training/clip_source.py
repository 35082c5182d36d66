"""Random training clips: positions are drawn on the host, clips are built on the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from emotion.audio.clips import Array, Normalisation, normalised
from emotion.audio.feature_store import Features
from emotion.training.device import Device
from emotion.training.seeding import batch_indices, crop_starts
from emotion.training.step_records import Numbers, Record

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Stream:
    """Songs, of which each step draws `count` clips. name: of the random numbers."""

    name: str
    songs: Features
    count: int


class ClipSource:
    """Source of the clips of a training.

        source = ClipSource([Stream("gan", training, 48)], frames, normalisation, device, on_device=…)
        numbers, labels = source.draw(seed, step)
        clips = source.clips(record)  # of these numbers, sent to the device

    on_device: copy all songs to the device now, as float16; a step then sends only the positions of its clips. Otherwise songs
    stay in the mapped file, and a step sends its clips as float16. Both ways give identical clips.
    """

    def __init__(
        self, streams: Sequence[Stream], frames: int, normalisation: Normalisation, device: Device, *, on_device: bool
    ) -> None:
        self._streams, self._frames = streams, frames
        constants = (normalisation.mean_db, normalisation.sd_db)
        self._mean_db, self._sd_db = (device.send(torch.from_numpy(constant)) for constant in constants)
        self._lengths = [np.array([song.frames for song in stream.songs.songs]) for stream in streams]
        self.resident: list[Tensor] = []
        """The songs on the device, one after another, [all frames, mels] in float16; empty where they stay in the file."""
        if on_device:
            self.resident = [_copied([stream.songs for stream in streams], device.device)]
            lengths = np.concatenate(self._lengths)
            counts = [len(stream.songs.songs) for stream in streams]
            self._firsts = np.split(np.cumsum(lengths) - lengths, np.cumsum(counts)[:-1])
            self._positions = torch.arange(frames, dtype=torch.int32, device=device.device)

    def draw(self, seed: int, step: int) -> tuple[Numbers, Array]:
        """The arrays for `clips`, and the labels [batch, 2]. They depend on (seed, stream, step) only."""
        songs, starts = self.places(seed, step)
        return self.numbers(songs, starts), self.labels(songs)

    def places(self, seed: int, step: int) -> tuple[list[Integers], list[Integers]]:
        """Where the clips of a step are: of each stream, indices of songs and first frames."""
        songs, starts = [], []
        for stream, lengths in zip(self._streams, self._lengths, strict=True):
            chosen = batch_indices(seed, stream.name, step, stream.count, len(lengths))
            songs.append(chosen)
            starts.append(crop_starts(seed, stream.name, step, lengths[chosen], self._frames))
        return songs, starts

    def labels(self, songs: Sequence[Integers]) -> Array:
        """[batch, 2] of the songs of clips."""
        return np.concatenate([stream.songs.labels[chosen] for stream, chosen in zip(self._streams, songs, strict=True)])

    def numbers(self, songs: Sequence[Integers], starts: Sequence[Integers]) -> Numbers:
        """The arrays for `clips`. songs, starts: for each stream, song indices and first frames of the clips."""
        if self.resident:
            firsts = [firsts[chosen] for firsts, chosen in zip(self._firsts, songs, strict=True)]
            lengths = [lengths[chosen] for lengths, chosen in zip(self._lengths, songs, strict=True)]
            return {"places": np.stack([np.concatenate(parts) for parts in (firsts, lengths, starts)]).astype(np.int32)}
        mels = len(self._mean_db)
        stored = np.empty((sum(map(len, songs)), self._frames, mels), np.float16)
        rows = iter(stored)
        for stream, chosen, begins in zip(self._streams, songs, starts, strict=True):
            for song, start in zip(chosen, begins, strict=True):
                next(rows)[...] = stream.songs.stored_clip(int(song), int(start), self._frames)
        return {"stored": stored}

    def clips(self, record: Record) -> Tensor:
        """[batch, 1, mels, frames] normalised, on the device."""
        if not self.resident:
            return normalised(record["stored"], self._mean_db, self._sd_db)
        (songs,) = self.resident
        first, length, start = record["places"].unsqueeze(2)
        rows = first + (start + self._positions) % length  # as `cut_clip`: a shorter song is repeated
        stored = songs.index_select(0, rows.flatten()).view(*rows.shape, -1)
        return normalised(stored, self._mean_db, self._sd_db)


def _copied(stores: Sequence[Features], device: torch.device) -> Tensor:
    """[all frames, mels]: the songs of all stores on a device, one after another; no second copy of them on the host."""
    frames = sum(song.frames for store in stores for song in store.songs)
    songs = torch.empty(frames, stores[0].mel.mels, dtype=torch.float16, device=device)
    first = 0
    for store in stores:
        for index in range(len(store.songs)):
            stored = np.array(store.stored(index))
            songs[first : first + len(stored)] = torch.from_numpy(stored)
            first += len(stored)
    return songs
