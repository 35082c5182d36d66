"""Phase features: decode every song once, check it, and write its log-mel to the feature store."""

import hashlib
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from emotion.audio.container_lengths import contents_of
from emotion.audio.decoding import Array, TooLongError, decode_blocks
from emotion.audio.feature_store import FeatureWriter
from emotion.audio.mel import SILENCE_POWER, LogMel
from emotion.audio.mpeg import scan_mpeg
from emotion.config import DataConfig, MelConfig
from emotion.data.deam import LAST_EXCERPT_ID
from emotion.data.faults import Fault, fail_or_leave_out
from emotion.data.songs import Dataset, Song
from emotion.errors import DataError, Interrupted, first_of
from emotion.files import sha256_of
from emotion.progress_bar import ProgressBar

log = logging.getLogger(__name__)

EDGE_SECONDS = 0.1  # at both ends of a constant, decoder and resampler ring


@dataclass(frozen=True)
class DecodedSong:
    log_mel: npt.NDArray[np.float16]  # [frames, mels] dB
    seconds: float
    peak: float  # largest absolute sample, full scale is 1
    rms_db: float  # of all samples about their mean, without EDGE_SECONDS at both ends; dB of full scale
    remark: str  # why a part of the sound may be missing; empty if there is no reason to think so
    file_sha256: str
    sound_sha256: str  # of the samples as 16-bit numbers


class ChangedFileError(DataError):
    """A file is not the one that was staged. It is no fault of the dataset, which could be left out."""


def decode_song(path: Path, log_mel: LogMel, longest_seconds: float, expected_sha256: str | None = None) -> DecodedSong:
    """Decode a file once, block by block. expected_sha256: hex, of the file. Raises DataError as `decode_blocks` does,
    ChangedFileError where the file is another one, or became another one meanwhile: then that, not damage, is the reason."""
    before = _version_of(path)
    try:
        decoded = _decode(path, log_mel, longest_seconds)
    except DataError:
        _refuse_changed(path, before, expected_sha256)
        raise
    _refuse_changed(path, before, expected_sha256)
    return decoded


def _version_of(path: Path) -> tuple[int, int, str] | None:
    """What tells a file from one that took its place: inode, time in ns, SHA-256. None where there is no file."""
    try:
        found = path.stat()
        return found.st_ino, found.st_mtime_ns, sha256_of(path)
    except FileNotFoundError:
        return None


def _refuse_changed(path: Path, before: tuple[int, int, str] | None, expected_sha256: str | None) -> None:
    after = _version_of(path)
    if after == before and expected_sha256 in (None, after[2] if after else None):
        return
    found = "is gone" if after is None else f"has the SHA-256 {after[2]}"
    expected = f", expected {expected_sha256} as it was staged" if expected_sha256 else ""
    raise ChangedFileError(
        f"features: {path.resolve()} changed while the job ran: it {found}{expected}. Put the right file there, or give the new "
        f"one another modification time, then run it again."
    )


def _decode(path: Path, log_mel: LogMel, longest_seconds: float) -> DecodedSong:
    rate_hz = log_mel.mel.sample_rate_hz
    digest = hashlib.sha256()
    edge, head, tail = round(EDGE_SECONDS * rate_hz), np.empty(0, np.float32), np.empty(0, np.float32)
    samples, peak, moments = 0, 0.0, np.zeros(3)

    def measured_blocks() -> Iterator[Array]:
        nonlocal samples, peak, moments, head, tail
        for block in decode_blocks(path, rate_hz, longest_seconds):
            samples += len(block)
            peak = max(peak, float(np.abs(block).max(initial=0)))
            moments += _moments(block)
            head = np.concatenate([head, block[: edge - len(head)]])
            tail = np.concatenate([tail, block])[-edge:]
            digest.update(np.clip(np.rint(block * 32767), -32768, 32767).astype("<i2").tobytes())
            yield block

    found = log_mel.of_blocks(measured_blocks()).astype(np.float16)
    seconds = samples / rate_hz
    if samples > 4 * edge:
        moments -= _moments(head) + _moments(tail)
    _, mean, power = moments / moments[0]
    return DecodedSong(
        log_mel=found,
        seconds=seconds,
        peak=peak,
        rms_db=10 * math.log10(max(power - mean**2, SILENCE_POWER)),
        remark=_remark(path, seconds),
        file_sha256=sha256_of(path),
        sound_sha256=digest.hexdigest(),
    )


def _moments(samples: Array) -> npt.NDArray[np.float64]:
    """Their number, sum and sum of squares."""
    exact = samples.astype(np.float64)
    return np.array([len(exact), exact.sum(), np.square(exact).sum()])


def _remark(path: Path, seconds: float) -> str:
    scan = scan_mpeg(path)
    if scan is None:
        return contents_of(path).remark
    announced = scan.announced_seconds or 0.0
    # A header may also be old: some programs cut an mp3 without writing it anew.
    return f"its header announces {announced:.2f} s, it lasts {seconds:.2f} s" if announced - seconds > 0.5 else ""


def unfit_reasons(decoded: DecodedSong, data: DataConfig, *, name_settings: bool) -> list[str]:
    """Why a sound that can be decoded is no song, judged by itself alone; empty if it is one.

    name_settings: whether the reader can change the limits, in a spec.
    """

    def limit(setting: str) -> str:
        return f"{f'data.{setting} ' if name_settings else ''}{getattr(data, setting):g}"

    reasons = []
    if decoded.seconds < data.shortest_seconds:
        reasons.append(f"lasts {decoded.seconds:.2f} s, expected at least {limit('shortest_seconds')}")
    if decoded.rms_db < data.silence_db:
        reasons.append(f"is silent, channels averaged: RMS {decoded.rms_db:.1f} dB, expected {limit('silence_db')} or more")
    if decoded.peak > data.largest_peak:
        reasons.append(f"has a peak of {decoded.peak:.3g}, expected at most {limit('largest_peak')}")
    return reasons


def _cut_excerpt_reasons(song_id: int, decoded: DecodedSong, data: DataConfig) -> list[str]:
    if data.excerpt_seconds and song_id <= LAST_EXCERPT_ID and decoded.seconds < data.excerpt_seconds - 1:
        expected = f"data.excerpt_seconds {data.excerpt_seconds:g}"
        return [f"is cut: lasts {decoded.seconds:.2f} s, expected an excerpt of {expected}"]
    return []


def extract_features(
    dataset: Dataset,
    data: DataConfig,
    mel: MelConfig,
    *,
    out: Path,
    faults_table: Path,
    threads: int,
    should_stop: Callable[[], bool],
) -> list[Fault]:
    """Write the log-mels of whole songs, in the order of the dataset, to a feature store in `out`. Returns all faults.

    Songs whose audio cannot be decoded, is unusable or repeats another song are faults and are left out. All faults of the
    dataset are reported here, in `faults_table` (see `fail_or_leave_out`). Threads are as fast as processes, since decoding,
    resampling and transforms release Python's lock; at most two songs per thread are in progress, to bound memory.

    Raises Interrupted when asked to stop, which is checked before each song; the next attempt resumes behind the last durable
    song (see FeatureWriter). Raises DataError after the last song, and at once for a
    file that is not the one in `dataset.digests`; `out` is then empty.
    """
    songs, log_mel = dataset.songs, LogMel(mel)
    made_from = {"songs": [astuple(song) for song in songs], "data": data.model_dump(exclude={"source"})}
    pool = ThreadPoolExecutor(threads, thread_name_prefix="features")

    def start(song: Song) -> Future[DecodedSong]:
        expected = dataset.digests.get(song.audio)
        return pool.submit(decode_song, dataset.root / song.audio, log_mel, data.longest_seconds, expected)

    try:
        with FeatureWriter(out, mel, made_from) as writer, ProgressBar("features", len(songs), "song", done=writer.done) as bar:
            song_with_sound = {song.sound_sha256: song.song_id for song in writer.songs}
            for song, decoding in _in_progress(songs[writer.done :], start, most=2 * threads):
                if should_stop():
                    raise Interrupted(f"features: stopped after {writer.done} of {len(songs)} songs")
                decoded = _usable_song(song, decoding, dataset.root, data, song_with_sound)
                if isinstance(decoded, Fault):
                    writer.leave_out(decoded)
                else:
                    digests = {"file_sha256": decoded.file_sha256, "sound_sha256": decoded.sound_sha256}
                    may_be_cut = bool(decoded.remark)
                    try:
                        writer.append(song, decoded.log_mel, **digests, may_be_cut=may_be_cut)
                        song_with_sound[decoded.sound_sha256] = song.song_id
                    except DataError as error:
                        writer.leave_out(Fault("undecodable audio", song.song_id, Path(song.audio).name, str(error)))
                if bar.advance_to(writer.done):
                    log.info("phase=features songs=%d/%d", writer.done, len(songs))
            faults = [*dataset.faults, *writer.faults]
            if writer.may_be_cut:
                log.warning("features: songs that may be cut, and are used as they are: %s", first_of(writer.may_be_cut))
            song_ids = {song.song_id for song in songs} | {fault.song_id for fault in faults} - {None}
            fail_or_leave_out(faults, len(song_ids), data, faults_table)
            if not writer.songs:
                raise DataError("data: no usable song is left. Correct data.source.")
    finally:
        pool.shutdown(cancel_futures=True)
    return faults


def _in_progress(
    songs: Sequence[Song], start: Callable[[Song], Future[DecodedSong]], most: int
) -> Iterator[tuple[Song, Future[DecodedSong]]]:
    """Each song, in order, with its decoding; at most `most` are started ahead."""
    started: deque[tuple[Song, Future[DecodedSong]]] = deque()
    waiting = iter(songs)
    while True:
        started += [(song, start(song)) for song in islice(waiting, most - len(started))]
        if not started:
            return
        yield started.popleft()


def _usable_song(
    song: Song, decoding: Future[DecodedSong], root: Path, data: DataConfig, song_with_sound: Mapping[str, int]
) -> DecodedSong | Fault:
    """The decoded song, or why it cannot be used. song_with_sound: digest of a sound → the earlier song that has it."""
    name = Path(song.audio).name
    try:
        decoded = decoding.result()
    except ChangedFileError:
        raise
    except DataError as error:
        remedy = ". Shorten it, or raise data.longest_seconds." if isinstance(error, TooLongError) else ""
        return Fault("undecodable audio", song.song_id, name, str(error).removeprefix(f"{root / song.audio}: ") + remedy)
    reasons = unfit_reasons(decoded, data, name_settings=True) or _cut_excerpt_reasons(song.song_id, decoded, data)
    if reasons:
        return Fault("unfit audio", song.song_id, name, "; ".join(reasons))
    original = song_with_sound.get(decoded.sound_sha256)
    if original is not None:
        return Fault("copied audio", song.song_id, name, f"is the sound of song {original}")
    return decoded
