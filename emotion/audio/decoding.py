"""Audio files → mono samples, decoded to the last one."""

import io
import logging
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from emotion.audio.container_lengths import Contents, Part, contents_of
from emotion.audio.mpeg import scan_mpeg
from emotion.data.foreign_files import FIRST_BYTES, found_instead
from emotion.data.songs import AUDIO_FORMATS
from emotion.errors import DataError, StorageError, system_reason

log = logging.getLogger(__name__)

Array = npt.NDArray[np.float32]
Watch = Callable[[Array], None]
READ_SAMPLES = 131072  # read from a file at a time, over all channels: half a megabyte
HALVES = np.full(2, 0.5, np.float32)
MP3_FRAME_SAMPLES = 1152
MP3_PADDING_SAMPLES = 8192  # an encoder's header may trim this much from the frames: two fields of 12 bits
RATES_HZ = (1000, 1_000_000)  # a header with another rate is damaged, and resampling from it could fill the memory
LARGEST_SAMPLE = 1e9  # full scale is 1; squares of larger samples overflow float32
LONGEST_SECONDS = 3600.0  # decoded of one file by default
MOST_DECODED_BYTES = 4 << 30  # of one file, over all channels
UNKNOWN_SAMPLES = 1 << 62  # libsndfile has 2^63 - 1 for a length that a header does not have
# Those of which the length can be verified; AUDIO_EXTENSIONS are their extensions.
LIBSNDFILE_FORMATS = ("MP3", "WAV", "WAVEX", "RF64", "W64", "FLAC", "OGG", "AIFF", "AU", "CAF")


class TooLongError(DataError):
    """A file has more seconds than may be decoded. The text says no remedy: where the limit can be changed, the caller knows."""


def decode_blocks(
    path: Path,
    sample_rate_hz: int,
    longest_seconds: float = LONGEST_SECONDS,
    remarks: list[str] | None = None,
    watch: Watch | None = None,
) -> Iterator[Array]:
    """Decode an audio file: blocks of mono samples at `sample_rate_hz`, channels averaged, full scale 1.

    Together they are the same samples as librosa.load(path, sr=sample_rate_hz). A loud mp3 exceeds 1 and is not clipped.

    Raises DataError for a file that is missing, cannot be decoded to its end (of an mp3, the frames are counted; otherwise see
    `contents_of`), has no samples, NaN or infinity, sounds of several rates, or more than `longest_seconds` (TooLongError) or
    MOST_DECODED_BYTES.

    remarks: at the end, why a part of the sound may be missing is appended, if there is a reason to think so.
    watch: called with each block before its channels are averaged, [samples, channels] at the file's own rate, which is valid
    until the next one. What follows the announced end of an mp3 is left out.
    """
    rate_hz = 0
    resampler: soxr.ResampleStream | None = None
    read = resampled = 0
    for mono, block_rate_hz in _read_mono(path, remarks if remarks is not None else [], watch):
        if rate_hz not in (0, block_rate_hz):
            raise DataError(
                f"{path}: changes from {rate_hz} Hz to {block_rate_hz} Hz after {read / rate_hz:.1f} s. Split the file."
            )
        rate_hz = block_rate_hz
        if not -LARGEST_SAMPLE <= mono.min(initial=0) <= mono.max(initial=0) <= LARGEST_SAMPLE:  # NaN is neither
            raise DataError(f"{path}: infinite or NaN samples after {read / rate_hz:.1f} s. Replace the file.")
        read += len(mono)
        if read > longest_seconds * rate_hz:
            raise TooLongError(f"{path}: lasts longer than {longest_seconds:g} s")
        if rate_hz == sample_rate_hz:
            yield mono.copy()
            continue
        if resampler is None:
            resampler = soxr.ResampleStream(rate_hz, sample_rate_hz, 1, dtype="float32", quality="HQ")
        block = resampler.resample_chunk(mono)
        resampled += len(block)
        yield block
    if read == 0:
        raise DataError(f"{path}: this audio file has no samples. Replace it.")
    if resampler is not None:
        rest = resampler.resample_chunk(np.empty(0, np.float32), last=True)
        missing = math.ceil(read * (sample_rate_hz / rate_hz)) - resampled
        yield np.pad(rest[:missing], (0, max(missing - len(rest), 0)))


def _read_mono(path: Path, remarks: list[str], watch: Watch | None) -> Iterator[tuple[Array, int]]:
    """Blocks of (mono samples, rate in Hz) at the file's own rate. A block is valid until the next one is asked for."""
    read = 0
    try:
        contents = contents_of(path)
        for part in contents.parts:
            for mono, rate_hz in _read_part(path, part, contents, remarks, watch):
                read += len(mono)
                yield mono, rate_hz
        if contents.remark:
            remarks.append(contents.remark)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such audio file.") from error
    except OSError as error:
        raise StorageError.of(error, f"{path}: cannot be read: {system_reason(error)}") from error
    except soundfile.LibsndfileError as error:
        if read:
            raise DataError(f"{path}: {read} samples can be decoded, the rest is damaged. Replace the file.") from error
        with path.open("rb") as file:
            start = file.read(FIRST_BYTES)
        if not start:
            raise DataError(f"{path}: is empty; expected {AUDIO_FORMATS}. Replace the file.") from error
        if foreign := found_instead(start):
            raise DataError(f"{path}: expected audio, found {foreign}.") from error
        if start.startswith(b"fLaC"):
            raise DataError(
                f"{path}: begins as flac, but is cut or damaged: nothing of it can be decoded. Replace it."
            ) from error
        raise DataError(
            f"{path}: cannot be decoded; expected {AUDIO_FORMATS}, found {path.stat().st_size} bytes that begin "
            f"with {start[:16]!r}. Replace the file."
        ) from error


def _read_part(
    path: Path, part: Part, contents: Contents, remarks: list[str], watch: Watch | None
) -> Iterator[tuple[Array, int]]:
    read = 0
    with _PartOfFile(path, part) as file, _open_sound(path, file) as sound:
        if not RATES_HZ[0] <= sound.samplerate <= RATES_HZ[1]:
            raise DataError(f"{path}: its header has a sample rate of {sound.samplerate} Hz. Replace the file.")
        if sound.format not in LIBSNDFILE_FORMATS:
            raise DataError(f"{path}: is {sound.format}, of which the length cannot be verified; convert it to {AUDIO_FORMATS}.")
        if sound.subtype.startswith("MPEG") and sound.format != "MP3":  # scan_mpeg does not look into containers
            raise DataError(f"{path}: is mp3 inside {sound.format}, of which the length cannot be verified; convert it to flac.")
        for mono in _mono_blocks(sound, max(READ_SAMPLES // sound.channels, 1), contents.announced_samples, watch):
            read += len(mono)
            if 4 * read * sound.channels > MOST_DECODED_BYTES:
                raise DataError(f"{path}: decodes to more than {MOST_DECODED_BYTES >> 30} GiB. Shorten it.")
            yield mono, sound.samplerate
    if sound.format == "MP3":
        yield from _rest_of_mp3(path, sound.samplerate, read, remarks)
        return
    announced = contents.announced_samples or sound.frames
    if read < announced < UNKNOWN_SAMPLES:
        raise DataError(f"{path}: {read} of {announced} samples can be decoded. Replace the file.")
    if contents.announced_samples and read > announced:
        log.info("%s: its header announces %d samples, but %d were decoded", path, announced, read)


def _rest_of_mp3(path: Path, rate_hz: int, read: int, remarks: list[str]) -> Iterator[tuple[Array, int]]:
    """What follows the samples that the decoder expected, and a remark. Raises DataError where it lost some."""
    scan = scan_mpeg(path)
    if scan is None or read == 0:
        return
    samples_in_frames = round(scan.frames_seconds * rate_hz)
    if scan.announced_seconds is None and read < samples_in_frames:
        with _FileOfUnknownSize(path) as whole, _SequentialSound(whole) as sound:
            for mono, _ in _mono_blocks_after(path, sound, read):
                read += len(mono)
                yield mono, rate_hz
    if samples_in_frames - read > MP3_PADDING_SAMPLES:
        raise DataError(
            f"{path}: the decoder stopped after {read / rate_hz:.2f} s without an error, but the frames in the "
            f"file last {scan.frames_seconds:.2f} s. It is damaged or several sounds in one; replace it."
        )
    seconds, announced = read / rate_hz, scan.announced_seconds or 0.0
    # A header may also be old: some programs cut an mp3 without writing it anew.
    if announced - seconds > 0.5:
        remarks.append(f"its header announces {announced:.2f} s, it lasts {seconds:.2f} s")


class _SequentialSound(soundfile.SoundFile):  # type: ignore[misc]
    """A sound read from front to back: soundfile seeks after every read of a seekable one, which restarts an mp3 decoder."""

    def seekable(self) -> bool:
        return False


def _open_sound(path: Path, file: "_PartOfFile") -> _SequentialSound:
    if not file.is_whole:
        return _SequentialSound(file)
    try:
        return _SequentialSound(file.fileno(), closefd=False)
    except soundfile.LibsndfileError:
        if path.suffix.lower() != ".mp3":
            raise
    # Only by its name does libsndfile recognise an mp3 that begins with other bytes.
    return _SequentialSound(str(path))


def _mono_blocks(sound: soundfile.SoundFile, samples: int, announced: int = 0, watch: Watch | None = None) -> Iterator[Array]:
    """announced: number of samples after which other bytes may follow, 0 if it is unknown. A block is valid until the next."""
    buffer = np.empty((samples, sound.channels), np.float32)
    mono = np.empty(samples, np.float32)
    read = 0
    while True:
        # Asked for more samples than it expects, libsndfile decodes them but does not return them. Nor does it return those that
        # it has decoded before an error, so a single sample shows whether there are any behind the announced ones.
        most = announced - read if read < announced else 1 if read == announced else samples
        most = min(most, samples, sound.frames - read)
        try:
            block = sound.read(out=buffer[:most])
        except soundfile.LibsndfileError:
            if 0 < read == announced:
                return
            raise
        if not len(block):
            return
        read += len(block)
        if watch is not None:
            watch(block)
        # Numpy's mean over so short an axis takes as long as decoding.
        mixed = mono[: len(block)]
        if sound.channels == 2:
            np.matmul(block, HALVES, out=mixed)  # the bits of (left + right) / 2: halving is exact
        else:
            mixed[:] = block[:, 0]
            for channel in block.T[1:]:
                mixed += channel
            mixed /= np.float32(sound.channels)
        yield mixed


class _PartOfFile(io.FileIO):
    """A part of a file as if it were the whole, with some bytes replaced."""

    def __init__(self, path: Path, part: Part) -> None:
        super().__init__(path)
        self.part = part
        self.is_whole = part == Part(0, os.fstat(self.fileno()).st_size)
        super().seek(part.start)

    def tell(self) -> int:
        return super().tell() - self.part.start

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: self.part.start, os.SEEK_CUR: super().tell(), os.SEEK_END: self.part.end}[whence]
        return super().seek(max(base + offset, self.part.start)) - self.part.start

    def readinto(self, buffer: Any, /) -> int:
        first = super().tell()
        target = memoryview(buffer).cast("B")[: max(self.part.end - first, 0)]
        read = super().readinto(target) or 0
        for place, content in self.part.replaced.items():
            for offset, byte in enumerate(content, place - first):
                if 0 <= offset < read:
                    target[offset] = byte
        return read


class _FileOfUnknownSize(io.FileIO):
    """A file that pretends to be 1 TiB long.

    The decoder estimates the length of an mp3 of variable bit rate without a header from the file's size, and stops there.
    """

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        if whence == os.SEEK_END and offset == 0:
            return super().seek(1 << 40)
        return super().seek(offset, whence)


def _mono_blocks_after(path: Path, sound: soundfile.SoundFile, known: int) -> Iterator[tuple[Array, int]]:
    """Blocks of (mono samples, rate in Hz) behind the first `known` samples. A damaged last frame ends the sound."""
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
