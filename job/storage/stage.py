"""Phase stage: puts the dataset's songs table and audio into scratch, and verifies every file as strictly as possible.
Read `stage` first; see dataset_manifest for the digests that files are verified against."""

import logging
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from emotion.config import DataConfig
from emotion.data import deam
from emotion.data.dynamic import dynamic_points, write_dynamic
from emotion.data.faults import write_faults
from emotion.data.genres import write_genres
from emotion.data.label_scale import DEAM_SCALE, Scale
from emotion.data.layouts import (
    dataset_files,
    files_needed_to_join,
    find_dataset,
    has_label_files,
    has_songs_table,
    is_dataset_file,
)
from emotion.data.songs import Dataset, Song, write_songs
from emotion.data.songs_table import SONGS_TABLE
from emotion.data.unused import HIDDEN, MISNAMED, WARNED, Unused
from emotion.errors import DataError, Interrupted, SpecError, StorageError, first_of, system_reason
from emotion.files import digest_of, make_folder, read_json, sha256_of, write_json
from emotion.progress_bar import ProgressBar
from job.config import StorageConfig
from job.spec.location import S3, Generated, StoredLocation, parse_source
from job.storage.dataset_manifest import DatasetManifest, read_dataset_manifest, record_dataset_manifest
from job.storage.local_folder import entry_of
from job.storage.open import open_storage
from job.storage.protocol import AbsentError, Entry, Fetched, Storage, WrongBytesError
from job.storage.transfer import file_name, in_parallel, is_same_file, refuse_names, require_space

log = logging.getLogger(__name__)

GENERATED_SEED = 0  # generated songs are data: they are the same for every seed of the job
FETCHED_LABELS = ".source"  # folder in that of the phase, for labels and metadata from object storage, while the phase runs
SCALE_FILE = "scale.json"  # scale of the ratings, if it is not DEAM's: {"scale": [lowest, highest]}
EARLIER = "earlier attempt"  # value of `verified` for a copy that an earlier attempt fetched and verified


@dataclass(frozen=True)
class Staging:
    """The parameters of a staging. threads: number of files that are fetched at the same time."""

    source: StoredLocation
    storage: Storage
    manifest: DatasetManifest
    threads: int
    should_stop: Callable[[], bool]


@dataclass(frozen=True)
class Copy:
    """A file of the source and its target path. link: whether to make a symlink to the source instead of a copy."""

    entry: Entry
    path: Path
    link: bool

    @property
    def is_finished(self) -> bool:
        """Whether the file is at its path. If a copy is wanted, a symlink does not count."""
        return is_same_file(self.path, self.entry) and (self.link or not self.path.is_symlink())


def source_files(data: DataConfig, config: StorageConfig, should_stop: Callable[[], bool]) -> dict[str, Any]:
    """Parts of the key of this phase: the source, and name, size and version (time or ETag) of every file of the dataset.
    Contents are not read here: the keys of later phases contain their digests. Raises DataError if there is no such folder."""
    source = parse_source(data.source)
    scale = {} if data.scale is None else {"scale": [*data.scale]}
    if isinstance(source, Generated):
        return {"generated": source.songs, "seed": GENERATED_SEED, **scale}
    if isinstance(source, S3):
        entries = dataset_entries(open_storage(source, config, should_stop), str(source))
        return {"source": str(source), "files": {entry.name: [entry.size, entry.tag] for entry in entries}, **scale}
    root = source.path
    if not root.is_dir():
        raise absent_source(root)
    files = {entry.name: [entry.size, entry.mtime_ns] for entry in folder_entries(root)}
    return {"source": str(root.resolve()), "files": files, **scale}


def absent_source(root: Path) -> DataError:
    return DataError(
        f"data.source: there is no folder {root}. Name the folder that holds the songs, or generated:N for generated songs."
    )


def dataset_entries(storage: Storage, source: str, unused: Unused | None = None) -> list[Entry]:
    """The files of the dataset in object storage, sorted by name. Other files cost no memory. Raises DataError if there are no
    labels, and for unsafe names. unused: receives the names of other files."""
    unused = Unused() if unused is None else unused
    found = []
    for entry in storage.entries():
        folders = entry.name.split("/")[:-1]
        if any(re.match(r"\.[^.]", folder) for folder in folders):
            unused.add(entry.name, HIDDEN)
        # The layout is known only at the end of the listing.
        elif is_dataset_file(entry.name, True) or is_dataset_file(entry.name, False):
            found.append(entry)
        else:
            unused.add(entry.name)
    with_songs_table = has_songs_table({entry.name for entry in found})
    for entry in found:
        if not is_dataset_file(entry.name, with_songs_table):
            unused.add(entry.name)
    found = [entry for entry in found if is_dataset_file(entry.name, with_songs_table)]
    if not found and not unused.counts:
        raise DataError(f"data.source: there is nothing below {source}. Name the prefix that the dataset was copied to.")
    if not with_songs_table and not has_label_files([PurePosixPath(entry.name) for entry in found]):
        # Only a label table depends on the names of songs: without one, renaming would not help.
        raise DataError(
            f"data.source: there is no {source}/{SONGS_TABLE}, and below {source} no label table of DEAM, EmoMusic or PMEmo. "
            f"Copy a {SONGS_TABLE} there, with the columns file,valence,arousal and a row for each song, or name the prefix that "
            f"the dataset was copied to.{unused.hint(MISNAMED)}"
        )
    by_file: dict[str, str] = {}
    for entry in found:
        if (other := by_file.setdefault(file_name(entry.name), entry.name)) != entry.name:
            raise DataError(
                f"{source}: {other!r} and {entry.name!r} differ by slashes alone. Rename one there; nothing was copied."
            )
    refuse_names(list(by_file), source)
    return sorted(found, key=lambda entry: entry.name)


def folder_entries(root: Path, unused: Unused | None = None) -> list[Entry]:
    """The files of the dataset in a folder, also behind symlinks to other folders. unused: receives the names of other files."""
    return [entry_of(path, root) for path in dataset_files(root, unused)]


def stage(
    data: DataConfig, config: StorageConfig, manifests: Path, out: Path, should_stop: Callable[[], bool]
) -> tuple[dict[str, str], dict[str, Any]]:
    """Write `songs.csv` (ids, labels, groups, audio files relative to `out`), `faults.csv`, SCALE_FILE, the audio of usable
    songs and, if the dataset has dynamic annotations, DYNAMIC_TABLE.
    manifests: folder of the dataset manifests that stagings record. Returns the SHA-256 of audio files that were read, and notes:
    how many files were verified against what. The phase features decides about faults, together with those of the audio. After a
    stop, complete copies are kept, and partial ones of files from object storage. Raises DataError for a wrong dataset,
    SpecError, StorageError, Interrupted."""
    digests: dict[str, str] = {}
    notes: dict[str, Any] = {}
    source = parse_source(data.source)
    if isinstance(source, Generated):
        # Imported only now: it imports numpy and soundfile, which planning a job does not need.
        from emotion.data.toy_dataset import generate_dataset

        if data.scale is not None:
            raise SpecError("data.scale: generated songs have a scale of their own; leave data.scale out.")
        generate_dataset(out, source.songs, GENERATED_SEED, should_stop)
        # deam's own find_dataset, as the songs.csv of an earlier attempt may be there.
        dataset = deam.find_dataset(out)
    else:
        ended = threading.Event()
        # After a failure, `ended` stops threads that still wait for object storage.
        storage = open_storage(source, config, lambda: ended.is_set() or should_stop())
        unused = Unused()
        entries = dataset_entries(storage, str(source), unused) if isinstance(source, S3) else folder_entries(source.path, unused)
        recorded = manifests / f"{digest_of(data.source)[:12]}.json"
        try:
            manifest = read_dataset_manifest(data, config, storage, recorded, entries, should_stop)
            staging = Staging(source, storage, manifest, config.connections, should_stop)
            link_songs = _links_songs(source, data.copy_songs, out)
            by_file = {file_name(entry.name): entry for entry in entries}
            dataset, fetched, digests = _fetch_dataset(staging, by_file, out, link_songs, unused, data.scale)
        finally:
            ended.set()
        record_dataset_manifest(recorded, data.source, {entry.name: entry for entry in entries}, fetched)
        notes = {"verified": dict(Counter(file.verified for file in fetched.values()))}
        if unused.counts:
            notes["not_used"] = dict(unused.counts)
    write_songs(out / "songs.csv", dataset.songs)
    write_faults(out / "faults.csv", dataset.faults)
    if dataset.scale != DEAM_SCALE:
        write_json(out / SCALE_FILE, {"scale": [*dataset.scale]})
    return digests, notes


def staged_scale(folder: Path) -> Scale:
    """The scale of the ratings in a folder that `stage` has written."""
    if not (folder / SCALE_FILE).exists():
        return DEAM_SCALE
    low, high = read_json(folder / SCALE_FILE)["scale"]
    return low, high


def _links_songs(source: StoredLocation, copy_songs: str, out: Path) -> bool:
    """Whether songs are read in place, through symlinks. copy_songs: auto, always, never."""
    if isinstance(source, S3):
        if copy_songs == "never":
            raise SpecError("data.copy: never is for folders; songs in object storage have to be copied. Leave it out.")
        return False
    if copy_songs == "auto":
        return source.path.stat().st_dev == out.stat().st_dev
    return copy_songs == "never"


def _fetch_dataset(
    staging: Staging, entries: dict[str, Entry], out: Path, link_songs: bool, unused: Unused, scale: Scale | None
) -> tuple[Dataset, dict[str, Fetched], dict[str, str]]:
    """Fetch labels, join them with the songs, fetch the audio of usable songs. entries: file name → entry.
    Returns the dataset; name in the source → fetched file; path of an audio file relative to `out` → SHA-256."""
    in_place = not isinstance(staging.source, S3)  # labels in a folder are read there
    root = out / FETCHED_LABELS if isinstance(staging.source, S3) else staging.source.path
    files = [root / name for name in entries]
    tables = [Copy(entries[path.relative_to(root).as_posix()], path, in_place) for path in files_needed_to_join(root, files)]
    fetched = _fetch(staging, "labels", tables)
    try:
        dataset = find_dataset(root, files, unused, scale)
    except (DataError, SpecError) as error:
        raise type(error)(str(error).replace(str(root), str(staging.source))) from error
    if points := dynamic_points(root, files, {song.song_id for song in dataset.songs}):
        write_dynamic(out, points)
    for why, line in unused.lines().items():
        log.log(logging.WARNING if why in WARNED else logging.INFO, "phase=stage %s", line)
    if in_place:
        for table in tables:
            if sha256_of(table.path) != fetched[table.entry.name].sha256:
                raise DataError(f"data.source: {table.path} changed while it was read. Run it again.")
    write_genres(out, [table.path for table in tables])
    songs = [replace(song, audio=_staged_name(song)) for song in dataset.songs]
    pairs = zip(dataset.songs, songs, strict=True)
    audio = [Copy(entries[found.audio], out / song.audio, link_songs) for found, song in pairs]
    fetched |= _fetch(staging, "audio", audio)
    if not in_place:
        shutil.rmtree(root)
    digests = {copy.path.relative_to(out).as_posix(): fetched[copy.entry.name].sha256 for copy in audio}
    return Dataset(out, songs, dataset.faults, scale=dataset.scale), fetched, digests


def _staged_name(song: Song) -> str:
    """The name of a song's file relative to the phase's folder: made from its number, or from its path in the dataset."""
    return f"audio/{song.song_id}{'' if isinstance(song.song_id, str) else Path(song.audio).suffix.lower()}"


def _fetch(staging: Staging, title: str, copies: Sequence[Copy]) -> dict[str, Fetched]:
    """Fetch each file that is not at its path yet. Returns name → how the file was verified. title: for the log.
    Raises DataError that names all damaged or missing files; the others are kept."""
    fetched: dict[str, Fetched] = {}
    wrong: list[str] = []

    def fetch(copy: Copy) -> None:
        try:
            fetched[copy.entry.name] = _fetch_file(staging, copy)
        except (AbsentError, WrongBytesError) as error:
            wrong.append(f"{copy.entry.name}: {error}")
        except OSError as error:
            raise StorageError.of(error) from error

    _prepare_folders([copy for copy in copies if not copy.is_finished])
    began = time.monotonic()
    tasks = [lambda copy=copy: fetch(copy) for copy in copies]
    sizes = [copy.entry.size for copy in copies]
    _run_with_progress(title, tasks, sizes, staging)
    if wrong:
        manifest = f", or correct {staging.manifest.location}" if staging.manifest.location else ""
        raise DataError(
            f"data.source: {len(wrong)} of {len(copies)} files in {staging.storage.url} are damaged or missing: "
            f"{first_of(sorted(wrong))}. Put the right ones there{manifest}; finished copies are kept."
        )
    seconds = time.monotonic() - began
    log.info("phase=stage %s files=%d bytes=%d seconds=%.1f", title, len(copies), sum(sizes), seconds)
    return fetched


def _fetch_file(staging: Staging, copy: Copy) -> Fetched:
    """Fetch one file unless it is at its path, and verify it. Raises OSError, and WrongBytesError or AbsentError, which leave
    nothing at the path."""
    entry, path = copy.entry, copy.path
    expected = staging.manifest.files.get(entry.name)
    origin = Path(staging.storage.url, entry.name)

    def fetch() -> Fetched:
        fetched = staging.storage.get(entry.name, path, expected.sha256 if expected else None, entry)
        return expected.fetched if expected else fetched

    try:
        if not copy.is_finished:
            if path == origin:
                raise WrongBytesError(f"{path} changed while it was staged")
            if not copy.link:
                return fetch()
            path.unlink(missing_ok=True)
            path.symlink_to(origin.resolve())
        digest = sha256_of(path)
        if expected is None:
            return Fetched(digest, "size" if copy.link else EARLIER)
        if expected.sha256 != digest:
            if not copy.link:
                return fetch()  # the copy was changed after an earlier attempt made it
            raise WrongBytesError(f"{path} is damaged: its SHA-256 is {digest}, expected {expected.sha256}")
        return expected.fetched
    except (AbsentError, WrongBytesError):
        if path != origin:
            path.unlink(missing_ok=True)
        raise


def _prepare_folders(missing: Sequence[Copy]) -> None:
    """Create the folders of the files to fetch, and require enough free space."""
    for folder in {copy.path.parent for copy in missing}:
        try:
            make_folder(folder)
        except OSError as error:
            raise StorageError.of(error, f"storage: cannot make {folder}: {system_reason(error)}.") from error
    if missing:
        needed_bytes = sum(copy.entry.size for copy in missing if not copy.link)
        require_space(missing[0].path.parent, needed_bytes, len(missing))


def _run_with_progress(title: str, tasks: Sequence[Callable[[], None]], sizes: Sequence[int], staging: Staging) -> None:
    """Run tasks in parallel, with a progress bar on a terminal and occasional lines in the log. sizes: bytes of each task."""
    began = time.monotonic()
    done_bytes = done = 0
    with ProgressBar(f"stage {title}", sum(sizes), in_bytes=True) as bar:
        try:
            for finished in in_parallel(tasks, staging.threads, staging.should_stop):
                done_bytes, done = done_bytes + sum(sizes[index] for index in finished), done + len(finished)
                if bar.advance_to(done_bytes, [f"{done} of {len(tasks)} files"]) and done < len(tasks):
                    rate = done_bytes / (time.monotonic() - began) / 1e6
                    progress = (title, done, len(tasks), done_bytes, rate)
                    log.info("phase=stage %s files=%d/%d bytes=%d mb_per_s=%.1f", *progress)
        except Interrupted as interrupted:
            raise Interrupted(f"stage: stopped after {done} of {len(tasks)} files of {title}") from interrupted
