"""Phase stage: the dataset's songs table and audio near, each file known to be right by as much as can be known of it.

A dataset manifest says which bytes a source should have:

    {"files": {"MEMD_audio/2.mp3": {"size": 724512, "sha256": "…"}, …}}

It is `data.manifest`, or `dataset.json` at the source, or what the first staging from that source has left in WORK/datasets.
"""

import json
import logging
import os
import re
import shutil
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from emotion.config import DataConfig
from emotion.data.deam import dataset_files, files_needed_to_join, find_dataset, is_dataset_file
from emotion.data.faults import write_faults
from emotion.data.songs import Dataset, write_songs
from emotion.errors import DataError, Interrupted, SpecError, StorageError, first_of
from emotion.files import digest_of, make_folder, sha256_of, write_text
from job.config import StorageConfig
from job.spec.location import S3, Generated, parse_location, parse_source
from job.storage.open import open_storage
from job.storage.protocol import AbsentError, Entry, Storage, WrongBytesError
from job.storage.transfer import in_parallel, is_same_file, refuse_names, require_space

log = logging.getLogger(__name__)

GENERATED_SEED = 0
"""Made data is data: another seed of the job trains on the same songs."""
DATASET_MANIFEST = "dataset.json"
NEAR = ".source"
"""In the phase's folder while it is unfinished: labels and metadata of a store."""
LINE_SECONDS = 10.0
SIZE = "size"
EARLIER = "earlier attempt"
"""How a file is known to be right that was found here: whoever put it here has checked it."""
SAME_AS = "as staged before, then by "


@dataclass(frozen=True)
class Known:
    """What a dataset manifest says of a file.

    Of one that a staging has left: tag, of which version of the file, and verified, by what that one knew it to be right.
    """

    size: int
    sha256: str
    tag: str | None = None
    verified: str | None = None

    @property
    def kind(self) -> str:
        """By what a file with this digest is known to be right."""
        return "sha256" if self.verified is None else f"{SAME_AS}{self.verified}"


def source_files(data: DataConfig, storage: StorageConfig, should_stop: Callable[[], bool]) -> dict[str, Any]:
    """For the key of this phase: the source, and name, size and version of every file that belongs to DEAM.

    The version is a modification time or, in object storage, an ETag. Raises DataError where there is no such folder. Contents
    are not read here: the keys of the phases after this one are made from digests.
    """
    source = parse_source(data.source)
    if isinstance(source, Generated):
        return {"generated": source.songs, "seed": GENERATED_SEED}
    if isinstance(source, S3):
        entries = dataset_entries(open_storage(source, storage, should_stop), str(source))
        return {"source": str(source), "files": {entry.name: [entry.size, entry.tag] for entry in entries}}
    root = source.path
    if not root.is_dir():
        raise DataError(
            f"data.source: there is no folder {root}. Name the folder that DEAM was unpacked into, or generated:N for generated "
            f"songs."
        )
    files = {entry.name: [entry.size, entry.mtime_ns] for entry in folder_entries(root)}
    return {"source": str(root.resolve()), "files": files}


def dataset_entries(place: Storage, source: str) -> list[Entry]:
    """The files of DEAM in a store, by name; a hundred thousand others cost no memory. Raises DataError for bad names."""
    found = []
    for entry in place.entries():
        *folders, name = entry.name.split("/")
        if is_dataset_file(name) and not any(re.match(r"\.[^.]", folder) for folder in folders):
            found.append(entry)
    if not found:
        raise DataError(
            f"data.source: there is no file of DEAM below {source}. Name the prefix that DEAM was copied to."
        )
    refuse_names([entry.name for entry in found], source)
    return sorted(found, key=lambda entry: entry.name)


def folder_entries(root: Path) -> list[Entry]:
    """The same of a folder, behind whose links other folders may lie."""
    found = []
    for path in dataset_files(root):
        facts = path.stat()
        name = path.relative_to(root).as_posix()
        found.append(Entry(name, facts.st_size, str(facts.st_mtime_ns), facts.st_mtime_ns))
    return found


def stage(
    data: DataConfig, storage: StorageConfig, manifests: Path, out: Path, should_stop: Callable[[], bool]
) -> tuple[dict[str, str], dict[str, Any]]:
    """Write `songs.csv` (ids, labels, groups, audio files relative to `out`), `faults.csv` and the audio of usable songs.

    Returns the digests of audio files as far as they were read for it, and notes: how many are known to be right by what.
    manifests: folder of the manifests that earlier stagings have left. Faults are judged by the phase features, when those of
    the audio are known, too. Files that a stopped attempt copied whole are kept, of others in a store the bytes that have come.
    Raises DataError for a wrong dataset, SpecError, StorageError, Interrupted.
    """
    digests: dict[str, str] = {}
    notes: dict[str, Any] = {}
    source = parse_source(data.source)
    if isinstance(source, Generated):
        # Imports numpy and soundfile, which planning a job need not wait for.
        from emotion.data.toy_dataset import generate_dataset

        generate_dataset(out, source.songs, GENERATED_SEED, should_stop)
        dataset = find_dataset(out)
    else:
        left = threading.Event()
        # Threads that are still at it when one of them has failed are to end, too.
        place = open_storage(source, storage, lambda: left.is_set() or should_stop())
        try:
            dataset, digests, notes = _brought(place, data, storage, manifests, out, should_stop)
        finally:
            left.set()
    if dataset.faults:
        log.warning(
            "phase=stage faults=%d, the first: %s; the phase features reports all, with those of the audio",
            len(dataset.faults),
            dataset.faults[0],
        )
    write_songs(out / "songs.csv", dataset.songs)
    write_faults(out / "faults.csv", dataset.faults)
    return digests, notes


def _brought(
    place: Storage,
    data: DataConfig,
    storage: StorageConfig,
    manifests: Path,
    out: Path,
    should_stop: Callable[[], bool],
) -> tuple[Dataset, dict[str, str], dict[str, Any]]:
    in_store = isinstance(parse_source(data.source), S3)
    entries = dataset_entries(place, data.source) if in_store else folder_entries(Path(data.source))
    left = manifests / f"{digest_of(data.source)[:12]}.json"
    known, said_by = _known(data, storage, place, left, entries, should_stop)
    link = _reads_in_place(data, out)
    root = out / NEAR if in_store else Path(data.source)
    files = [root / entry.name for entry in entries]
    by_name = {entry.name: entry for entry in entries}
    tables = [by_name[path.relative_to(root).as_posix()] for path in files_needed_to_join(files)]
    pairs = [(entry, root / entry.name) for entry in tables]
    brought = _fetch(place, "labels", pairs, known, said_by, storage, should_stop, link=not in_store)
    try:
        dataset = find_dataset(root, files)
    except DataError as error:
        raise DataError(str(error).replace(str(root), data.source)) from error
    renamed = [replace(song, audio=f"audio/{song.song_id}{Path(song.audio).suffix.lower()}") for song in dataset.songs]
    pairs = [(by_name[old.audio], out / new.audio) for old, new in zip(dataset.songs, renamed, strict=True)]
    brought |= _fetch(place, "audio", pairs, known, said_by, storage, should_stop, link)
    _leave_manifest(left, data.source, by_name, brought)
    if in_store:
        shutil.rmtree(out / NEAR)
    digests = {path.relative_to(out).as_posix(): brought[entry.name][0] for entry, path in pairs}
    return (
        Dataset(out, renamed, dataset.faults),
        digests,
        {"verified": dict(Counter(kind for _, kind in brought.values()))},
    )


def _reads_in_place(data: DataConfig, out: Path) -> bool:
    if isinstance(parse_source(data.source), S3):
        if data.copy_songs == "never":
            raise SpecError("data.copy: never is for folders; songs in a store have to be copied. Leave it out.")
        return False
    if data.copy_songs == "auto":
        return Path(data.source).stat().st_dev == out.stat().st_dev
    return data.copy_songs == "never"


def _fetch(
    place: Storage,
    what: str,
    pairs: Sequence[tuple[Entry, Path]],
    known: dict[str, Known],
    said_by: str,
    storage: StorageConfig,
    should_stop: Callable[[], bool],
    link: bool,
) -> dict[str, tuple[str, str]]:
    """Have each entry at its path: a copy or, with `link`, where it is. Name → (SHA-256, by what it is known to be right).

    Raises DataError that names all files that are damaged or not there.
    """
    found: dict[str, tuple[str, str]] = {}
    wrong: list[str] = []

    def bring(entry: Entry, path: Path) -> None:
        expected = known.get(entry.name)
        origin = Path(place.url) / entry.name
        try:
            if not _is_here(entry, path, link):
                if path == origin:
                    raise WrongBytesError(f"{path} changed while it was staged")
                if link:
                    path.unlink(missing_ok=True)
                    path.symlink_to(origin.resolve())
                else:
                    fetched = place.get(entry.name, path, expected.sha256 if expected else None, entry)
                    found[entry.name] = fetched.sha256, expected.kind if expected else fetched.verified
                    return
            digest = sha256_of(path)
            if expected is not None and expected.sha256 != digest:
                if not link:
                    # A copy that was changed here.
                    place.get(entry.name, path, expected.sha256, entry)
                    digest = expected.sha256
                else:
                    raise WrongBytesError(f"{path} is damaged: its SHA-256 is {digest}, expected {expected.sha256}")
            found[entry.name] = digest, expected.kind if expected else SIZE if link else EARLIER
        except (AbsentError, WrongBytesError) as error:
            if path != origin:
                path.unlink(missing_ok=True)
            wrong.append(f"{entry.name}: {error}")
        except OSError as error:
            raise StorageError.of(error) from error

    missing = [(entry, path) for entry, path in pairs if not _is_here(entry, path, link)]
    for folder in {path.parent for _, path in missing}:
        try:
            make_folder(folder)
        except OSError as error:
            raise StorageError.of(error, f"storage: cannot make {folder}: {error.strerror}.") from error
    if missing:
        require_space(missing[0][1].parent, 0 if link else sum(entry.size for entry, _ in missing), len(missing))
    sizes = [entry.size for entry, _ in pairs]
    began = told = time.monotonic()
    done = count = 0
    with tqdm(total=sum(sizes), desc=what, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        tasks = [lambda entry=entry, path=path: bring(entry, path) for entry, path in pairs]
        try:
            for finished in in_parallel(tasks, storage.connections, should_stop):
                moved = sum(sizes[index] for index in finished)
                done, count = done + moved, count + len(finished)
                bar.update(moved)
                now = time.monotonic()
                if now - told >= LINE_SECONDS and not sys.stderr.isatty():
                    told = now
                    rate = done / (now - began) / 1e6
                    log.info("phase=stage %s files=%d/%d bytes=%d mb_per_s=%.1f", what, count, len(sizes), done, rate)
        except Interrupted as interrupted:
            raise Interrupted(f"stage: stopped after {count} of {len(sizes)} files of {what}") from interrupted
    if wrong:
        raise DataError(
            f"data.source: {len(wrong)} of {len(pairs)} files in {place.url} are damaged or gone: {first_of(sorted(wrong))}. "
            f"Put the right ones there{f', or correct {said_by}' if said_by else ''}; what is whole is kept."
        )
    log.info("phase=stage %s files=%d bytes=%d seconds=%.1f", what, len(pairs), done, time.monotonic() - began)
    return found


def _is_here(entry: Entry, path: Path, link: bool) -> bool:
    """Whether a file is at its path: a copy of it, which no link is, or with `link` where a link leads to."""
    return is_same_file(path, entry) and (link or not path.is_symlink())


# Dataset manifests


def _known(
    data: DataConfig,
    storage: StorageConfig,
    place: Storage,
    left: Path,
    entries: Sequence[Entry],
    should_stop: Callable[[], bool],
) -> tuple[dict[str, Known], str]:
    """What a manifest says of these files, and which one. Raises DataError where a file is not there, or has another size."""
    if data.manifest is not None:
        location = parse_location(data.manifest)
        where, raw = data.manifest, open_storage(location.parent, storage, should_stop).read(location.name)
        if raw is None:
            raise DataError(f"data.manifest: there is no {where}. Correct the path or leave it out.")
    else:
        where, raw = f"{data.source}/{DATASET_MANIFEST}", place.read(DATASET_MANIFEST)
    if raw is None:
        try:
            known = _parsed(str(left), left.read_bytes())
        except FileNotFoundError:
            return {}, ""
        # Of a file that has changed since, it says nothing.
        return {entry.name: known[entry.name] for entry in entries if _is_of(entry, known.get(entry.name))}, str(left)
    known = _parsed(where, raw)
    sizes = {entry.name: entry.size for entry in entries}
    problems = [
        f"{name} is missing" if name not in sizes else f"{name} has {sizes[name]} bytes, expected {facts.size}"
        for name, facts in sorted(known.items())
        if sizes.get(name) != facts.size and is_dataset_file(name.rpartition("/")[2])
    ]
    if problems:
        raise DataError(
            f"data.source: {len(problems)} files are not what {where} says: {first_of(problems)}. Copy them again, or correct it."
        )
    return known, where


def _is_of(entry: Entry, known: Known | None) -> bool:
    return known is not None and (known.size, known.tag) == (entry.size, entry.tag)


def _parsed(where: str, raw: bytes) -> dict[str, Known]:
    try:
        files = json.loads(raw)["files"]
        known = {
            name: Known(facts["size"], facts["sha256"], facts.get("tag"), facts.get("verified"))
            for name, facts in files.items()
        }
        if not all(isinstance(one.size, int) and re.fullmatch("[0-9a-f]{64}", one.sha256) for one in known.values()):
            raise ValueError("a size is no whole number or a SHA-256 no 64 digits")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f'{where}: expected {{"files": {{NAME: {{"size": BYTES, "sha256": HEX}}}}}}, found another thing '
            f"({type(error).__name__}: {error}). Mend or remove it."
        ) from error
    return known


def _leave_manifest(left: Path, source: str, entries: dict[str, Entry], brought: dict[str, tuple[str, str]]) -> None:
    """So that the next staging from this source, into an emptied scratch, knows more than a store says."""
    files = {
        name: {
            "size": entries[name].size,
            "sha256": digest,
            "tag": entries[name].tag,
            "verified": kind.removeprefix(SAME_AS),
        }
        for name, (digest, kind) in sorted(brought.items())
    }
    try:
        make_folder(left.parent)
        # In ASCII, which can also say names that are no UTF-8. Several machines may leave it at one time.
        text = json.dumps({"source": source, "files": files}, indent=1) + "\n"
        write_text(left, text, f".{socket.gethostname()}-{os.getpid()}")
    except OSError as error:
        log.warning("phase=stage %s cannot be written (%s): the next staging knows less", left, error.strerror)
