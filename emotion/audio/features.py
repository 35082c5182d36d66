"""Audio → log-mel; and a whole dataset → one array of log-mels beside a table of songs.

A folder of features, of real songs or of synthetic clips alike, holds

    features.f16   little-endian float16 [total frames, mels]: log-mels in dB, one song after another
    songs.csv      a row per song: where its frames lie, its labels on -1..1, SDs over raters, its group
    mel.json       how the log-mels were made, and the total number of frames

and, to go on from, .songs.jsonl, beside .features.f16.part as long as the array is not whole.
"""

import copy
import csv
import functools
import hashlib
import io
import json
import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass, fields
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt
import scipy.fft
import scipy.sparse
import soundfile
import soxr
from numpy.lib.stride_tricks import sliding_window_view
from tqdm import tqdm

from emotion.audio.mpeg import scan_mpeg
from emotion.config import DataConfig, MelConfig
from emotion.data.deam import LAST_EXCERPT_ID, Dataset, Song
from emotion.data.faults import Fault, judge
from emotion.errors import DataError, Interrupted, SpecError, StorageError, first_of
from emotion.files import digest_of, read_json, sha256_of, sync, write_csv, write_json
from emotion.training.progress import LINE_SECONDS

log = logging.getLogger(__name__)

Array = npt.NDArray[np.float32]
Floating = TypeVar("Floating", np.float16, np.float32)

SILENCE_POWER = 1e-10  # the least power told apart: -100 dB
READ_SAMPLES = 131072  # read from a file at a time, over all channels: half a megabyte
MP3_FRAME_SAMPLES = 1152
MP3_PADDING_SAMPLES = 8192  # an encoder's header may have this many taken off the sound of the frames: two of 12 bits
RATES_HZ = (1000, 1_000_000)  # a header with another rate is damaged, and resampling from it could fill the memory
LARGEST_DB = 1000.0  # more is no sound, but an error
LARGEST_SAMPLE = 1e9  # full scale is 1; beyond, squares leave the range of float32
LONGEST_SECONDS = 3600.0  # decoded of one file, where nothing else is asked for
MOST_DECODED_BYTES = 4 << 30  # of one file, over all channels
DURABLE_SECONDS = 2.0  # work of so long, and what is under way, is lost when the machine is
JOURNAL_VERSION = 1  # raise it when the lines of the journal change
FRAME_GROUP = 128  # frames transformed at a time: they and their spectra stay in the processor's cache


def decode(path: Path, sample_rate_hz: int) -> Array:
    """The sound of an audio file: mono [samples] at `sample_rate_hz`, channels averaged, full scale 1.

    The same as librosa.load(path, sr=sample_rate_hz), which resamples by soxr HQ. A loud mp3 goes beyond 1 and is not
    clipped. Samples are counted, never taken from a header. Raises DataError for a file that is missing, cannot be
    decoded or not to its end, holds no samples or one that is infinite or NaN, or more than LONGEST_SECONDS or
    MOST_DECODED_BYTES. That the decoder came to the end of an mp3 is checked by the frames in the file.
    """
    return np.concatenate(list(decode_blocks(path, sample_rate_hz)))


def decode_blocks(path: Path, sample_rate_hz: int, longest_seconds: float = LONGEST_SECONDS) -> Iterator[Array]:
    """`decode` a block at a time, so that a long song never exists as a whole, and one without end fills no memory."""
    rate_hz = sample_rate_hz
    resampler: soxr.ResampleStream | None = None
    read = given = 0
    for mono, rate_hz in _read_mono(path):
        if not (np.abs(mono) <= LARGEST_SAMPLE).all():
            raise DataError(f"{path}: infinite or NaN samples after {read / rate_hz:.1f} s. Replace the file.")
        read += len(mono)
        if read > longest_seconds * rate_hz:
            raise DataError(
                f"{path}: lasts longer than {longest_seconds:g} s. Shorten it, or raise data.longest_seconds."
            )
        if rate_hz == sample_rate_hz:
            yield mono
            continue
        if resampler is None:
            resampler = soxr.ResampleStream(rate_hz, sample_rate_hz, 1, dtype="float32", quality="HQ")
        block = resampler.resample_chunk(mono)
        given += len(block)
        yield block
    if read == 0:
        raise DataError(f"{path}: opens as sound, but there are no samples in it. Replace the file.")
    if resampler is not None:
        rest = resampler.resample_chunk(np.empty(0, np.float32), last=True)
        missing = math.ceil(read * (sample_rate_hz / rate_hz)) - given
        yield np.pad(rest[:missing], (0, max(missing - len(rest), 0)))


def _read_mono(path: Path) -> Iterator[tuple[Array, int]]:
    """Blocks of (mono samples, rate in Hz) as they stand in the file."""
    read = 0
    try:
        with path.open("rb") as file, _open_sound(path, file) as sound:
            if not RATES_HZ[0] <= sound.samplerate <= RATES_HZ[1]:
                raise DataError(f"{path}: says its sample rate is {sound.samplerate} Hz. Replace the file.")
            for mono in _mono_blocks(sound, max(READ_SAMPLES // sound.channels, 1)):
                read += len(mono)
                if 4 * read * sound.channels > MOST_DECODED_BYTES:
                    raise DataError(f"{path}: decodes to more than {MOST_DECODED_BYTES >> 30} GiB. Shorten it.")
                yield mono, sound.samplerate
            if sound.format != "MP3" and read < sound.frames:
                raise DataError(f"{path}: {read} of {sound.frames} samples can be decoded. Replace the file.")
        scan = scan_mpeg(path) if sound.format == "MP3" else None
        if scan is None or read == 0:
            return
        in_frames = round(scan.frames_seconds * sound.samplerate)
        if scan.announced_seconds is None and read < in_frames:
            with _Endless(path) as endless, _FrontToBack(endless) as sound:
                for mono, rate_hz in _after(path, sound, read):
                    read += len(mono)
                    yield mono, rate_hz
        if in_frames - read > MP3_PADDING_SAMPLES:
            raise DataError(
                f"{path}: the decoder gave {read / sound.samplerate:.2f} s and said nothing, but the frames in the file last "
                f"{scan.frames_seconds:.2f} s. It is damaged or several sounds in one; replace it."
            )
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such audio file.") from error
    except OSError as error:
        raise StorageError.of(error, f"{path}: cannot be read: {error.strerror}") from error
    except soundfile.LibsndfileError as error:
        if read:
            raise DataError(f"{path}: {read} samples can be decoded, the rest is damaged. Replace the file.") from error
        with path.open("rb") as file:
            start = file.read(16)
        raise DataError(
            f"{path}: cannot be decoded; expected mp3, wav, flac or ogg, found {path.stat().st_size} bytes that begin "
            f"with {start!r}. Replace the file."
        ) from error


class _FrontToBack(soundfile.SoundFile):  # type: ignore[misc]
    """A sound that is only read on. After every read soundfile seeks to where it is, and an mp3 decoder starts anew."""

    def seekable(self) -> bool:
        return False


def _open_sound(path: Path, file: io.BufferedReader) -> _FrontToBack:
    try:
        # By its descriptor, which tells afterwards how far into the file the decoder went.
        return _FrontToBack(file.fileno(), closefd=False)
    except soundfile.LibsndfileError:
        if path.suffix.lower() != ".mp3":
            raise
    # Only with the name does libsndfile look for an mp3 behind rubbish.
    file.seek(0, os.SEEK_END)
    return _FrontToBack(str(path))


def _mono_blocks(sound: soundfile.SoundFile, samples: int) -> Iterator[Array]:
    buffer = np.empty((samples, sound.channels), np.float32)
    read = 0
    # Asked for more than it believes there is, libsndfile decodes it and throws it away.
    while len(block := sound.read(out=buffer[: sound.frames - read])):
        read += len(block)
        # Channel by channel: numpy's mean over so short an axis takes as long as decoding.
        yield functools.reduce(np.add, block.T) / np.float32(sound.channels)


class _Endless(io.FileIO):
    """A file that claims to be very long.

    Where an mp3 of variable bit rate has no header that tells its length, the decoder reckons one from the file's size
    and the first frames, stops there and says nothing. This way it goes on to the last frame.
    """

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        if whence == os.SEEK_END and offset == 0:
            return super().seek(1 << 40)
        return super().seek(offset, whence)


def _after(path: Path, sound: soundfile.SoundFile, known: int) -> Iterator[tuple[Array, int]]:
    """The blocks that follow the first `known` samples. A torn last frame ends the sound."""
    read = 0
    try:
        for mono in _mono_blocks(sound, MP3_FRAME_SAMPLES):
            read += len(mono)
            if read > known:
                yield mono[max(len(mono) - (read - known), 0) :], sound.samplerate
    except soundfile.LibsndfileError:
        if read < known:
            raise
    rate = sound.samplerate
    log.info("%s: is estimated to last %.2f s, but %.2f s were decoded", path, known / rate, max(read, known) / rate)


class LogMel:
    """Mono samples → log-mel in dB: power of centred, zero-padded Hann frames, summed by Slaney's mel filters.

    Equal to librosa.power_to_db(librosa.feature.melspectrogram(y, power=2), ref=1, amin=1e-10, top_db=None). The
    reference is fixed and there is no floor below the clip's maximum, so loudness stays in: twice the amplitude is
    +6.02 dB, silence is -100 dB. Hold one and call it from any number of threads.

    bank: [mels, bins] filters, up to the last bin that one of them takes; every other bin is left out of the work.
    """

    def __init__(self, mel: MelConfig) -> None:
        import librosa  # takes 2 s, which reading a folder of features need not wait for

        self.mel = mel
        bank = librosa.filters.mel(
            sr=mel.sample_rate_hz, n_fft=mel.window_samples, n_mels=mel.mels, fmin=mel.fmin_hz, fmax=mel.fmax_hz
        )
        if not bank.any():
            raise SpecError(
                f"mel: between {mel.fmin_hz:g} and {mel.fmax_hz:g} Hz there is no bin of window_samples; raise it"
            )
        bins = int(np.flatnonzero(bank.any(axis=0)).max()) + 1
        self.bank: Array = np.ascontiguousarray(bank[:, :bins], np.float32)
        # A filter takes 11 bins on average: sparse, it is a fraction of the work, and no BLAS starts its own threads.
        self._sparse_bank = scipy.sparse.csr_array(self.bank)
        phase = 2 * np.pi * np.arange(mel.window_samples) / mel.window_samples
        self.window: Array = (0.5 - 0.5 * np.cos(phase)).astype(np.float32)

    def __call__(self, samples: Array) -> Array:
        """[samples] → [1 + samples // hop_samples, mels] dB, -100 or more."""
        return self.of_blocks([samples])

    def of_blocks(self, blocks: Iterable[Array]) -> Array:
        """The same for a sound in blocks, such as those of `decode_blocks`; the same bits however it is cut."""
        window, hop = self.mel.window_samples, self.mel.hop_samples
        group = (FRAME_GROUP - 1) * hop + window
        waiting = np.zeros(window // 2, np.float32)
        samples = done = 0
        parts = []
        for block in blocks:
            samples += len(block)
            waiting = np.concatenate([waiting, block])
            used = 0
            while len(waiting) - used >= group:
                parts.append(self._frames(waiting[used : used + group]))
                used += FRAME_GROUP * hop
            done += used // hop
            waiting = waiting[used:]
        frames = 1 + samples // hop - done
        waiting = np.pad(waiting, (0, max((frames - 1) * hop + window - len(waiting), 0)))
        for first in range(0, frames, FRAME_GROUP):
            last = min(first + FRAME_GROUP, frames) - 1
            parts.append(self._frames(waiting[first * hop : last * hop + window]))
        return np.concatenate(parts)

    def _frames(self, samples: Array) -> Array:
        framed = sliding_window_view(samples, self.mel.window_samples)[:: self.mel.hop_samples]
        spectrum = scipy.fft.rfft(framed * self.window, axis=1, overwrite_x=True)[:, : self.bank.shape[1]]
        power = np.abs(spectrum)
        power *= power
        decibel = np.maximum((self._sparse_bank @ power.T).T, np.float32(SILENCE_POWER))
        # By the natural logarithm: numpy has it vectorised, and the decadic one not.
        np.log(decibel, out=decibel)
        decibel *= np.float32(10 / math.log(10))
        return np.asarray(decibel, np.float32)


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
        beginning = {"version": JOURNAL_VERSION, "mel": mel.what(), "made_from": made_from}
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
            write_json(self.out / "mel.json", {"mel": self.mel.what(), "frames": self._frames})
        elif isinstance(error, DataError):
            self._partial.unlink()
            self._lines.unlink()


@dataclass(frozen=True)
class Heard:
    """What decoding one song gave. peak: largest sample, full scale is 1; rms_db: of all samples, in dB of full scale.

    is_shorter: than the file's header announces, by more than half a second. That may be a cut file or an old header.
    """

    log_mel: npt.NDArray[np.float16]
    seconds: float
    peak: float
    rms_db: float
    is_shorter: bool
    file_sha256: str
    sound_sha256: str


def hear(path: Path, log_mel: LogMel, longest_seconds: float) -> Heard:
    """Decode a file once, a block at a time. Raises DataError as `decode` does."""
    rate_hz = log_mel.mel.sample_rate_hz
    digest = hashlib.sha256()
    samples, peak, energy = 0, 0.0, 0.0

    def watched() -> Iterator[Array]:
        nonlocal samples, peak, energy
        for block in decode_blocks(path, rate_hz, longest_seconds):
            samples += len(block)
            peak = max(peak, float(np.abs(block).max(initial=0)))
            energy += float(np.square(block, dtype=np.float64).sum())
            digest.update(np.clip(np.rint(block * 32767), -32768, 32767).astype("<i2").tobytes())
            yield block

    found = log_mel.of_blocks(watched()).astype(np.float16)
    rms_db = 10 * math.log10(max(energy / samples, SILENCE_POWER))
    scan = scan_mpeg(path)
    is_shorter = scan is not None and (scan.announced_seconds or 0.0) - samples / rate_hz > 0.5
    return Heard(found, samples / rate_hz, peak, rms_db, is_shorter, sha256_of(path), digest.hexdigest())


def unfit(song_id: int, heard: Heard, data: DataConfig) -> str | None:
    """Why a song that decodes should not be in a dataset, as far as it can be told from the song alone; None if it may."""
    if heard.seconds < data.shortest_seconds:
        return f"lasts {heard.seconds:.2f} s, expected at least data.shortest_seconds {data.shortest_seconds:g}"
    if data.excerpt_seconds and song_id <= LAST_EXCERPT_ID and heard.seconds < data.excerpt_seconds - 1:
        return (
            f"is cut: lasts {heard.seconds:.2f} s, expected an excerpt of data.excerpt_seconds {data.excerpt_seconds:g}"
        )
    if heard.rms_db < data.silence_db:
        return f"is silent: RMS {heard.rms_db:.1f} dB, expected data.silence_db {data.silence_db:g} or more"
    if heard.peak > data.largest_peak:
        return f"has a peak of {heard.peak:.3g}, expected at most data.largest_peak {data.largest_peak:g}"
    return None


def extract_features(
    dataset: Dataset,
    audio_root: Path,
    data: DataConfig,
    mel: MelConfig,
    out: Path,
    table: Path,
    threads: int,
    should_stop: Callable[[], bool],
) -> list[Fault]:
    """Log-mels of whole songs, in the order of the dataset, as a folder of features in `out`; and all its faults.

    Here the dataset is judged (`faults.judge`, which writes `table`), as only now is everything known of it: the faults
    that came with it, and those of the audio, which either cannot be decoded or should not be in a dataset. Songs with
    faults are left out. Decoding, resampling and transforms leave Python's lock alone, so threads are as good as processes.
    A song is taken through in blocks, and at most two per thread are under way: memory does not grow with the dataset.
    Asked to stop, for which it looks at every song, it raises Interrupted; entering again, also after a kill, goes on behind
    the last song that is durable (see FeatureWriter). Raises DataError when the pass is through, which leaves nothing in `out`.
    """
    songs = dataset.songs
    log_mel = LogMel(mel)
    made_from = {"songs": [astuple(song) for song in songs], "data": data.model_dump(exclude={"source"})}
    under_way: deque[tuple[Song, Future[Heard]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="features")
    is_shown = sys.stderr.isatty()
    told = time.monotonic()
    try:
        with (
            FeatureWriter(out, mel, made_from) as writer,
            tqdm(total=len(songs), initial=writer.done, desc="features", unit="song", disable=not is_shown) as bar,
        ):
            owners = {song.sound_sha256: song.song_id for song in writer.songs}
            todo = iter(songs[writer.done :])
            while writer.done < len(songs):
                if should_stop():
                    raise Interrupted(f"features: stopped after {writer.done} of {len(songs)} songs")
                for song in islice(todo, 2 * threads - len(under_way)):
                    under_way.append((song, pool.submit(hear, audio_root / song.audio, log_mel, data.longest_seconds)))
                song, future = under_way.popleft()
                labels = (song.valence, song.arousal, song.valence_sd, song.arousal_sd)
                place = Path(song.audio).name
                try:
                    heard = future.result()
                    problem = unfit(song.song_id, heard, data)
                    twin = owners.get(heard.sound_sha256)
                    if problem:
                        writer.leave_out(Fault("unfit audio", song.song_id, place, problem))
                    elif twin is not None:
                        writer.leave_out(Fault("copied audio", song.song_id, place, f"is the sound of song {twin}"))
                    else:
                        digests = (heard.file_sha256, heard.sound_sha256)
                        writer.append(song.song_id, *labels, song.group, heard.log_mel, *digests, heard.is_shorter)
                        owners[heard.sound_sha256] = song.song_id
                except DataError as error:
                    what = str(error).removeprefix(f"{audio_root / song.audio}: ")
                    writer.leave_out(Fault("undecodable audio", song.song_id, place, what))
                bar.update()
                if not is_shown and (time.monotonic() - told >= LINE_SECONDS or writer.done == len(songs)):
                    log.info("phase=features songs=%d/%d", writer.done, len(songs))
                    told = time.monotonic()
            faults = [*dataset.faults, *writer.faults]
            known = {song.song_id for song in songs} | {fault.song_id for fault in faults} - {None}
            if writer.shorter:
                log.warning(
                    "features: songs shorter than their headers announce, and used as they are: %s",
                    first_of(writer.shorter),
                )
            judge(faults, len(known), data, table)
            if not writer.songs:
                raise DataError("data: there is no song to work with. Correct data.source.")
    finally:
        pool.shutdown(cancel_futures=True)
    return faults


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
