"""The provenance of a run: the manifest's records of code, libraries, machine, container, inputs, seeds and attempts.
Only the environment variables that are named here are read."""

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

from emotion.errors import printable
from emotion.files import digest_of, read_json, sha256_of
from emotion.proc import cpu_model, nvidia_driver
from job.config import BudgetConfig
from job.environment import environment_of_git
from job.help import package_version
from job.results.manifest import AttemptRecord, CodeRecord
from job.run_folder.attempts import paired
from job.run_folder.receipts import RECEIPT
from job.spec.location import Generated
from job.spec.model import JobSpec
from job.storage.stage import GENERATED_SEED

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("emotion", "job")
NUMERIC = ("torch", "timm", "soundfile", "soxr", "numpy", "scipy", "scikit-learn", "safetensors")
DRAWING = ("matplotlib", "pillow")
LIBRARIES = (*NUMERIC, *DRAWING)  # all that affect published bytes
GIT_SECONDS = 10.0  # timeout of a git command, for a checkout on a slow network disk


def code_record(root: Path = ROOT) -> CodeRecord:
    """The record of the code. Its revision is that of the git checkout or, without one, EMOTION_REVISION, which images set."""
    revision, uncommitted = git_state(root) or (_variable("EMOTION_REVISION"), None)
    return CodeRecord(
        version=package_version(), source_sha256=source_sha256(root), revision=revision, uncommitted_sha256=uncommitted
    )


def source_sha256(root: Path = ROOT) -> str:
    """A digest of the packages' source files, which identifies the code even without git."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted(path for path in (root / package).rglob("*") if path.suffix in (".py", ".jinja")):
            digest.update(f"{path.relative_to(root).as_posix()}\0{sha256_of(path)}\n".encode())
    return digest.hexdigest()


def git_state(root: Path) -> tuple[str, str | None] | None:
    """(revision, digest of uncommitted changes). Changes are changed files below `root` and new files in the packages.
    The digest is made from names and contents, not from a diff, which depends on the user's settings. It is None if nothing is
    changed. The result is None if git is missing, refuses, times out, or does not track the packages, as when they are installed
    inside the checkout of another project."""
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
    return revision, digest_of(differing) if differing else None


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
    """Library → version; None for a library that is not installed as a distribution."""
    found: dict[str, str | None] = dict.fromkeys(LIBRARIES)
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def torch_details() -> dict[str, Any]:
    """How torch was built, which CPU instructions it uses, and how torch and its BLAS run in parallel, in torch's own words."""
    import torch

    def lines_of(text: str) -> list[str]:
        lines = [line.strip().removeprefix("- ") for line in text.splitlines()]
        return [line for line in lines if line and not line.startswith(("PyTorch built with", "Build settings"))]

    return {
        "git_version": torch.version.git_version,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "build": lines_of(torch.__config__.show()),
        "parallel": lines_of(torch.__config__.parallel_info()),
    }


def platform_details() -> dict[str, str | None]:
    return {
        "system": platform.system(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()).strip(),
        "cpu_model": cpu_model(),
        "nvidia_driver": nvidia_driver(),
    }


def container_details(root: Path = Path("/")) -> dict[str, str | None] | None:
    """Kind and name of the container, and the identity of its image; None outside of a container. Images may set EMOTION_IMAGE to
    their name. Without it, Apptainer gives the image's file, Podman (as root) its id, Docker and Kubernetes nothing."""
    image = _variable("EMOTION_IMAGE")
    apptainer = _variable("APPTAINER_NAME") or _variable("SINGULARITY_NAME")
    if apptainer or (root / ".singularity.d").is_dir():
        file = _variable("APPTAINER_CONTAINER") or _variable("SINGULARITY_CONTAINER")
        return {"kind": "apptainer", "name": apptainer, "image": image or file}
    if os.getenv("KUBERNETES_SERVICE_HOST"):
        return {"kind": "kubernetes", "name": socket.gethostname(), "image": image}
    with contextlib.suppress(OSError):
        text = (root / "run/.containerenv").read_text(encoding="utf-8", errors="replace")
        values = dict(re.findall(r'^(\w+)="([^"]*)"$', text, re.MULTILINE))
        return {"kind": "podman", "name": values.get("name"), "image": image or values.get("imageid")}
    if (root / ".dockerenv").exists():
        return {"kind": "docker", "name": socket.gethostname(), "image": image}
    return None


def _variable(name: str) -> str | None:
    """An environment variable; None if unset or empty. Bytes that are not UTF-8 are escaped: manifest and report are UTF-8."""
    return printable(os.getenv(name, "")) or None


def input_digests(staged: Path, named: dict[str, str], hub_weights: str | None) -> dict[str, str]:
    """`KEY/FILE` → SHA-256 of every input file of the run. KEY: key of the spec. staged: folder of the phase stage; named:
    digests of the other files that the spec names; hub_weights: digest of tensors from the hub (emotion/vit/weights.py)."""
    outputs = read_json(staged / RECEIPT)["outputs"]
    digests = {f"data.source/{name}": output["sha256"] for name, output in outputs.items()} | named
    return digests | ({"vit.weights": hub_weights} if hub_weights else {})


def seeds_of(spec: JobSpec) -> dict[str, int]:
    """All seeds of random numbers."""
    generated = {"generated": GENERATED_SEED} if isinstance(spec.source, Generated) else {}
    return {"seed": spec.seed, "split.seed": spec.split.seed, **generated}


def attempt_records(events: list[dict[str, Any]], now: float) -> list[AttemptRecord]:
    """One record per attempt, from the events of job/run_folder/attempts.py. now: time of the monotonic clock. If the last
    attempt has no end, it is the one that is publishing. Earlier attempts without an end were killed: the start of the next one
    says how long they ran and how much work was lost, if that is known."""
    records = []
    pairs = paired(events)
    for number, (start, end) in enumerate(pairs, 1):
        is_last = number == len(pairs)
        after = {} if is_last else pairs[number][0]
        if end is None:
            seconds = round(now - start["monotonic"], 3) if is_last and "monotonic" in start else after.get("lived_seconds")
            end = {"seconds": seconds, "reason": "publishing" if is_last else "killed"}
        records.append(
            AttemptRecord(
                **{key: start[key] for key in ("attempt", "host", "pid")},
                began=datetime.fromtimestamp(start["time"], UTC).isoformat(timespec="seconds"),
                duration_seconds=end.get("seconds"),
                reason=end.get("reason"),
                exit_code=end.get("exit_code"),
                **({"message": end["message"]} if "message" in end else {}),
                **({"lost_seconds": after["lost_seconds"]} if "lost_seconds" in after else {}),
            )
        )
    return records


def software_conditions() -> dict[str, str | None]:
    """Conditions that apply to every phase, regardless of its device."""
    machine = platform_details()
    return {
        "source_sha256": source_sha256(),
        "python": platform.python_version(),
        **{f"libraries.{name}": version for name, version in library_versions().items()},
        **{name: machine[name] for name in ("libc", "machine", "cpu_model")},
    }


def budget_record(config: BudgetConfig, used_seconds: float, stopped: dict[str, Any]) -> dict[str, Any] | None:
    """The time and price of a run, over all attempts so far. stopped: phase → the step after which the budget ended it, and the
    number of all steps. None without a budget and without a price."""
    if config.minutes is None and config.price_per_hour is None:
        return None
    found: dict[str, Any] = {"minutes": config.minutes, "used_minutes": round(used_seconds / 60, 2), "stopped": stopped}
    if config.price_per_hour is not None:
        found |= {"price_per_hour": config.price_per_hour, "price": round(used_seconds / 3600 * config.price_per_hour, 4)}
    return found
