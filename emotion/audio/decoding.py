"""Audio files to mono samples, every sample counted."""

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
from emotion.errors import DataError, StorageError

log = logging.getLogger(__name__)

Array = npt.NDArray[np.float32]
READ_SAMPLES = 131072  # read from a file at a time, over all channels: half a megabyte
MP3_FRAME_SAMPLES = 1152
MP3_PADDING_SAMPLES = 8192  # an encoder's header may have this many taken off the sound of the frames: two of 12 bits
RATES_HZ = (1000, 1_000_000)  # a header with another rate is damaged, and resampling from it could fill the memory
LARGEST_SAMPLE = 1e9  # full scale is 1; beyond, squares leave the range of float32
LONGEST_SECONDS = 3600.0  # decoded of one file, where nothing else is asked for
MOST_DECODED_BYTES = 4 << 30  # of one file, over all channels


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
