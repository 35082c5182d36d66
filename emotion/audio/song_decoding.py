"""Decode an audio file once: log-mel, tonality, level measurements and the digests that identify it."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from emotion.audio.decoding import Array, Watch, decode_blocks
from emotion.audio.mel import SILENCE_POWER, LogMel
from emotion.audio.tonality import ChromaStream, tonality
from emotion.errors import DataError, StorageError, system_reason
from emotion.files import sha256_of

EDGE_SECONDS = 0.1  # at both ends of a constant, decoder and resampler ring


@dataclass(frozen=True)
class DecodedSong:
    log_mel: npt.NDArray[np.float16]  # [frames, mels] dB
    tonality: npt.NDArray[np.float32]  # [TONALITY_NUMBERS]
    seconds: float
    peak: float  # largest absolute sample, full scale is 1
    rms_db: float  # of all samples about their mean, without EDGE_SECONDS at both ends; dB of full scale
    remark: str  # why a part of the sound may be missing; empty if there is no reason to think so
    file_sha256: str
    sound_sha256: str  # of the samples as 16-bit numbers


class ChangedFileError(DataError):
    """A file is not the one that was staged. It is no fault of the dataset, which could be left out."""


def decode_song(
    path: Path, log_mel: LogMel, longest_seconds: float, expected_sha256: str | None = None, watch: Watch | None = None
) -> DecodedSong:
    """Decode a file once, block by block. expected_sha256: hex, of the file. watch: see `decode_blocks`.

    Raises DataError as that does, ChangedFileError where the file is another one, or became another one meanwhile: then that, not
    damage, is the reason.
    """
    status = _status_of(path)
    # The file is hashed once where it is known what it has to be, behind the decoding; else in front of it, too.
    before = expected_sha256 or _sha256_of(path)
    try:
        decoded = _decode(path, log_mel, longest_seconds, watch)
    except DataError:
        _unchanged_sha256(path, status, before, expected_sha256)
        raise
    return replace(decoded, file_sha256=_unchanged_sha256(path, status, before, expected_sha256))


def _status_of(path: Path) -> tuple[int, int, int] | None:
    """What tells a file from one that took its place, or from itself with another content: inode, size, time in ns."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _sha256_of(path: Path) -> str:
    try:
        return sha256_of(path)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise StorageError.of(error, f"{path}: cannot be read: {system_reason(error)}") from error


def _unchanged_sha256(path: Path, status: tuple[int, int, int] | None, before: str, expected: str | None) -> str:
    """The file's SHA-256. Raises ChangedFileError if it is not the one before, or the status is not."""
    after = _sha256_of(path)
    if after == before and _status_of(path) == status:
        return after
    found = f"has the SHA-256 {after}" if after else "is gone"
    wanted = f", expected {expected} as it was staged" if expected else ""
    raise ChangedFileError(
        f"features: {path.resolve()} changed while the job ran: it {found}{wanted}. Put the right file there, or give the new "
        f"one another modification time, then run it again."
    )


def _decode(path: Path, log_mel: LogMel, longest_seconds: float, watch: Watch | None) -> DecodedSong:
    """All but the digest of the file."""
    rate_hz = log_mel.sample_rate_hz
    digest = hashlib.sha256()
    edge, head, tail = round(EDGE_SECONDS * rate_hz), np.empty(0, np.float32), np.empty(0, np.float32)
    samples, peak, moments = 0, 0.0, np.zeros(3)
    remarks: list[str] = []
    chroma = ChromaStream(rate_hz)

    def measured_blocks() -> Iterator[Array]:
        nonlocal samples, peak, moments, head, tail
        for block in decode_blocks(path, rate_hz, longest_seconds, remarks, watch):
            samples += len(block)
            peak = max(peak, float(block.max(initial=0)), -float(block.min(initial=0)))
            moments += _moments(block)
            head = np.concatenate([head, block[: edge - len(head)]])
            tail = np.concatenate([tail, block[-edge:]])[-edge:]
            scaled = block * 32767
            np.rint(scaled, out=scaled)
            digest.update(np.clip(scaled, -32768, 32767, out=scaled).astype("<i2").data)
            chroma.add(block)
            yield block

    found = log_mel.of_blocks(measured_blocks()).astype(np.float16)
    if samples > 4 * edge:
        moments -= _moments(head) + _moments(tail)
    _, mean, power = moments / moments[0]
    return DecodedSong(
        log_mel=found,
        tonality=tonality(chroma.finish(), chroma.frames_per_second),
        seconds=samples / rate_hz,
        peak=peak,
        rms_db=10 * math.log10(max(power - mean**2, SILENCE_POWER)),
        remark="; ".join(remarks),
        file_sha256="",
        sound_sha256=digest.hexdigest(),
    )


def _moments(samples: Array) -> npt.NDArray[np.float64]:
    """Their number, sum and sum of squares."""
    exact = samples.astype(np.float64)
    return np.array([len(exact), exact.sum(), np.square(exact, out=exact).sum()])
