"""The feature store: one array of log-mels beside a table of songs.

A folder of features, of real songs or of synthetic clips alike, holds

    features.f16   little-endian float16 [total frames, mels]: log-mels in dB, one song after another
    songs.csv      a row per song: where its frames lie, its labels on -1..1, SDs over raters, its group
    mel.json       how the log-mels were made, and the total number of frames

and, to go on from, .songs.jsonl, beside .features.f16.part as long as the array is not whole.
"""

import copy
import csv
import hashlib
import io
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from emotion.audio.decoding import Array
from emotion.config import MelConfig
from emotion.data.faults import Fault
from emotion.errors import DataError
from emotion.files import digest_of, read_json, sync, write_csv, write_json

log = logging.getLogger(__name__)

Floating = TypeVar("Floating", np.float16, np.float32)
LARGEST_DB = 1000.0  # more is no sound, but an error
DURABLE_SECONDS = 2.0  # work of so long, and what is under way, is lost when the machine is
JOURNAL_VERSION = 1  # raise it when the lines of the journal change


@dataclass(frozen=True)
class SongFeatures:
    """A row of songs.csv. Labels and their SDs over raters are on -1..1; the SDs of a synthetic clip are 0.

    file_sha256, sound_sha256: what a song is known by, whatever its id: digests of its file and of its decoded samples as 16
    bits. Empty for a synthetic clip.
    """

    song_id: int
    first_frame: int
    frames: int
    valence: float
    arousal: float
    valence_sd: float
    arousal_sd: float
    group: str
    file_sha256: str
    sound_sha256: str


COLUMNS = [field.name for field in fields(SongFeatures)]


class FeatureWriter:
    """Writes a folder of features song by song, and goes on where an attempt before this one was cut off: a context manager.

    The frames grow in `.features.f16.part`, and in `.songs.jsonl` a line tells of each song. Both are made durable every
    DURABLE_SECONDS and on leaving. On entering, lines are taken over as long as their digests, each of which continues that
    of the line before, and the frames they tell of are right; behind these both files are cut. The first digest continues
    that of the version, `mel` and `made_from`, so that nothing written under other ones is taken over.

    features.f16, songs.csv and mel.json appear when the block ends well. The lines stay: an attempt that is killed before the
    phase has its receipt is gone on from, too. A DataError, which another attempt would only meet again, leaves nothing.

    made_from: a JSON value, what decides about the songs besides `mel`.
    songs, faults: what has been written and left out so far, by this attempt or by those before it. shorter: ids of those
    songs that are shorter than their files' headers announce.
    """

    def __init__(self, out: Path, mel: MelConfig, made_from: object = None) -> None:
        self.out, self.mel = out, mel
        self.songs: list[SongFeatures] = []
        self.faults: list[Fault] = []
        self.shorter: list[int] = []
        self._partial, self._whole = out / ".features.f16.part", out / "features.f16"
        self._lines = out / ".songs.jsonl"
        self._frames = 0
        beginning = {"version": JOURNAL_VERSION, "mel": mel.result_fields(), "made_from": made_from}
        self._digest = hashlib.sha256(digest_of(beginning).encode())
        self._untold: list[bytes] = []
        self._durable_at = time.monotonic()

    @property
    def done(self) -> int:
        """Songs written or left out so far."""
        return len(self.songs) + len(self.faults)

    def __enter__(self) -> Self:
        self.out.mkdir(parents=True, exist_ok=True)
        if self._lines.exists() and self._whole.exists():
            self._whole.replace(self._partial)
        # A whole array without lines is removed and not cut: somebody may have it mapped.
        for path in (self.out / "mel.json", self.out / "songs.csv", self._whole):
            path.unlink(missing_ok=True)
        self._partial.touch()
        self._lines.touch()
        sync(self.out)
        # Not for appending: a job that slept while another one took its folder over may write on for a moment when it
        # wakes. Then it writes the same bytes to the same places.
        self._file, self._journal = self._partial.open("r+b"), self._lines.open("r+b")
        self._go_on()
        return self

    def _go_on(self) -> None:
        """Take over what is right of what lies there, and cut off the rest."""
        told = 0
        for line in self._journal:
            digest, _, text = line.partition(b" ")
            continued = self._digest.copy()
            continued.update(text)
            if digest != continued.hexdigest().encode():
                break
            entry = json.loads(text)
            if "song" in entry:
                frames = self._file.read(2 * self.mel.mels * entry["song"]["frames"])
                if hashlib.sha256(frames).hexdigest() != entry["frames_sha256"]:
                    break
            self._digest = continued
            self._take(entry)
            told += len(line)
        for file, size in ((self._journal, told), (self._file, 2 * self.mel.mels * self._frames)):
            file.truncate(size)
            file.seek(size)
        if self.done:
            log.info("%s: goes on behind the %d songs that are done", self.out, self.done)

    def append(
        self,
        song_id: int,
        valence: float,
        arousal: float,
        valence_sd: float,
        arousal_sd: float,
        group: str,
        log_mel: npt.NDArray[np.floating],
        file_sha256: str = "",
        sound_sha256: str = "",
        is_shorter: bool = False,
    ) -> None:
        """log_mel: [frames, mels] dB, kept as float16: to 0.03 dB within 64 dB of 0, to 0.06 dB down to silence.

        Raises DataError for another shape, no frames, and numbers that no sound and no label can have.
        """
        if log_mel.ndim != 2 or log_mel.shape[1] != self.mel.mels or len(log_mel) == 0:
            raise DataError(
                f"song {song_id}: expected a log-mel [frames, {self.mel.mels}], found {list(log_mel.shape)}."
            )
        numbers = (float(valence), float(arousal), float(valence_sd), float(arousal_sd))
        if not (np.abs(log_mel) <= LARGEST_DB).all() or not np.isfinite(numbers).all():
            raise DataError(f"song {song_id}: NaN, infinity or more than {LARGEST_DB:g} dB in its log-mel or labels.")
        frames = log_mel.astype("<f2").tobytes()
        song = SongFeatures(song_id, self._frames, len(log_mel), *numbers, group, file_sha256, sound_sha256)
        self._file.write(frames)
        self._tell(
            {"song": asdict(song), "frames_sha256": hashlib.sha256(frames).hexdigest(), "is_shorter": is_shorter}
        )

    def leave_out(self, fault: Fault) -> None:
        """Instead of a song."""
        self._tell({"fault": asdict(fault)})

    def _tell(self, entry: dict[str, Any]) -> None:
        text = json.dumps(entry).encode() + b"\n"
        self._digest.update(text)
        self._untold.append(self._digest.hexdigest().encode() + b" " + text)
        self._take(entry)
        if time.monotonic() - self._durable_at >= DURABLE_SECONDS:
            self._make_durable()

    def _take(self, entry: dict[str, Any]) -> None:
        if "fault" in entry:
            self.faults.append(Fault(**entry["fault"]))
            return
        song = SongFeatures(**entry["song"])
        self.songs.append(song)
        self.shorter += [song.song_id] if entry["is_shorter"] else []
        self._frames += song.frames

    def _make_durable(self) -> None:
        """The frames first, then the lines that tell of them."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._journal.write(b"".join(self._untold))
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self._untold.clear()
        self._durable_at = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file, self._journal:
            # After an error of the disk nobody knows which frames it has, so that nothing more is told of them.
            if not isinstance(error, OSError | DataError):
                self._make_durable()
        if error is None:
            self._partial.replace(self._whole)
            sync(self.out)
            write_csv(self.out / "songs.csv", COLUMNS, (astuple(song) for song in self.songs))
            write_json(self.out / "mel.json", {"mel": self.mel.result_fields(), "frames": self._frames})
        elif isinstance(error, DataError):
            self._partial.unlink()
            self._lines.unlink()


class Features:
    """A folder of features, read where it lies: the array is mapped, and only what is asked for comes into memory.

    mel: how the log-mels were made. songs: the rows of the table. labels: [songs, 2] = (valence, arousal) on -1..1.
    A position is an index into `songs`.
    Raises DataError where files are missing, torn, or do not fit each other.
    """

    def __init__(self, folder: Path) -> None:
        self.mel, total = _read_mel(folder / "mel.json")
        self.songs = _read_table(folder / "songs.csv")
        self.labels: Array = np.array([(song.valence, song.arousal) for song in self.songs], np.float32)
        self.folder = folder
        told = sum(song.frames for song in self.songs)
        path = folder / "features.f16"
        size, expected = path.stat().st_size if path.exists() else 0, 2 * total * self.mel.mels
        if told != total or size != expected:
            raise DataError(
                f"{folder}: mel.json tells of {total} frames, songs.csv of {told}; for these features.f16 must have "
                f"{expected} bytes and has {size}. Delete the folder to make it again."
            )
        self._frames = np.memmap(path, "<f2", "r", shape=(total, self.mel.mels))

    def only(self, positions: Sequence[int]) -> "Features":
        """The same folder with the songs at these positions and no others: what somebody who may see no more is given."""
        view = copy.copy(self)
        view.songs = [self.songs[position] for position in positions]
        view.labels = self.labels[list(positions)]
        return view

    @property
    def nbytes(self) -> int:
        """Of these songs, as they lie in the file: what of it is mapped into memory once all have been read."""
        return 2 * self.mel.mels * sum(song.frames for song in self.songs)

    def song(self, index: int) -> Array:
        """[all frames, mels] dB of one song."""
        song = self.songs[index]
        return self._frames[song.first_frame : song.first_frame + song.frames].astype(np.float32)

    def clip(self, index: int, start: int, frames: int) -> Array:
        """[frames, mels] dB of one song from frame `start` on, as `cut_clip` cuts it."""
        song = self.songs[index]
        stored = self._frames[song.first_frame : song.first_frame + song.frames]
        return cut_clip(stored, start, frames).astype(np.float32)


def cut_clip(log_mel: npt.NDArray[Floating], start: int, frames: int) -> npt.NDArray[Floating]:
    """[frames, mels] of a song [all frames, mels] from `start` on. One shorter than that is repeated to fill it."""
    if len(log_mel) >= frames:
        assert 0 <= start <= len(log_mel) - frames, f"{start} + {frames} of {len(log_mel)} frames"
        return log_mel[start : start + frames]
    return np.take(log_mel, (start + np.arange(frames)) % len(log_mel), axis=0)


def _read_mel(path: Path) -> tuple[MelConfig, int]:
    try:
        content = read_json(path)
        return MelConfig.model_validate(content["mel"]), int(content["frames"])
    except (FileNotFoundError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path}: not the settings of a folder of features ({error}). Make the folder again."
        ) from error


def _read_table(path: Path) -> list[SongFeatures]:
    songs: list[SongFeatures] = []
    try:
        header, *rows = csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline=""), strict=True)
        if header != COLUMNS:
            raise ValueError(f"expected the columns {','.join(COLUMNS)}")
        for song_id, first_frame, frames, valence, arousal, valence_sd, arousal_sd, group, *digests in rows:
            numbers = (float(valence), float(arousal), float(valence_sd), float(arousal_sd))
            song = SongFeatures(int(song_id), int(first_frame), int(frames), *numbers, group, *digests)
            follows = songs[-1].first_frame + songs[-1].frames if songs else 0
            if song.first_frame != follows or song.frames < 1 or not np.isfinite(numbers).all():
                raise ValueError(f"song {song_id}: expected finite labels and frames from {follows} on, found {song}")
            songs.append(song)
        if not songs:
            raise ValueError("there are no songs in it")
    except (FileNotFoundError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: not the table of a folder of features ({error}). Make the folder again.") from error
    return songs
