"""Complete manifests for tests of the code that reads them."""

from pathlib import Path
from typing import Any

from emotion.files import sha256_of
from job.results.manifest import MANIFEST, Manifest

MINIMAL: dict[str, Any] = {
    "manifest_version": 1,
    "name": "tiny-0123456789ab",
    "fingerprint": "0123456789ab",
    "spec": {},
    "init_from": None,
    "artifacts": {},
    "left_out": [],
    "warnings": [],
    "phases": {},
    "inputs": {},
    "seeds": {},
    "code": {"version": "0.1.0", "source_sha256": "0", "revision": None, "uncommitted_sha256": None},
    "libraries": {},
    "torch": {},
    "python": "3.11.0",
    "platform": {},
    "container": None,
    "allocator": {},
    "comparable": {},
    "attempts": [],
}


def artifacts_in(folder: Path) -> dict[str, Any]:
    """All files in `folder` but the manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in files}


def manifest_with(**fields: Any) -> Manifest:
    return Manifest.model_validate(MINIMAL | fields)


def write_manifest(folder: Path, **fields: Any) -> Path:
    """A manifest of all files in `folder`, which becomes a published run. Returns `folder`."""
    manifest_with(**{"artifacts": artifacts_in(folder), **fields}).write(folder / MANIFEST)
    return folder
