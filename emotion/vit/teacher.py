"""A teacher: song embeddings from a file, which the ViT learns to predict as an auxiliary task.

`vit.teacher` names a file of embeddings from any source, such as a network trained on far more music. Two formats:

    .npz            names [rows], the ids of songs as in `songs.csv`; embedding [rows, dimensions]; and, if a song has several
                    rows, seconds [rows]: the middle of the part of the song that a row describes
    .safetensors    a tensor for each song, by its id: [dimensions], or [parts, dimensions] for parts of equal length

The target of a clip is the mean of its song's rows whose middles lie in the clip, or the nearest row if there is none. Targets
are standardised with mean and standard deviation over the training songs, each song with the same weight, and clipped to
-CLIP..CLIP.

A second linear head predicts the targets (`Pupil`). It is trained with the ViT and not published in `model/`. Synthetic clips
have no embedding, so only the loss of the labels applies to them and to clips mixed with them.

Source: feature regression as in Romero et al. 2015 (FitNets), eq. 3, with a linear regressor.
"""

import errno
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

from emotion.audio.clips import Array
from emotion.audio.feature_store import SongFeatures
from emotion.config import MelConfig, VitConfig
from emotion.errors import DataError, StorageError, first_of
from emotion.training.seeding import derive
from emotion.training.weight_files import DECODING_ERRORS
from emotion.vit.network import pooled

KEY = "vit.teacher"
CLIP = 3.0  # standard deviations; network features have large outliers
TO_DO = "Save names and embedding with numpy.savez, or one tensor for each song with safetensors."
LABELS = 2

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SongRows:
    """The embeddings of one song. rows: [parts, dimensions]; seconds: [parts], ascending; None for parts of equal length."""

    rows: Array
    seconds: npt.NDArray[np.float64] | None


def read_teacher(path: Path) -> dict[str, SongRows]:
    """Song id, as text → its embeddings, all of one dimension and finite.

    Raises DataError for a file in neither format, StorageError if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(16)
        songs = _read_npz(path) if head.startswith(b"PK") else _read_safetensors(path)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise DataError(f"{KEY}: {path}: {error.strerror}. Name a .npz or .safetensors file of embeddings.") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # seeking before the start of a damaged archive
            raise StorageError.of(error, f"{KEY}: {path} cannot be read: {error.strerror or error}") from error
        raise _unreadable(path, error) from error
    except (*DECODING_ERRORS, SyntaxError, tokenize.TokenError) as error:
        raise _unreadable(path, error) from error
    dimensions = {song.rows.shape[1] for song in songs.values()}
    if len(dimensions) != 1:
        raise DataError(
            f"{KEY}: {path} has embeddings of {first_of(sorted(dimensions)) or 'no'} dimensions, expected one number."
        )
    bad = [name for name, song in songs.items() if not np.isfinite(song.rows).all()]
    if bad:
        raise DataError(f"{KEY}: {path} has NaN or infinity in the embeddings of {first_of(bad)}.")
    return songs


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return DataError(f"{KEY}: {path} is not readable as a .npz or .safetensors file of embeddings ({reason}). {TO_DO}")


def _read_npz(path: Path) -> dict[str, SongRows]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        missing = {"names", "embedding"} - set(archive.files)
        if missing:
            raise DataError(f"{KEY}: {path} has {first_of(archive.files)}, but no {' and no '.join(sorted(missing))}. {TO_DO}")
        if archive["names"].dtype.kind != "U":
            raise DataError(f"{KEY}: {path}: expected names as text, found {archive['names'].dtype}. {TO_DO}")
        names = archive["names"].ravel().tolist()
        embedding = archive["embedding"]
        seconds = archive["seconds"].astype(np.float64) if "seconds" in archive.files else None
    shape = list(embedding.shape)
    if embedding.ndim != 2 or embedding.shape[1] == 0 or embedding.dtype.kind != "f" or len(names) != len(embedding):
        raise DataError(
            f"{KEY}: {path}: expected embedding [{len(names)}, dimensions] of floats, found {shape} {embedding.dtype}."
        )
    if seconds is not None and (seconds.shape != (len(names),) or not np.isfinite(seconds).all()):
        raise DataError(f"{KEY}: {path}: expected seconds [{len(names)}], finite, found {list(seconds.shape)}.")
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(name, []).append(place)
    twice = [name for name, found in places.items() if len(found) > 1]
    if twice and seconds is None:
        raise DataError(f"{KEY}: {path} names {first_of(twice)} more than once. Add seconds, the middle of the part of each row.")
    songs = {}
    for name, found in places.items():
        order = np.array(found)
        if seconds is not None:
            order = order[np.argsort(seconds[order], kind="stable")]
        songs[name] = SongRows(embedding[order].astype(np.float32), None if seconds is None else seconds[order])
    return songs


def _read_safetensors(path: Path) -> dict[str, SongRows]:
    songs = {}
    for name, tensor in sorted(load_file(path).items()):
        if tensor.ndim not in (1, 2) or tensor.size == 0 or tensor.dtype.kind != "f":
            raise DataError(
                f"{KEY}: {path}: {name} is {list(tensor.shape)} {tensor.dtype}, expected floats, [dimensions] or "
                f"[parts, dimensions]."
            )
        songs[name] = SongRows(np.atleast_2d(tensor).astype(np.float32), None)
    return songs


def dimensions_of(config: VitConfig) -> int | None:
    """Dimension of the embeddings in the file `config.teacher`; None without a teacher."""
    if config.teacher is None:
        return None
    return len(next(iter(read_teacher(Path(config.teacher)).values())).rows[0])


class Teacher:
    """Target embeddings of clips of the training songs.

    songs: the training songs. frames: length of a clip. Raises DataError if a song has no embedding.
    """

    def __init__(self, embeddings: dict[str, SongRows], songs: Sequence[SongFeatures], mel: MelConfig, frames: int) -> None:
        require_songs(embeddings, songs)
        self._frames = frames
        self._lengths = [song.frames for song in songs]
        found = [embeddings[str(song.song_id)] for song in songs]
        self._middles = [_middles(song, length, mel) for song, length in zip(found, self._lengths, strict=True)]
        means = np.stack([song.rows.mean(axis=0, dtype=np.float64) for song in found])
        squares = np.stack([np.square(song.rows, dtype=np.float64).mean(axis=0) for song in found])
        mean = means.mean(axis=0)
        sd = np.sqrt((squares.mean(axis=0) - mean**2).clip(0))
        # The deviation of a constant dimension is only rounding error.
        scale = np.where(sd > 1e-6 * np.abs(mean), sd, np.inf)
        self._rows = [np.clip((song.rows - mean) / scale, -CLIP, CLIP).astype(np.float32) for song in found]
        self.dimensions = len(mean)

    def beside(self, labels: Array, songs: Integers, starts: Integers) -> Array:
        """[batch, 2 + dimensions + 1]: labels [batch, 2], target embeddings, and 1 if the embedding is known, else 0.

        songs, starts: song index and first frame of the real clips, which come first in the batch; other clips get zeros.
        """
        targets = np.zeros((len(labels), LABELS + self.dimensions + 1), np.float32)
        targets[:, :LABELS] = labels
        for target, song, start in zip(targets, songs.tolist(), starts.tolist(), strict=False):
            target[LABELS:-1] = self._of_clip(song, start)
            target[-1] = 1
        return targets

    def _of_clip(self, song: int, start: int) -> Array:
        """[dimensions], standardised."""
        rows, middles = self._rows[song], self._middles[song]
        if len(rows) == 1:
            return np.asarray(rows[0])
        if self._lengths[song] <= self._frames:  # all of it is in the clip
            return np.asarray(rows.mean(axis=0))
        first, last = np.searchsorted(middles, (start, start + self._frames))
        if first == last:
            nearest = np.abs(middles - (start + self._frames / 2)).argmin()
            return np.asarray(rows[nearest])
        return np.asarray(rows[first:last].mean(axis=0))


def _middles(song: SongRows, frames: int, mel: MelConfig) -> npt.NDArray[np.float64]:
    """[parts] the middle of each part, in frames of the song."""
    if song.seconds is not None:
        return np.asarray(song.seconds * (mel.sample_rate_hz / mel.hop_samples))
    return np.asarray((np.arange(len(song.rows)) + 0.5) * (frames / len(song.rows)))


def require_songs(embeddings: dict[str, SongRows], songs: Sequence[SongFeatures]) -> None:
    """Raise DataError for training songs that have no embedding."""
    missing = [song.song_id for song in songs if str(song.song_id) not in embeddings]
    if missing:
        raise DataError(
            f"{KEY}: {len(missing)} of {len(songs)} training songs have no embedding: {first_of(missing)}. The file names "
            f"{first_of(list(embeddings))}. Compute the others, or leave out {KEY}."
        )


class Pupil(nn.Module):
    """A network with a second linear head, which predicts a teacher's embedding.

    The seed determines the initial weights of `regressor`. `network` is unchanged, so that it can be published without the
    teacher.
    """

    def __init__(self, network: nn.Module, dimensions: int, seed: int) -> None:
        super().__init__()
        self.network = network
        head: nn.Linear = network.get_classifier()  # type: ignore[operator]
        torch.manual_seed(derive(seed, "vit", "teacher"))
        self.regressor = nn.Linear(head.in_features, dimensions)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 2 + dimensions]: the predicted labels and the predicted embedding."""
        features = pooled(self.network, x)
        return torch.cat([self.network.get_classifier()(features), self.regressor(features)], dim=1)  # type: ignore[operator]


def embedding_loss(predicted: Tensor, embedding: Tensor, known: Tensor) -> Tensor:
    """Mean squared error of standardised embeddings, [batch, dimensions] each, over the clips with known [batch] = 1.

    About 1 for predicting the mean of the training songs; 0 if no embedding is known."""
    errors = (predicted - embedding).square().mean(dim=1)
    return (errors * known).sum() / known.sum().clamp(min=1)
