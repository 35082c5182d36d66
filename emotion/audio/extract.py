"""Phase features: every song is decoded once, judged, and written to the feature store."""

import hashlib
import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from emotion.audio.decoding import Array, decode_blocks
from emotion.audio.feature_store import FeatureWriter
from emotion.audio.mel import SILENCE_POWER, LogMel
from emotion.audio.mpeg import scan_mpeg
from emotion.config import DataConfig, MelConfig
from emotion.data.deam import LAST_EXCERPT_ID, Dataset, Song
from emotion.data.faults import Fault, judge
from emotion.errors import DataError, Interrupted, first_of
from emotion.files import sha256_of
from emotion.training.progress import LINE_SECONDS

log = logging.getLogger(__name__)


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
