"""The folders of --work and --scratch, and the run folder."""

from dataclasses import dataclass
from pathlib import Path

from emotion.errors import SpecError, StorageError, system_reason
from emotion.files import make_folder
from job.spec.location import Local, parse_path
from job.spec.model import JobSpec, run_name
from job.storage.local_folder import require_possible_folder


@dataclass(frozen=True)
class JobFolders:
    """Absolute paths. work: must survive a preemption; scratch: can be computed again, and jobs may share it."""

    work: Path
    scratch: Path

    def run_folder(self, spec: JobSpec) -> Path:
        return self.work / run_name(spec)


def job_folders(work: Path, scratch: Path | None) -> JobFolders:
    """From the command line. scratch: by default a folder in work. Raises SpecError for what is no path of this machine."""
    return JobFolders(_folder("--work", work), _folder("--scratch", scratch) if scratch else _folder("--work", work) / "scratch")


def _folder(option: str, path: Path) -> Path:
    try:
        return parse_path(str(path))
    except ValueError as error:
        raise SpecError(f"{option}: {error}") from None


def make_folders(spec: JobSpec, folders: JobFolders) -> Path:
    """Make run folder and scratch. Returns the run folder. Raises StorageError; SpecError for a file in the place of a folder,
    for a folder inside the dataset, where staged files would become part of it, and for a mirror inside one of these folders or
    around it."""
    run_folder = folders.run_folder(spec)
    source = spec.source.path.resolve() if isinstance(spec.source, Local) else None
    mirror = spec.mirror.path.resolve() if isinstance(spec.mirror, Local) else None
    for name, folder in (("--work", folders.work), ("--scratch", folders.scratch)):
        if source and folder.resolve().is_relative_to(source):
            raise SpecError(f"{name}: {folder} lies inside data.source {source}. Name a folder outside of the dataset.")
        if mirror and (mirror.is_relative_to(folder.resolve()) or folder.resolve().is_relative_to(mirror)):
            raise SpecError(f"checkpoint.mirror: {mirror} and {name} {folder} lie in each other. Name another folder.")
    needed = {"--work": run_folder, "--scratch": folders.scratch}
    if spec.destination is None:
        needed |= {"published in --work": folders.work / "published"}
    try:
        for name, folder in needed.items():
            require_possible_folder(folder, name)
        make_folder(run_folder)
        make_folder(folders.scratch)
    except OSError as error:
        raise StorageError.of(
            error, f"{error.filename}: cannot make this folder ({system_reason(error)}); see --work, --scratch."
        ) from error
    return run_folder
