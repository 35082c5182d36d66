"""Environment variables that have to stand before torch is imported. The only place that writes `os.environ`."""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from emotion.errors import SpecError

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The name of torch 2.9 and later, and the one before it; both are set, to the same value."""

WANTED = {"expandable_segments": "True"}

ALLOCATOR_OPTIONS = {
    "backend": r"native|cudaMallocAsync",
    "expandable_segments": r"True|False",
    "garbage_collection_threshold": r"0?\.\d+",
    "graph_capture_record_stream_reuse": r"True|False",
    "large_segment_size_mb": r"\d+",
    "max_non_split_rounding_mb": r"\d+",
    "max_split_size_mb": r"\d+",
    "per_process_memory_fraction": r"0?\.\d+|1(\.0*)?",
    "pinned_max_cached_size_mb": r"\d+",
    "pinned_max_round_threshold_mb": r"\d+",
    "pinned_num_register_threads": r"\d+",
    "pinned_reserve_segment_size_mb": r"\d+",
    "pinned_use_background_threads": r"True|False",
    "pinned_use_cuda_host_register": r"True|False",
    "roundup_power2_divisions": r"\d+|\[[^\]]*\]",
}
"""What torch 2.13 understands. torch itself stops at an unknown option only when it first touches a GPU, an hour later."""

CACHES = {
    "XDG_CACHE_HOME": "",
    "CUDA_CACHE_PATH": "cuda",
    "HF_HOME": "huggingface",
    "MPLCONFIGDIR": "matplotlib",
    "NUMBA_CACHE_DIR": "numba",
    "TMPDIR": "tmp",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_HOME": "torch",
    "TRITON_CACHE_DIR": "triton",
}
"""Where libraries keep what they can make or fetch again (timm where Hugging Face and torch do) → folder below that of caches."""

GIT_PLACES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR")
"""What git tells its hooks, and what overrides every folder that a git started by them is given."""


def prepare_environment(threads: int) -> None:
    """Set allocator, threads and reproducibility variables. Must run before torch or numpy's BLAS is first used.

    Raises SpecError if the user's own allocator setting is not one torch understands.
    """
    if "torch" in sys.modules:
        raise RuntimeError("prepare_environment was called after torch had been imported; its allocator is set already")
    allocator = merged_allocator_setting(os.environ)
    for variable in ALLOCATOR_VARIABLES:
        os.environ[variable] = allocator
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(threads)
    # Feature threads and scikit-learn bring their own parallelism; BLAS threads under them only get in the way.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    # A thread that spins while the other one waits for a core makes steps three times as long on a shared node, and gains
    # nothing on a free one (both measured).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # What cuBLAS needs to give the same bits twice (NVIDIA cuBLAS documentation, "Results reproducibility").
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def prepare_caches(folder: Path) -> None:
    """In an image of ours, let libraries write below `folder` and nowhere else, but for what the user has set.

    There the home folder may be missing, read-only or a file system of 64 MB, and so may /tmp. Elsewhere they are those of the
    user, as ever. Must run before the libraries are imported.
    """
    if not os.environ.get("EMOTION_IMAGE"):
        return
    for variable, name in CACHES.items():
        os.environ.setdefault(variable, str(folder / name))
    # The one that has to exist to be used.
    Path(os.environ["TMPDIR"]).mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def passing_caches() -> Iterator[None]:
    """The same for a command that has no folder for them: below the system's for temporary files, until it ends."""
    with tempfile.TemporaryDirectory(prefix="emotion-job-") as folder:
        prepare_caches(Path(folder))
        yield


def merged_allocator_setting(environment: Mapping[str, str]) -> str:
    """`expandable_segments:True` and what the user has set; where both speak, the user wins.

    Raises SpecError for options or values unknown to torch, and where the two variables contradict each other.
    """
    merged: dict[str, tuple[str, str]] = {}
    for variable in ALLOCATOR_VARIABLES:
        for option, value in _options(variable, environment.get(variable, "")):
            earlier, value_before = merged.setdefault(option, (variable, value))
            if value_before != value:
                raise SpecError(
                    f"{variable}: {option} is {value} here and {value_before} in {earlier}. Set one of the two variables."
                )
    settings = {option: value for option, (_, value) in merged.items()}
    return ",".join(f"{option}:{value}" for option, value in sorted((WANTED | settings).items()))


def _options(variable: str, text: str) -> list[tuple[str, str]]:
    """[(option, value)] of a setting such as "max_split_size_mb:128,roundup_power2_divisions:[256:1,512:2]"."""
    found = []
    for part in re.split(r",(?![^\[]*\])", text.replace(" ", "")):
        if not part:
            continue
        option, _, value = part.partition(":")
        if option not in ALLOCATOR_OPTIONS:
            raise SpecError(
                f"{variable}: {option!r} is no allocator option of torch; known: {', '.join(ALLOCATOR_OPTIONS)}. Correct or "
                f"unset {variable}."
            )
        if not re.fullmatch(ALLOCATOR_OPTIONS[option], value):
            raise SpecError(
                f"{variable}: {option} is {value!r}, expected {ALLOCATOR_OPTIONS[option]}. Correct or unset {variable}."
            )
        found.append((option, value))
    return found


def allocator_setting() -> dict[str, str | None]:
    """What is in force, for the manifest."""
    return {variable: os.environ.get(variable) for variable in ALLOCATOR_VARIABLES}


def environment_of_git() -> dict[str, str]:
    """For a git that is to look at the folder it is told, also where a hook of git has started this process."""
    return {name: value for name, value in os.environ.items() if name not in GIT_PLACES}


def available_threads() -> int:
    """What OMP_NUM_THREADS says, where a user or site has set it; else the CPUs that binding and cgroup leave us."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    if said.isdecimal() and int(said) > 0:
        return int(said)
    bound = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return bound
    # A container with --cpus=2 still sees every CPU of the machine.
    return bound if quota == "max" else max(1, min(bound, int(quota) // int(period)))
