"""The disks of --work and --scratch: whether a file can be written, renamed and made durable, how much room is
left, and whether they are inside the dataset."""

import contextlib
import errno
import os
import platform
from pathlib import Path

from emotion.errors import AccessError, EmotionError, NodeError, SpecError, StorageError, system_reason
from emotion.files import write_bytes
from emotion.proc import file_system_type, is_mounted_read_only
from job.machine.check import Check, wrong
from job.spec.location import Local
from job.spec.model import JobSpec

BROKEN = {
    *(errno.EIO, errno.EREMOTEIO, errno.ENXIO, errno.ENODEV, errno.EUCLEAN),
    *(errno.ESTALE, errno.ENOTCONN, errno.ESHUTDOWN, errno.EHOSTDOWN),
}
"""Error numbers of a failed disk and of a lost network file system. A full disk may be full for all nodes."""
IN_MEMORY = ("ramfs", "tmpfs")
LITTLE_GIB = 5.0  # the audio of DEAM, its features and checkpoints take gigabytes
FEW_FILES = 10_000  # DEAM has 1,802 songs


def require_writable(*folders: Path) -> None:
    """Raise NodeError, AccessError or StorageError if one of the folders exists and cannot be used."""
    for folder in dict.fromkeys(folders):
        try:
            is_there = folder.is_dir()
        except OSError as error:
            if error.errno in BROKEN:
                raise disk_failure(error) from error
            continue  # other errors appear when the folder is created
        if is_there:
            try_to_write(folder)


def try_to_write(folder: Path, advice: str = "Correct that, or name another folder.") -> None:
    """Write a small file, make it durable, rename it, read it, remove it. Raises as require_writable does."""
    # A name of its own for each process: several jobs of a node may try the same folder.
    path, content = folder / f".node-check-{platform.node()}-{os.getpid()}", os.urandom(4096)
    try:
        write_bytes(path, content)
        read = path.read_bytes()
    except OSError as error:
        if error.errno == errno.EROFS and is_mounted_read_only(folder):
            raise AccessError(f"{folder}: it is mounted read-only. Bind it writable, or name another folder.") from error
        if error.errno == errno.EROFS:  # Linux makes a disk read-only when it has failed
            raise NodeError(
                f"{folder}: {system_reason(error)}. Run the job on another node, or name a folder that can be written to."
            ) from error
        raise disk_failure(error, f"{folder}: a file cannot be written here ({system_reason(error)}). {advice}") from error
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    if read != content:
        raise NodeError(f"{folder}: a small file was read back with other bytes. Run the job on another node.")


def disk_failure(error: OSError, text: str | None = None) -> EmotionError:
    """The error to raise for an OSError of a disk: NodeError if the disk has failed, else the one of StorageError.of.
    text: as for StorageError.of."""
    if error.errno in BROKEN:
        return NodeError(f"{text or f'{error.filename}: {system_reason(error)}.'} Run the job on another node.")
    return StorageError.of(error, text)


def check_disk(name: str, folder: Path, *, must_survive: bool = False) -> Check:
    """Check a folder, or the existing parent in which it would be created. must_survive: whether to warn if it is in memory,
    which is lost with the machine."""
    advice = f"Make room or correct the rights there, or name another folder for {name}."
    try:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        status = os.statvfs(existing)
        if existing != folder and status.f_flag & os.ST_RDONLY:  # such as the root of a container
            raise StorageError(f"{folder}: cannot be made in {existing}, which is read-only. Name or bind another folder.")
        try_to_write(existing, advice)
    except EmotionError as error:
        return wrong(name, error, advice)
    except OSError as error:
        return wrong(name, disk_failure(error), "Name another folder.")
    kind, free_gib, files = file_system_type(existing), status.f_bavail * status.f_frsize / 2**30, status.f_favail
    room = f"{free_gib:.1f} GiB" + (f" and {files:,} files" if status.f_files else "")
    absent = "" if existing == folder else f", not there yet, in {existing}"
    found = f"{folder}{absent} on {kind or 'an unknown file system'}: a file was written, renamed and synced; room for {room}"
    if must_survive and kind in IN_MEMORY:
        return Check(name, "warn", found, "This is memory, which is lost with the machine: name a folder on a disk.")
    if free_gib < LITTLE_GIB or (status.f_files and files < FEW_FILES):
        return Check(name, "warn", found, f"A run on DEAM may need more: make room, or name another folder for {name}.")
    return Check(name, "ok", found)


def refuse_folders(spec: JobSpec, work: Path, scratch: Path) -> None:
    """Raise SpecError for a folder inside the dataset, where files of the job would become part of it, and for a mirror inside
    one of these folders or around it. work, scratch: absolute paths, as in JobFolders."""
    source = spec.source.path.resolve() if isinstance(spec.source, Local) else None
    mirror = spec.mirror.path.resolve() if isinstance(spec.mirror, Local) else None
    for name, folder in (("--work", work), ("--scratch", scratch)):
        if source and folder.resolve().is_relative_to(source):
            raise SpecError(f"{name}: {folder} lies inside data.source {source}. Name a folder outside of the dataset.")
        if mirror and (mirror.is_relative_to(folder.resolve()) or folder.resolve().is_relative_to(mirror)):
            raise SpecError(f"checkpoint.mirror: {mirror} and {name} {folder}: one is inside the other. Name another folder.")
