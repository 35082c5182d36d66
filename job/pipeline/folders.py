"""The folders of --work and --scratch, and the run folder."""

import stat
from dataclasses import dataclass
from pathlib import Path

from emotion.characters import problem_of_path
from emotion.errors import SpecError, printable, system_reason
from emotion.files import make_folder
from job.machine.disk import BROKEN, disk_failure, refuse_folders
from job.spec.location import parse_path
from job.spec.model import JobSpec, run_name
from job.storage.local_folder import require_possible_folder


@dataclass(frozen=True)
class JobFolders:
    """Absolute paths. work: must survive a preemption; scratch: can be computed again, and jobs may share it."""

    work: Path
    scratch: Path

    def run_folder(self, spec: JobSpec) -> Path:
        return self.work / run_name(spec)


LONGEST_PATH_BYTES = 3072  # of 4096: the rest is left for names of songs and checkpoints below work and scratch


def job_folders(work: Path, scratch: Path | None) -> JobFolders:
    """The folders that the command line names. scratch: by default a folder in work. Raises SpecError for a path that cannot be
    a folder, NodeError if the disk has failed."""
    folders = JobFolders(_folder("--work", work), _folder("--scratch", scratch or work / "scratch"))
    for option, folder in (("--work", folders.work), ("--scratch", folders.scratch)):
        problem = problem_of_path(str(folder)) or _problem_of_folder(folder)
        if problem:
            raise SpecError(f"{option}: {printable(folder)} {problem}. Name another folder.")
    return folders


def _problem_of_folder(folder: Path) -> str | None:
    length = len(str(folder).encode())
    if length > LONGEST_PATH_BYTES:
        return f"has {length} bytes, which leaves no room for the names below it, at most {LONGEST_PATH_BYTES} do"
    for path in (folder, *folder.parents):
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            if path.is_symlink():
                return f"cannot be made: {path} is a link to nowhere"
            continue
        except NotADirectoryError:
            continue  # one of the parents is the reason
        except PermissionError:
            return None  # it is reported, with another exit code, when the folder is made
        except OSError as error:
            if error.errno in BROKEN:
                raise disk_failure(error) from error
            return f"cannot be a folder ({error.strerror})"
        return None if stat.S_ISDIR(mode) else f"cannot be a folder: {'there' if path == folder else path} is a file"
    return None


def _folder(option: str, path: Path) -> Path:
    try:
        return parse_path(str(path))
    except ValueError as error:
        raise SpecError(f"{option}: {error}") from None


def make_folders(spec: JobSpec, folders: JobFolders) -> Path:
    """Create the run folder and scratch. Returns the run folder. Raises StorageError; NodeError for a broken disk; SpecError for
    a file in the place of a folder, and as refuse_folders does."""
    refuse_folders(spec, folders.work, folders.scratch)
    run_folder = folders.run_folder(spec)
    needed = {"--work": run_folder, "--scratch": folders.scratch}
    if spec.destination is None:
        needed |= {"published in --work": folders.work / "published"}
    try:
        for name, folder in needed.items():
            require_possible_folder(folder, name)
        make_folder(run_folder)
        make_folder(folders.scratch)
    except OSError as error:
        raise disk_failure(
            error, f"{error.filename}: cannot make this folder ({system_reason(error)}); see --work, --scratch."
        ) from error
    return run_folder
