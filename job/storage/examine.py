"""Examines data.source for `check` and `plan`: songs, faults of labels and names, and files that a job will not use.
It decodes no audio, imports no torch and copies nothing."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from emotion.config import DataConfig, SplitConfig
from emotion.data.faults import Fault, refusal
from emotion.data.foreign_files import FIRST_BYTES, found_instead
from emotion.data.layouts import dataset_files, description, find_dataset
from emotion.data.songs import Song
from emotion.data.splits import make_split
from emotion.data.unused import Unused
from emotion.errors import DataError, StorageError, printable
from job.config import StorageConfig
from job.spec.location import S3, Local, parse_source


@dataclass(frozen=True)
class Examined:
    """The result. lines: what was found. refusal: why the phase features would refuse the dataset; None if no reason is known.
    songs: number of usable songs; in object storage, number of files of the dataset; None if unknown."""

    lines: list[str]
    refusal: str | None = None
    songs: int | None = None


def examine_source(
    data: DataConfig,
    storage: StorageConfig,
    should_stop: Callable[[], bool] = lambda: False,
    *,
    split: SplitConfig | None = None,
    remote: bool = True,
) -> Examined:
    """Examine a source. split: a split to try on the songs, too. remote: also list object storage; labels are not fetched.

    Raises DataError for a folder without labels or audio, SpecError for a scale that is missing or not wanted, StorageError,
    Interrupted.
    """
    source = parse_source(data.source)
    if isinstance(source, Local):
        return _examine_folder(source.path, data, split)
    if not isinstance(source, S3):
        return Examined([], songs=source.songs)
    if not remote:
        return Examined([f"data: {source} was not looked at; `emotion-job plan` lists it"])
    from job.storage.open import open_storage
    from job.storage.stage import dataset_entries

    unused = Unused()
    entries = dataset_entries(open_storage(source, storage, should_stop), str(source), unused)
    found = f"data: {len(entries)} label, metadata and audio files, {sum(entry.size for entry in entries) / 1e6:.1f} MB"
    return Examined([found, *unused.lines().values()], songs=len(entries))


def _examine_folder(root: Path, data: DataConfig, split: SplitConfig | None) -> Examined:
    unused = Unused()
    dataset = find_dataset(root, dataset_files(root, unused), unused, data.scale)
    pointers = [fault for song in dataset.songs if (fault := _pointer(root, song))]
    faults = [*dataset.faults, *pointers]
    unusable = {fault.song_id for fault in faults if fault.song_id is not None}
    songs = {song.song_id for song in dataset.songs} | unusable
    lines = [f"data: {len(songs) - len(unusable)} of {len(songs)} songs can be used, as far as labels and names of files show"]
    lines += [text] if (text := description(dataset)) else []
    report = refusal(faults, len(songs), data, "before any audio is decoded")
    if report is None:
        lines += [f"left out: {fault}" for fault in faults]
        # With dropped faults, lists may leave out songs whose broken audio is only found later.
        if split is not None and not (split.protocol == "lists" and data.faults == "drop"):
            usable = [song for song in dataset.songs if song.song_id not in unusable]
            ids, groups = [song.song_id for song in usable], [song.group for song in usable]
            labels = [(song.valence, song.arousal) for song in usable]
            try:
                make_split(ids, groups, split, unusable, [song.split for song in usable], labels)
            except DataError as error:
                report = str(error)
    return Examined([*lines, *unused.lines().values()], report, len(songs) - len(unusable))


def _pointer(root: Path, song: Song) -> Fault | None:
    """The fault of a song whose audio file is really a pointer or a web page; None otherwise. Only small files are read."""
    path = root / song.audio
    try:
        if path.stat().st_size > 64 * FIRST_BYTES:
            return None
        with path.open("rb") as file:
            found = found_instead(file.read(FIRST_BYTES))
    except OSError as error:
        raise StorageError.of(error) from error
    return Fault("undecodable audio", song.song_id, printable(song.audio), f"expected audio, found {found}") if found else None
