"""Dataset manifests: expected sizes and digests of the files of a source.

    {"files": {"MEMD_audio/2.mp3": {"size": 724512, "sha256": "…"}, …}}

A staging uses `data.manifest`, else `dataset.json` at the source, else the manifest that an earlier staging from this source has
recorded in WORK/datasets.
"""

import json
import logging
import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from emotion.config import DataConfig
from emotion.data.foreign_files import found_instead
from emotion.data.layouts import has_songs_table, is_dataset_file
from emotion.errors import DataError, first_of, system_reason
from emotion.files import make_folder, write_text
from job.config import StorageConfig
from job.spec.location import parse_location
from job.storage.open import open_storage
from job.storage.protocol import Entry, Fetched, Storage

log = logging.getLogger(__name__)

DATASET_MANIFEST = "dataset.json"
SAME_AS = "as staged before, then by "


@dataclass(frozen=True)
class ManifestEntry:
    """The entry of a file in a manifest. Only in a manifest that a staging recorded: tag, the version of the file, and verified,
    what its bytes were verified against."""

    size: int
    sha256: str
    tag: str | None = None
    verified: str | None = None

    @property
    def fetched(self) -> Fetched:
        """The record of a file that was verified against this digest."""
        return Fetched(self.sha256, "sha256" if self.verified is None else f"{SAME_AS}{self.verified}")


@dataclass(frozen=True)
class DatasetManifest:
    """The files of a source by name. location: where the manifest was read, empty if there is none."""

    files: Mapping[str, ManifestEntry]
    location: str = ""


def read_dataset_manifest(
    data: DataConfig,
    config: StorageConfig,
    storage: Storage,
    recorded: Path,
    entries: Sequence[Entry],
    should_stop: Callable[[], bool],
) -> DatasetManifest:
    """The manifest of a source. storage, entries: those of the source. recorded: path of the manifest that a staging records.
    Raises DataError if the manifest is malformed, or a file that it lists is missing or has another size."""
    if data.manifest is not None:
        given = parse_location(data.manifest)
        location, raw = data.manifest, open_storage(given.parent, config, should_stop).read(given.name)
        if raw is None:
            raise DataError(f"data.manifest: there is no {location}. Correct the path or leave it out.")
    else:
        location, raw = f"{data.source}/{DATASET_MANIFEST}", storage.read(DATASET_MANIFEST)
    if raw is None:
        try:
            files = _parse(str(recorded), recorded.read_bytes())
        except FileNotFoundError:
            return DatasetManifest({})
        # Files that have changed since are unknown.
        versions = {(entry.name, entry.size, entry.tag) for entry in entries}
        files = {name: listed for name, listed in files.items() if (name, listed.size, listed.tag) in versions}
        return DatasetManifest(files, str(recorded))
    files = _parse(location, raw)
    sizes = {entry.name: entry.size for entry in entries}
    with_songs_table = has_songs_table(sizes)
    problems = [
        f"{name} is missing" if name not in sizes else f"{name} has {sizes[name]} bytes, expected {listed.size}"
        for name, listed in sorted(files.items())
        if sizes.get(name) != listed.size and is_dataset_file(name, with_songs_table)
    ]
    if problems:
        raise DataError(
            f"data.source: not what {location} lists: {first_of(problems)}. Copy them again, or correct the manifest."
        )
    return DatasetManifest(files, location)


def _parse(location: str, raw: bytes) -> dict[str, ManifestEntry]:
    if foreign := found_instead(raw):
        raise DataError(f"{location}: expected a dataset manifest in JSON, found {foreign}.")
    try:
        files = {
            name: ManifestEntry(listed["size"], listed["sha256"], listed.get("tag"), listed.get("verified"))
            for name, listed in json.loads(raw)["files"].items()
        }
        if not all(isinstance(one.size, int) and re.fullmatch("[0-9a-f]{64}", one.sha256) for one in files.values()):
            raise ValueError("a size is not an integer or a SHA-256 not 64 hex digits")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f'{location}: expected {{"files": {{NAME: {{"size": BYTES, "sha256": HEX}}}}}} '
            f"({type(error).__name__}: {error}). Fix or remove it."
        ) from error
    return files


def record_dataset_manifest(path: Path, source: str, entries: Mapping[str, Entry], fetched: Mapping[str, Fetched]) -> None:
    """Record the digests of staged files, so that the next staging into an empty scratch can verify them against these."""
    files = {
        name: asdict(ManifestEntry(entries[name].size, file.sha256, entries[name].tag, file.verified.removeprefix(SAME_AS)))
        for name, file in sorted(fetched.items())
    }
    try:
        make_folder(path.parent)
        # json's ASCII can also hold names that are not UTF-8. Several machines may write the file at the same time.
        text = json.dumps({"source": source, "files": files}, indent=1) + "\n"
        write_text(path, text, f".{socket.gethostname()}-{os.getpid()}")
    except OSError as error:
        log.warning("phase=stage %s cannot be written (%s): the next staging verifies less", path, system_reason(error))
