"""The work that was lost at the end of an attempt: since the last file from which the next attempt resumes."""

import contextlib
from collections.abc import Mapping
from pathlib import Path

from emotion.files import read_json
from job.run_folder.attempts import paired, progress_paths, read_attempts
from job.run_folder.progress import PROGRESS

SIGNS_OF_LIFE = (".lease-*.json", PROGRESS, f"*/{PROGRESS}")  # the first is written every few seconds


def last_sign_of_life(run_folder: Path) -> float:
    """When the newest attempt last wrote, in seconds since 1970; 0 for none. Call it before a new lease replaces that of the
    attempt."""
    return max((_modified(path) for pattern in SIGNS_OF_LIFE for path in run_folder.glob(pattern)), default=0.0)


def cost_of_last_attempt(
    run_folder: Path, scratch: Path, progress_files: Mapping[str, tuple[str, ...]], alive_at: float
) -> dict[str, float]:
    """`lived_seconds` of the newest attempt, if it was killed, and its `lost_seconds`. Unknown values are left out, such as on
    another machine. alive_at: its last sign of life. The times come from the clocks of the attempt and of the file system."""
    pairs = paired(read_attempts(run_folder))
    if not pairs:
        return {}
    start, end = pairs[-1]
    ended_at = alive_at if end is None else end["time"]
    lived = ended_at - start["time"]
    if lived < 0:  # the signs of life are of another attempt
        return {}
    found = {"lived_seconds": round(lived, 3)} if end is None else {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        phase = read_json(run_folder / PROGRESS)
        saved_at = max(phase["time"], start["time"])
        if phase["state"] == "running":
            # The folder is in one of the two, or no longer exists.
            for parent in (run_folder, scratch):
                paths = progress_paths(parent, {phase["phase"]: progress_files[phase["phase"]]})
                saved = [_modified(path) for path in paths if path.is_relative_to(parent / phase["folder"])]
                saved_at = max([saved_at, *saved])
        found["lost_seconds"] = round(max(0.0, ended_at - saved_at), 3)
    return found


def _modified(path: Path) -> float:
    """Modification time in seconds since 1970; 0 if the file does not exist."""
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0
