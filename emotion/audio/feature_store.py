"""The feature store: one array of log-mels beside a table of songs.

A folder of features, of real songs or of synthetic clips alike, holds

    features.f16   little-endian float16 [total frames, mels]: log-mels in dB, one song after another
    tonality.f32   little-endian float32 [songs, numbers]: the tonality of each song; no numbers for synthetic clips
    songs.csv      a row per song: where its frames are, its labels on -1..1, SDs over raters, its group, its digests
    mel.json       the settings of the log-mels, the number of all frames, that of a song's tonality, and the scale of the ratings
                   if it is not DEAM's
    .songs.jsonl   the writer's journal, for resuming (see FeatureWriter)
"""

import copy
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from emotion.audio.decoding import Array
from emotion.config import MelConfig
from emotion.data.csv_table import read_records, write_records
from emotion.data.faults import Fault
from emotion.data.label_scale import DEAM_SCALE, Scale
from emotion.data.song_ids import SongId
from emotion.data.songs import SongLabels
from emotion.errors import DataError, counted
from emotion.files import digest_of, errors_name, make_folder, read_json, sync, write_bytes, write_json
from emotion.terminal import shown_as

log = logging.getLogger(__name__)

Floating = TypeVar("Floating", bound=np.floating[Any])
LARGEST_DB = 1000.0  # no sound has more
DURABLE_SECONDS = 2.0  # of work that a crash of the machine may cost, beside the songs in progress
FRAMES_PER_BLOCK = 512  # of those who compute in float64: half a megabyte, which stays in the cache of a core
TONALITY = "tonality.f32"
NO_TONALITY = np.zeros(0, np.float32)
JOURNAL_VERSION = 4  # raise it when the format of the journal changes


@dataclass(frozen=True)
class SongFeatures:
    """A row of songs.csv. Labels and their SDs over raters are on -1..1; see SongLabels.

    file_sha256, sound_sha256: of the file and of its decoded samples as 16-bit numbers; empty for a synthetic clip.
    """

    song_id: SongId
    first_frame: int
    frames: int
    valence: float
    arousal: float
    valence_sd: float | None
    arousal_sd: float | None
    group: str
    file_sha256: str
    sound_sha256: str
    raters: int | None = None
    split: str = ""


class FeatureWriter:
    """A context manager that writes a folder of features song by song, and resumes after an interrupted attempt.

    While it runs, frames are appended to `.features.f16.part` and one line per song to the journal, `.songs.jsonl`:

        DIGEST {"song": {…row of songs.csv…}, "frames_sha256": …, "tonality": […], "may_be_cut": …}
        DIGEST {"fault": {…}}                                                       for a song that is left out

    Both are made durable every DURABLE_SECONDS and at the end, frames first. The digests form a chain: each is the SHA-256
    of JOURNAL_VERSION, `mel`, `made_from` and all entries up to its own. To resume, lines are accepted up to the first whose
    digest or whose frames' digest is wrong, by damage or under other settings; the rest of both files is cut off.

    features.f16, tonality.f32, songs.csv and mel.json appear when the block ends without an error. The journal stays, for an
    attempt that is killed before the phase has its receipt. After a DataError, which the next attempt would only repeat, nothing
    is left.

    made_from: a JSON value, everything besides `mel` that decides about the songs. scale: of the ratings behind their labels.
    songs, faults: written and left out so far, by this attempt and earlier ones. may_be_cut: ids of written songs of which a part
    may be missing.
    """

    def __init__(self, out: Path, mel: MelConfig, made_from: object = None, scale: Scale = DEAM_SCALE) -> None:
        self.out, self.mel, self.scale = out, mel, scale
        self.songs: list[SongFeatures] = []
        self.faults: list[Fault] = []
        self.may_be_cut: list[SongId] = []
        self._tonality: list[list[float]] = []
        self._array_path, self._partial_path = out / "features.f16", out / ".features.f16.part"
        self._journal_path = out / ".songs.jsonl"
        beginning = {"version": JOURNAL_VERSION, "mel": mel.result_fields(), "made_from": made_from}
        self._chain = hashlib.sha256(digest_of(beginning).encode())
        self._pending_lines: list[bytes] = []
        self._durable_at = time.monotonic()

    @property
    def done(self) -> int:
        """Songs written or left out so far."""
        return len(self.songs) + len(self.faults)

    @property
    def _total_frames(self) -> int:
        return self.songs[-1].first_frame + self.songs[-1].frames if self.songs else 0

    def __enter__(self) -> Self:
        make_folder(self.out)
        if self._journal_path.exists() and self._array_path.exists():
            self._array_path.replace(self._partial_path)
        # An array without a journal is removed, not truncated: another process may have it mapped.
        for path in (self.out / "mel.json", self.out / "songs.csv", self.out / TONALITY, self._array_path):
            path.unlink(missing_ok=True)
        self._partial_path.touch()
        self._journal_path.touch()
        sync(self.out)
        # Not in append mode: a suspended job whose folder was taken over then writes the same bytes to the same offsets.
        self._array, self._journal = self._partial_path.open("r+b"), self._journal_path.open("r+b")
        self._resume()
        return self

    def _resume(self) -> None:
        """Accept the journal's lines up to the first that is wrong, and cut off the rest of both files."""
        accepted_bytes = 0
        for line in self._journal:
            digest, _, text = line.partition(b" ")
            chain = self._chain.copy()
            chain.update(text)
            if digest != chain.hexdigest().encode():
                break
            entry = json.loads(text)
            if "song" in entry:
                frames = self._array.read(2 * self.mel.mels * entry["song"]["frames"])
                if hashlib.sha256(frames).hexdigest() != entry["frames_sha256"]:
                    break
            self._chain = chain
            self._count(entry)
            accepted_bytes += len(line)
        for file, size in ((self._journal, accepted_bytes), (self._array, 2 * self.mel.mels * self._total_frames)):
            file.truncate(size)
            file.seek(size)
        if self.done:
            shown = shown_as(f"resumes: {counted(self.done, 'song')} done before")
            log.info("%s: resumes, songs_done=%d", self.out, self.done, extra=shown)

    def append(
        self,
        song: SongLabels,
        log_mel: npt.NDArray[np.floating],
        *,
        tonality: npt.NDArray[np.floating] = NO_TONALITY,
        file_sha256: str = "",
        sound_sha256: str = "",
        may_be_cut: bool = False,
    ) -> None:
        """Write a song. log_mel: [frames, mels] dB; float16 keeps it to 0.03 dB within 64 dB of 0, to 0.06 dB below.
        tonality: [numbers], as many for every song.

        Raises DataError for another shape, no frames, and numbers that no sound or label can have.
        """
        if log_mel.ndim != 2 or log_mel.shape[1] != self.mel.mels or len(log_mel) == 0:
            raise DataError(f"song {song.song_id}: expected a log-mel [frames, {self.mel.mels}], found {list(log_mel.shape)}.")
        labels = (float(song.valence), float(song.arousal))
        valence_sd, arousal_sd = (None if sd is None else float(sd) for sd in (song.valence_sd, song.arousal_sd))
        are_numbers = _are_finite(*labels, valence_sd, arousal_sd) and bool(np.isfinite(tonality).all())
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(log_mel, "<f2")
        if not _are_decibels(stored) or not are_numbers:
            found = f"NaN, infinity or more than {LARGEST_DB:g} dB in its log-mel, tonality or labels"
            raise DataError(f"song {song.song_id}: {found}.")
        row = SongFeatures(
            song.song_id,
            self._total_frames,
            len(log_mel),
            *labels,
            valence_sd,
            arousal_sd,
            song.group,
            file_sha256,
            sound_sha256,
            song.raters,
            song.split,
        )
        with errors_name(self._partial_path):
            self._array.write(stored.data)
        frames_sha256 = hashlib.sha256(stored.data).hexdigest()
        numbers = tonality.astype("<f4").tolist()
        self._record({"song": asdict(row), "frames_sha256": frames_sha256, "tonality": numbers, "may_be_cut": may_be_cut})

    def leave_out(self, fault: Fault) -> None:
        """Record that the next song is not written, and why."""
        self._record({"fault": asdict(fault)})

    def _record(self, entry: dict[str, Any]) -> None:
        text = json.dumps(entry).encode() + b"\n"
        self._chain.update(text)
        self._pending_lines.append(self._chain.hexdigest().encode() + b" " + text)
        self._count(entry)
        if time.monotonic() - self._durable_at >= DURABLE_SECONDS:
            self._make_durable()

    def _count(self, entry: dict[str, Any]) -> None:
        if "fault" in entry:
            self.faults.append(Fault(**entry["fault"]))
            return
        self.songs.append(SongFeatures(**entry["song"]))
        self._tonality.append(entry["tonality"])
        if entry["may_be_cut"]:
            self.may_be_cut.append(self.songs[-1].song_id)

    def _make_durable(self) -> None:
        """The frames first, so that no durable line is about frames that are not."""
        with errors_name(self._partial_path):
            self._array.flush()
            os.fsync(self._array.fileno())
        with errors_name(self._journal_path):
            self._journal.write(b"".join(self._pending_lines))
            self._journal.flush()
            os.fsync(self._journal.fileno())
        self._pending_lines.clear()
        self._durable_at = time.monotonic()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # After an error, closing tries once more to write what is buffered, and the second failure hides the first.
        with errors_name(self._partial_path), self._array, errors_name(self._journal_path), self._journal:
            # After a disk error it is unknown which frames are on the disk, so no more lines are written about them.
            if not isinstance(error, OSError | DataError):
                self._make_durable()
        if error is None:
            self._partial_path.replace(self._array_path)
            sync(self.out)
            write_bytes(self.out / TONALITY, np.array(self._tonality, "<f4").tobytes())
            write_records(self.out / "songs.csv", SongFeatures, self.songs)
            scale = {} if self.scale == DEAM_SCALE else {"scale": [*self.scale]}
            numbers = len(self._tonality[0]) if self._tonality else 0
            totals = {"frames": self._total_frames, "tonality": numbers}
            write_json(self.out / "mel.json", {"mel": self.mel.result_fields(), **totals, **scale})
        elif isinstance(error, DataError):
            self._partial_path.unlink()
            self._journal_path.unlink()


class Features:
    """A folder of features, memory-mapped: only what is read comes into memory.

    songs: the rows of the table; an index is a position in it. labels: [songs, 2] = (valence, arousal) on -1..1. scale: of the
    ratings behind them. tonality: [songs, numbers], see `emotion/audio/tonality.py`.
    Raises DataError if files are missing, damaged, or do not fit each other.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mel, total_frames, numbers, self.scale = _read_mel(folder / "mel.json")
        self.songs = _read_table(folder / "songs.csv")
        self.labels: Array = np.array([(song.valence, song.arousal) for song in self.songs], np.float32)
        frames_of_songs = sum(song.frames for song in self.songs)
        path = folder / "features.f16"
        size, expected = path.stat().st_size if path.exists() else 0, 2 * total_frames * self.mel.mels
        if frames_of_songs != total_frames or size != expected:
            raise DataError(
                f"{folder}: mel.json has {total_frames} frames, songs.csv {frames_of_songs}; for these features.f16 must "
                f"have {expected} bytes and has {size}. Delete the folder to create it again."
            )
        self.tonality = _read_tonality(folder / TONALITY, len(self.songs), numbers)
        with errors_name(path):
            self._frames = np.memmap(path, "<f2", "r", shape=(total_frames, self.mel.mels))

    def only(self, indices: Sequence[int]) -> "Features":
        """A view of the same folder that has only the songs at these indices, in this order."""
        view = copy.copy(self)
        view.songs = [self.songs[index] for index in indices]
        view.labels, view.tonality = self.labels[list(indices)], self.tonality[list(indices)]
        return view

    @property
    def nbytes(self) -> int:
        """Size of these songs in the file: what is mapped into memory once all have been read."""
        return 2 * self.mel.mels * sum(song.frames for song in self.songs)

    def stored(self, index: int) -> npt.NDArray[np.float16]:
        """[all frames, mels] dB of one song, a view of the file: only what is taken from it is read."""
        song = self.songs[index]
        return self._frames[song.first_frame : song.first_frame + song.frames]

    def song(self, index: int) -> Array:
        """[all frames, mels] dB of one song."""
        return widened(self.stored(index))

    def stored_clip(self, index: int, start: int, frames: int) -> npt.NDArray[np.float16]:
        """[frames, mels] dB of one song, from frame `start`; see `cut_clip`."""
        return cut_clip(self.stored(index), start, frames)

    def clip(self, index: int, start: int, frames: int) -> Array:
        """The same as float32."""
        return widened(self.stored_clip(index, start, frames))


def widened(values: npt.NDArray[np.float16]) -> Array:
    """The same numbers as float32, three times as fast as numpy's conversion, which takes one number after another."""
    bits = values.view(np.int16).astype(np.int32)
    bits <<= 13  # the fraction of a float16 to its place in a float32, and the exponent behind it
    bits &= -0x70002000  # of the copies of the sign that are before the exponent now, only the first
    wide = bits.view(np.float32)
    wide *= np.float32(2.0**112)  # the exponents count from -127 in a float32, and from -15 in a float16
    # The highest exponent, of NaN and infinity, has become one of ordinary numbers.
    return wide if np.abs(wide).max(initial=0) < 2**16 else values.astype(np.float32)


def cut_clip(log_mel: npt.NDArray[Floating], start: int, frames: int) -> npt.NDArray[Floating]:
    """[all frames, mels] of a song → [frames, mels], from frame `start`. A shorter song is repeated to fill the clip."""
    if len(log_mel) >= frames:
        assert 0 <= start <= len(log_mel) - frames, f"{start} + {frames} of {len(log_mel)} frames"
        return log_mel[start : start + frames]
    return np.take(log_mel, (start + np.arange(frames)) % len(log_mel), axis=0)


def _are_decibels(stored: npt.NDArray[np.float16]) -> bool:
    """Whether all numbers are within LARGEST_DB. Their bits without the sign are ordered as their sizes are, infinity and NaN
    last; numpy compares integers many at a time, and float16 numbers one after another."""
    return bool((stored.view("<u2") & 0x7FFF).max() <= np.float16(LARGEST_DB).view(np.uint16))


def _are_finite(*values: float | None) -> bool:
    return all(value is None or math.isfinite(value) for value in values)


def _read_mel(path: Path) -> tuple[MelConfig, int, int, Scale]:
    """Settings, total of frames, numbers of a song's tonality, scale of the ratings."""
    try:
        content = read_json(path)
        mel, frames, numbers = MelConfig.model_validate(content["mel"]), int(content["frames"]), int(content["tonality"])
        low, high = content.get("scale", DEAM_SCALE)
        return mel, frames, numbers, (low, high)
    except (FileNotFoundError, ValueError, TypeError, KeyError) as error:
        found = f"not the settings of a folder of features ({error})"
        raise DataError(f"{path}: {found}. Delete the folder to create it again.") from error


def _read_tonality(path: Path, songs: int, numbers: int) -> Array:
    """[songs, numbers]"""
    with errors_name(path):
        content = path.read_bytes() if path.exists() else b""
    if len(content) != 4 * songs * numbers:
        raise DataError(
            f"{path}: {songs} songs have {numbers} numbers each, so it must have {4 * songs * numbers} bytes and has "
            f"{len(content)}. Delete the folder to create it again."
        )
    return np.frombuffer(content, "<f4").reshape(songs, numbers)


def _read_table(path: Path) -> list[SongFeatures]:
    songs = read_records(path, SongFeatures, "the table of a folder of features")
    next_frame = 0
    for song in songs:
        labels = (song.valence, song.arousal, song.valence_sd, song.arousal_sd)
        if song.first_frame != next_frame or song.frames < 1 or not _are_finite(*labels):
            raise DataError(f"{path}: expected finite labels and frames from {next_frame} on, found {song}.")
        next_frame += song.frames
    if not songs:
        raise DataError(f"{path}: the table has no songs. Delete the folder to create it again.")
    return songs
