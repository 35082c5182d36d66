"""Where a run comes from: what the manifest says of code, libraries, machine, container, inputs, seeds and attempts.

Nothing here reads the environment beyond the variables it names, and what looks like a password in a URL is left out.
"""

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import re
import socket
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from emotion.files import digest_of, read_json, sha256_of
from emotion.proc import cpu_model
from job.environment import environment_of_git
from job.run_folder.attempts import paired
from job.run_folder.receipts import RECEIPT
from job.spec.location import Generated
from job.spec.model import JobSpec
from job.storage.stage import GENERATED_SEED

MANIFEST_VERSION = 1
"""Raise it when `reproduce` could not read an older manifest any more."""
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("emotion", "job")
LIBRARIES = (
    "torch",
    "timm",
    "librosa",
    "soundfile",
    "soxr",
    "numpy",
    "scipy",
    "scikit-learn",
    "safetensors",
    "matplotlib",
    "pillow",
)
"""All that have a hand in published bytes; the last two draw the samples' pictures."""
GIT_SECONDS = 10.0
"""A git that is slower, on a network disk, is not waited for."""


def code_facts(root: Path = ROOT) -> dict[str, str | None]:
    """Version, a digest of the source files, and the revision where git, or an image in EMOTION_REVISION, knows it."""
    unknown = {"revision": os.getenv("EMOTION_REVISION") or None, "uncommitted_sha256": None}
    return {
        "version": importlib.metadata.version("emotion-job"),
        "source_sha256": source_sha256(root),
        **(git_facts(root) or unknown),
    }


def source_sha256(root: Path = ROOT) -> str:
    """A digest of the packages' source files: what ran, also where there is no git."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted(path for path in (root / package).rglob("*") if path.suffix in (".py", ".jinja")):
            digest.update(f"{path.relative_to(root).as_posix()}\0{sha256_of(path)}\n".encode())
    return digest.hexdigest()


def git_facts(root: Path) -> dict[str, str | None] | None:
    """The checked-out revision, and a digest of what differs from it: changed files below `root`, new ones in the packages.

    The digest is of names and contents, not of a diff, whose spelling depends on the user's settings; None where nothing
    differs. None for all where there is no git, it refuses or takes too long, or does not know the packages: they may be
    installed inside somebody else's checkout.
    """
    try:
        if not _git(root, "ls-files", "-z", "--", *PACKAGES):
            return None
        revision = _git(root, "rev-parse", "HEAD").strip()
        names = _git(root, "diff", "HEAD", "--name-only", "--no-renames", "--relative", "-z")
        names += _git(root, "ls-files", "--others", "--exclude-standard", "-z", "--", *PACKAGES)
        differing = {}
        for name in names.split("\0")[:-1]:
            differing[name] = sha256_of(root / name) if (root / name).is_file() else None
    except (OSError, subprocess.SubprocessError):
        return None
    return {"revision": revision, "uncommitted_sha256": digest_of(differing) if differing else None}


def _git(root: Path, *arguments: str) -> str:
    found = subprocess.run(
        ("git", "--no-optional-locks", "-c", "core.fsmonitor=false", "-C", str(root), *arguments),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
        timeout=GIT_SECONDS,
        env=environment_of_git(),
    )
    return os.fsdecode(found.stdout)


def library_versions() -> dict[str, str | None]:
    """As installed; None for one that does not say."""
    found: dict[str, str | None] = dict.fromkeys(LIBRARIES)
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def torch_facts() -> dict[str, Any]:
    """How torch was built, which instructions it uses, and how it and its BLAS compute in parallel, in its own words."""
    import torch

    def words(text: str) -> list[str]:
        lines = [line.strip().removeprefix("- ") for line in text.splitlines()]
        return [line for line in lines if line and not line.startswith(("PyTorch built with", "Build settings"))]

    return {
        "git_version": torch.version.git_version,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "build": words(torch.__config__.show()),
        "parallel": words(torch.__config__.parallel_info()),
    }


def platform_facts() -> dict[str, str | None]:
    return {
        "system": platform.system(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()).strip(),
        "cpu_model": cpu_model(),
        "nvidia_driver": nvidia_driver(),
    }


def nvidia_driver(path: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Such as 550.54.15; None where no NVIDIA driver is loaded."""
    with contextlib.suppress(OSError):
        found = re.search(r"Kernel Module\s+(?:for \S+\s+)?(\d[\d.]*)", path.read_text(encoding="utf-8"))
        return found[1] if found else None
    return None


def container_facts(root: Path = Path("/")) -> dict[str, str | None] | None:
    """Which kind of container this is, its name, and what identifies its image; None outside of one.

    An image that knows its own name has it in EMOTION_IMAGE. Without it Apptainer tells the file, Podman (as root) the id, and
    Docker and Kubernetes nothing.
    """
    image = os.getenv("EMOTION_IMAGE") or None
    apptainer = os.getenv("APPTAINER_NAME") or os.getenv("SINGULARITY_NAME") or None
    if apptainer or (root / ".singularity.d").is_dir():
        file = os.getenv("APPTAINER_CONTAINER") or os.getenv("SINGULARITY_CONTAINER") or None
        return {"kind": "apptainer", "name": apptainer, "image": image or file}
    if os.getenv("KUBERNETES_SERVICE_HOST"):
        return {"kind": "kubernetes", "name": socket.gethostname(), "image": image}
    with contextlib.suppress(OSError):
        told = (root / "run/.containerenv").read_text(encoding="utf-8", errors="replace")
        facts = dict(re.findall(r'^(\w+)="([^"]*)"$', told, re.MULTILINE))
        return {"kind": "podman", "name": facts.get("name"), "image": image or facts.get("imageid")}
    if (root / ".dockerenv").exists():
        return {"kind": "docker", "name": socket.gethostname(), "image": image}
    return None


def input_facts(staged: Path, named: dict[str, str], hub_weights: str | None) -> dict[str, str]:
    """`KEY/FILE` → SHA-256 of every file that the run is made from, KEY being the spec's.

    staged: the dataset, as the phase stage left it; named: other files that the spec names (job/pipeline). Weights of the hub
    are no file of ours: they are known by their numbers (emotion/vit/network.py).
    """
    outputs = read_json(staged / RECEIPT)["outputs"]
    found = {f"data.source/{name}": facts["sha256"] for name, facts in outputs.items()} | named
    return found | ({"vit.weights": hub_weights} if hub_weights else {})


def seed_facts(spec: JobSpec) -> dict[str, int]:
    """Everything random follows from these."""
    generated = {"generated": GENERATED_SEED} if isinstance(spec.source, Generated) else {}
    return {"seed": spec.seed, "split.seed": spec.split.seed, **generated}


def attempt_records(events: list[dict[str, Any]], now: float) -> list[dict[str, Any]]:
    """One record per attempt, from the events of job/run_folder/attempts.py: who, from when, how long, why it left.

    now: seconds since 1970. The last attempt without an end is the one that asks; every other one was killed, and nobody
    wrote down when.
    """
    records = []
    pairs = paired(events)
    for place, (start, end) in enumerate(pairs):
        if end is not None:
            left = {"reason": end.get("reason"), "exit_code": end.get("exit_code")}
            left |= {"message": end["message"]} if "message" in end else {}
        else:
            left = {"reason": "publishing" if place == len(pairs) - 1 else "killed", "exit_code": None}
        ended = now if left["reason"] == "publishing" else end["time"] if end is not None else None
        records.append(
            {
                "attempt": start["attempt"],
                "host": start["host"],
                "pid": start["pid"],
                "began": datetime.fromtimestamp(start["time"], UTC).isoformat(timespec="seconds"),
                "duration_seconds": None if ended is None else round(ended - start["time"], 3),
                **left,
            }
        )
    return records


def software_conditions() -> dict[str, Any]:
    """What every phase depends on, whatever it computes with."""
    told = platform_facts()
    return {
        "source_sha256": source_sha256(),
        "python": platform.python_version(),
        **{f"libraries.{name}": version for name, version in library_versions().items()},
        **{name: told[name] for name in ("libc", "machine", "cpu_model")},
    }


def without_userinfo(value: Any) -> Any:
    """A JSON value with `user:password@` taken out of every URL in it."""
    if isinstance(value, dict):
        return {name: without_userinfo(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_userinfo(inner) for inner in value]
    if isinstance(value, str):
        return re.sub(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/@\s]*@", r"\1", value)
    return value
