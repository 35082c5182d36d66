"""Phase features: decode every song once, check it, and write its log-mel and tonality to the feature store."""

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import astuple
from pathlib import Path

from emotion.audio.decoding import TooLongError
from emotion.audio.feature_store import FeatureWriter
from emotion.audio.mel import LogMel
from emotion.audio.song_decoding import ChangedFileError, DecodedSong
from emotion.audio.song_workers import SongDecoders, Workers
from emotion.config import DataConfig, MelConfig
from emotion.data.faults import Fault, fail_or_leave_out
from emotion.data.song_ids import SongId, is_full_song
from emotion.data.songs import Dataset, Song
from emotion.errors import DataError, Interrupted, first_of
from emotion.progress_bar import ProgressBar
from emotion.threads import started_ahead

log = logging.getLogger(__name__)


def unfit_reasons(decoded: DecodedSong, data: DataConfig, *, name_settings: bool) -> dict[str, str]:
    """Reasons why a decoded sound is unusable as a song: kind → sentence; empty if it is usable.

    name_settings: whether the reader can change the limits, in a spec.
    """

    def limit(setting: str) -> str:
        return f"{f'data.{setting} ' if name_settings else ''}{getattr(data, setting):g}"

    reasons = {}
    if decoded.seconds < data.shortest_seconds:
        reasons["short"] = f"lasts {decoded.seconds:.2f} s, expected at least {limit('shortest_seconds')}"
    if decoded.rms_db < data.silence_db:
        reasons["silent"] = f"is silent, channels averaged: RMS {decoded.rms_db:.1f} dB, expected {limit('silence_db')} or more"
    if decoded.peak > data.largest_peak:
        reasons["peak"] = f"has a peak of {decoded.peak:.3g}, expected at most {limit('largest_peak')}"
    return reasons


def _cut_excerpt_reasons(song_id: SongId, decoded: DecodedSong, data: DataConfig) -> list[str]:
    if data.excerpt_seconds and not is_full_song(song_id) and decoded.seconds < data.excerpt_seconds - 1:
        expected = f"data.excerpt_seconds {data.excerpt_seconds:g}"
        return [f"is cut: lasts {decoded.seconds:.2f} s, expected an excerpt of {expected}"]
    return []


def extract_features(
    dataset: Dataset,
    data: DataConfig,
    mel: MelConfig,
    *,
    out: Path,
    faults_table: Path | None,
    workers: Workers,
    should_stop: Callable[[], bool],
) -> list[Fault]:
    """Write log-mels and tonality of whole songs, in the order of the dataset, to a feature store in `out`. Returns all faults.

    Songs whose audio cannot be decoded, is unusable or repeats another song are faults and are left out. All faults of the
    dataset are reported here, in `faults_table` (see `fail_or_leave_out`); None leaves that to the caller. At most two songs per
    worker are in progress, to bound memory; how many workers there are changes no byte.

    Raises Interrupted when asked to stop, which is checked before each song; the next attempt resumes behind the last durable
    song (see FeatureWriter). Raises DataError after the last song, and at once for a file that is not the one in
    `dataset.digests`; `out` is then empty. Raises LimitError or ModelError, which name the song, where a worker process dies.
    """
    songs, log_mel = dataset.songs, LogMel(mel)
    made_from = {"songs": [astuple(song) for song in songs], "data": data.model_dump(exclude={"source"})}
    with (
        SongDecoders(log_mel, data.longest_seconds, workers, songs=len(songs)) as decoders,
        FeatureWriter(out, mel, made_from, dataset.scale) as writer,
        ProgressBar("features", len(songs), done=writer.done) as bar,
    ):

        def start(song: Song) -> Future[DecodedSong]:
            return decoders.start(dataset.root / song.audio, dataset.digests.get(song.audio))

        song_with_sound = {song.sound_sha256: song.song_id for song in writer.songs}
        rest = songs[writer.done :]
        for song, decoding in zip(rest, started_ahead(start, rest, most=2 * decoders.count), strict=True):
            if should_stop():
                raise Interrupted(f"features: stopped after {writer.done} of {len(songs)} songs")
            decoded = _usable_song(song, decoding, dataset.root, data, song_with_sound)
            if isinstance(decoded, Fault):
                writer.leave_out(decoded)
            else:
                digests = {"file_sha256": decoded.file_sha256, "sound_sha256": decoded.sound_sha256}
                may_be_cut = bool(decoded.remark)
                try:
                    writer.append(song, decoded.log_mel, tonality=decoded.tonality, may_be_cut=may_be_cut, **digests)
                    song_with_sound[decoded.sound_sha256] = song.song_id
                except DataError as error:
                    writer.leave_out(Fault("undecodable audio", song.song_id, Path(song.audio).name, str(error)))
            if bar.advance_to(writer.done):
                log.info("phase=features songs=%d/%d", writer.done, len(songs))
        faults = [*dataset.faults, *writer.faults]
        if writer.may_be_cut:
            log.warning("features: songs that may be cut, and are used as they are: %s", first_of(writer.may_be_cut))
        song_ids = {song.song_id for song in songs} | {fault.song_id for fault in faults} - {None}
        if faults_table is not None:
            fail_or_leave_out(faults, len(song_ids), data, faults_table)
        if not writer.songs:
            raise DataError("data: no usable song is left. Correct data.source.")
    return faults


def _usable_song(
    song: Song, decoding: Future[DecodedSong], root: Path, data: DataConfig, song_with_sound: Mapping[str, SongId]
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
    reasons = [*unfit_reasons(decoded, data, name_settings=True).values()] or _cut_excerpt_reasons(song.song_id, decoded, data)
    if reasons:
        return Fault("unfit audio", song.song_id, name, "; ".join(reasons))
    original = song_with_sound.get(decoded.sound_sha256)
    if original is not None:
        return Fault("copied audio", song.song_id, name, f"is the sound of song {original}")
    return decoded
