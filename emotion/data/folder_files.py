"""The files below a folder that belong to a dataset, and the others by the reason why they do not."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from emotion.data.unused import ANNEX, DANGLING, HIDDEN, IRREGULAR, REPEATED, Unused
from emotion.errors import DataError, StorageError, system_reason


def files_below(root: Path, is_wanted: Callable[[str], bool], unused: Unused) -> list[Path]:
    """Every file below `root` that is wanted, sorted. Hidden folders are skipped, symlinked folders entered once.

    is_wanted: takes a path relative to `root`, with slashes. unused: gets everything else. Raises DataError for no folder,
    StorageError for one that cannot be listed.
    """
    if not root.is_dir():
        raise DataError(
            f"{root}: no such folder. Expected the folder that holds the dataset's labels and audio; correct data.source."
        )
    files: list[Path] = []
    # A link to a folder above root would lead out of the dataset, so these count as entered.
    entered = set(root.resolve().parents)
    for folder, subfolders, names in os.walk(root, onerror=_refuse_folder, followlinks=True):
        below = Path(folder).relative_to(root)
        real = Path(folder).resolve()
        if real in entered:
            unused.add(f"{below}/", REPEATED)
            subfolders.clear()
            continue
        entered.add(real)
        for name in sorted(names):
            path, relative = Path(folder, name), (below / name).as_posix()
            # Other names of links to nothing are looked at where they may be those of folders.
            if is_wanted(relative) or ("." not in name and path.is_symlink()):
                why = _why_no_file(path)
                if why is None and is_wanted(relative):
                    files.append(path)
                    continue
                unused.add(relative, why)
            else:
                unused.add(relative)
        for name in sorted(name for name in subfolders if name.startswith(".")):
            unused.add(f"{(below / name).as_posix()}/", HIDDEN)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
    return sorted(files)


def _why_no_file(path: Path) -> str | None:
    """Why a path that a folder lists is no file with content; None where it is one."""
    if path.is_file():
        return None
    if path.exists() or not path.is_symlink():
        return IRREGULAR
    return ANNEX if "annex/objects" in str(path.readlink()) else DANGLING


def _refuse_folder(error: OSError) -> NoReturn:
    raise StorageError.of(error, f"{error.filename}: cannot be listed ({system_reason(error)}).") from error
