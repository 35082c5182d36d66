"""Phase stage: the dataset's songs table and audio on a disk of ours."""

import logging
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from emotion.deam import dataset_files, find_dataset, write_songs
from emotion.errors import DataError, Interrupted
from emotion.faults import write_faults
from job.spec import GENERATED
from job.storage import copy_file, is_same_file, require_space

log = logging.getLogger(__name__)

GENERATED_SEED = 0
"""Made data is data: another seed of the job trains on the same songs."""


def source_facts(source: str) -> dict[str, Any]:
    """What the key of this phase is made of: the source, and name, size and time of every file that belongs to DEAM.

    Raises DataError where there is no such folder. Contents are not read here; the phases after this one go by digests.
    """
    if source.startswith(GENERATED):
        return {"generated": int(source.removeprefix(GENERATED)), "seed": GENERATED_SEED}
    root = Path(source)
    if not root.is_dir():
        raise DataError(
            f"data.source: there is no folder {root}. Name the folder that DEAM was unpacked into, or generated:N for made songs."
        )
    files = {}
    for path in dataset_files(root):
        facts = path.stat()
        files[path.relative_to(root).as_posix()] = [facts.st_size, facts.st_mtime_ns]
    return {"source": str(root.resolve()), "files": files}


def stage(source: str, out: Path, should_stop: Callable[[], bool]) -> None:
    """Write `songs.csv` (ids, labels, groups, audio files relative to `out`), `faults.csv` and the audio of usable songs.

    Faults are judged by the phase features, when those of the audio are known, too. Files that a stopped attempt copied whole
    are kept. Raises DataError for a wrong dataset, StorageError, Interrupted.
    """
    if source.startswith(GENERATED):
        from emotion.generated import generate_dataset  # numpy and soundfile, which planning a job needs not wait for

        generate_dataset(out, int(source.removeprefix(GENERATED)), GENERATED_SEED, should_stop)
        dataset = find_dataset(out)
    else:
        root = Path(source)
        found = find_dataset(root)
        renamed = [
            replace(song, audio=f"audio/{song.song_id}{Path(song.audio).suffix.lower()}") for song in found.songs
        ]
        dataset = replace(found, songs=renamed)
        copies = [
            (root / old.audio, out / new.audio)
            for old, new in zip(found.songs, dataset.songs, strict=True)
            if not is_same_file(root / old.audio, out / new.audio)
        ]
        total = sum(origin.stat().st_size for origin, _ in copies)
        require_space(out, total)
        started = time.monotonic()
        with tqdm(total=total, desc="stage", unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
            for done, (origin, target) in enumerate(copies):
                if should_stop():
                    raise Interrupted(f"stage: stopped after {done} of {len(copies)} files")
                copy_file(origin, target)
                bar.update(target.stat().st_size)
        log.info("phase=stage files=%d bytes=%d seconds=%.1f", len(copies), total, time.monotonic() - started)
    if dataset.faults:
        log.warning(
            "phase=stage faults=%d, the first: %s; the phase features reports all, with those of the audio",
            len(dataset.faults),
            dataset.faults[0],
        )
    write_songs(out / "songs.csv", dataset.songs)
    write_faults(out / "faults.csv", dataset.faults)
