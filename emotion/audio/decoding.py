"""Audio files → mono samples, decoded to the last one."""

import functools
import io
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from emotion.audio.mpeg import scan_mpeg
from emotion.errors import DataError, StorageError, system_reason

log = logging.getLogger(__name__)

Array = npt.NDArray[np.float32]
READ_SAMPLES = 131072  # read from a file at a time, over all channels: half a megabyte
MP3_FRAME_SAMPLES = 1152
MP3_PADDING_SAMPLES = 8192  # an encoder's header may trim this much from the frames: two fields of 12 bits
RATES_HZ = (1000, 1_000_000)  # a header with another rate is damaged, and resampling from it could fill the memory
LARGEST_SAMPLE = 1e9  # full scale is 1; squares of larger samples overflow float32
LONGEST_SECONDS = 3600.0  # decoded of one file by default
MOST_DECODED_BYTES = 4 << 30  # of one file, over all channels


def decode_blocks(path: Path, sample_rate_hz: int, longest_seconds: float = LONGEST_SECONDS) -> Iterator[Array]:
    """Decode an audio file: blocks of mono samples at `sample_rate_hz`, channels averaged, full scale 1.

    Together they are the same samples as librosa.load(path, sr=sample_rate_hz). A loud mp3 exceeds 1 and is not clipped.

    Raises DataError for a file that is missing, cannot be decoded to its end (of an mp3, the frames are counted), has no
    samples, NaN or infinity, or has more than `longest_seconds` or MOST_DECODED_BYTES.
    """
    rate_hz = sample_rate_hz
    resampler: soxr.ResampleStream | None = None
    read = resampled = 0
    for mono, rate_hz in _read_mono(path):
        if not (np.abs(mono) <= LARGEST_SAMPLE).all():
            raise DataError(f"{path}: infinite or NaN samples after {read / rate_hz:.1f} s. Replace the file.")
        read += len(mono)
        if read > longest_seconds * rate_hz:
            raise DataError(f"{path}: lasts longer than {longest_seconds:g} s. Shorten it, or raise data.longest_seconds.")
        if rate_hz == sample_rate_hz:
            yield mono
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


def _read_mono(path: Path) -> Iterator[tuple[Array, int]]:
    """Blocks of (mono samples, rate in Hz) at the file's own rate."""
    read = 0
    try:
        with path.open("rb") as file, _open_sound(path, file) as sound:
            if not RATES_HZ[0] <= sound.samplerate <= RATES_HZ[1]:
                raise DataError(f"{path}: its header has a sample rate of {sound.samplerate} Hz. Replace the file.")
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
        samples_in_frames = round(scan.frames_seconds * sound.samplerate)
        if scan.announced_seconds is None and read < samples_in_frames:
            with _FileOfUnknownSize(path) as whole, _SequentialSound(whole) as sound:
                for mono, rate_hz in _mono_blocks_after(path, sound, read):
                    read += len(mono)
                    yield mono, rate_hz
        if samples_in_frames - read > MP3_PADDING_SAMPLES:
            raise DataError(
                f"{path}: the decoder stopped after {read / sound.samplerate:.2f} s without an error, but the frames in the "
                f"file last {scan.frames_seconds:.2f} s. It is damaged or several sounds in one; replace it."
            )
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such audio file.") from error
    except OSError as error:
        raise StorageError.of(error, f"{path}: cannot be read: {system_reason(error)}") from error
    except soundfile.LibsndfileError as error:
        if read:
            raise DataError(f"{path}: {read} samples can be decoded, the rest is damaged. Replace the file.") from error
        with path.open("rb") as file:
            start = file.read(16)
        raise DataError(
            f"{path}: cannot be decoded; expected mp3, wav, flac or ogg, found {path.stat().st_size} bytes that begin "
            f"with {start!r}. Replace the file."
        ) from error


class _SequentialSound(soundfile.SoundFile):  # type: ignore[misc]
    """A sound read from front to back: soundfile seeks after every read of a seekable one, which restarts an mp3 decoder."""

    def seekable(self) -> bool:
        return False


def _open_sound(path: Path, file: io.BufferedReader) -> _SequentialSound:
    try:
        return _SequentialSound(file.fileno(), closefd=False)
    except soundfile.LibsndfileError:
        if path.suffix.lower() != ".mp3":
            raise
    # Only by its name does libsndfile recognise an mp3 that begins with other bytes.
    return _SequentialSound(str(path))


def _mono_blocks(sound: soundfile.SoundFile, samples: int) -> Iterator[Array]:
    buffer = np.empty((samples, sound.channels), np.float32)
    read = 0
    # Asked for more samples than it expects, libsndfile decodes them but does not return them.
    while len(block := sound.read(out=buffer[: sound.frames - read])):
        read += len(block)
        # Channel by channel: numpy's mean over so short an axis takes as long as decoding.
        yield functools.reduce(np.add, block.T) / np.float32(sound.channels)


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
