"""Environment variables that must be set before torch is imported. The only place that writes `os.environ`."""

import contextlib
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from emotion.errors import SpecError

log = logging.getLogger(__name__)

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # of torch 2.9 and later; before it. Both are set
DEFAULT_OPTIONS = {"expandable_segments": "True"}
_BOOL, _WHOLE, _FRACTION = r"True|False", r"\d+", r"0?\.\d+"
ALLOCATOR_OPTIONS = {
    "backend": r"native|cudaMallocAsync",
    "expandable_segments": _BOOL,
    "garbage_collection_threshold": _FRACTION,
    "graph_capture_record_stream_reuse": _BOOL,
    "large_segment_size_mb": _WHOLE,
    "max_non_split_rounding_mb": _WHOLE,
    "max_split_size_mb": _WHOLE,
    "per_process_memory_fraction": rf"{_FRACTION}|1(\.0*)?",
    "pinned_free_catch_all": _BOOL,
    "pinned_max_cached_size_mb": _WHOLE,
    "pinned_max_round_threshold_mb": _WHOLE,
    "pinned_num_register_threads": _WHOLE,
    "pinned_reserve_segment_size_mb": _WHOLE,
    "pinned_use_background_threads": _BOOL,
    "pinned_use_cuda_host_register": _BOOL,
    "release_lock_on_cudamalloc": _BOOL,
    "roundup_power2_divisions": rf"{_WHOLE}|\[[^\]]*\]",
    "throw_on_cudamalloc_oom": _BOOL,
}
"""Of torch 2.13 → the values it accepts. torch itself checks them when it first uses a GPU, which can be an hour later."""
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
"""Variables that name a cache → its folder below the one of all caches. timm uses those of Hugging Face and torch."""
GIT_LOCATIONS = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR")  # git sets these for what its hooks start


def prepare_environment(threads: int) -> None:
    """Set allocator, threads and reproducibility variables. Must run before torch or numpy's BLAS is first used.
    Raises SpecError for an allocator setting of the user that torch would refuse."""
    if "torch" in sys.modules:
        raise RuntimeError("prepare_environment was called after torch was imported, which reads these variables once")
    allocator = merged_allocator_setting(os.environ)
    for variable in ALLOCATOR_VARIABLES:
        os.environ[variable] = allocator
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(threads)
    # Feature extraction and scikit-learn are parallel themselves; more threads of BLAS below them slow them down.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    # Threads that spin while they wait made steps three times as long on a shared node, and no shorter on a free one (measured).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Needed for equal results of equal calls (NVIDIA cuBLAS documentation, "Results reproducibility").
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def prepare_caches(folder: Path) -> None:
    """In a container image of this project: let libraries write their caches below `folder`, unless the user has set them.
    There the home folder and /tmp may be missing, read-only, or only 64 MB. Must run before the libraries are imported."""
    if not os.environ.get("EMOTION_IMAGE"):
        return
    for variable, name in CACHES.items():
        os.environ.setdefault(variable, str(folder / name))
    Path(os.environ["TMPDIR"]).mkdir(parents=True, exist_ok=True)  # libraries make the other folders themselves


@contextlib.contextmanager
def temporary_caches() -> Iterator[None]:
    """`prepare_caches` with a temporary folder, for commands that have no scratch folder."""
    with tempfile.TemporaryDirectory(prefix="emotion-job-") as folder:
        prepare_caches(Path(folder))
        yield


def merged_allocator_setting(environment: Mapping[str, str]) -> str:
    """DEFAULT_OPTIONS and the options that the user has set, which take precedence. Raises SpecError for a malformed value or a
    contradiction. An option that is not in ALLOCATOR_OPTIONS is a warning: a newer torch may have it."""
    merged: dict[str, tuple[str, str]] = {}
    for variable in ALLOCATOR_VARIABLES:
        for option, value in _options(variable, environment.get(variable, "")):
            first, value_before = merged.setdefault(option, (variable, value))
            if value_before != value:
                raise SpecError(
                    f"{variable}: {option} is {value} here and {value_before} in {first}. Set one of the two variables."
                )
    options = DEFAULT_OPTIONS | {option: value for option, (_, value) in merged.items()}
    return ",".join(f"{option}:{value}" for option, value in sorted(options.items()))


def _options(variable: str, text: str) -> list[tuple[str, str]]:
    """[(option, value)] of a setting such as "max_split_size_mb:128,roundup_power2_divisions:[256:1,512:2]"."""
    options = []
    for part in filter(None, re.split(r",(?![^\[]*\])", text.replace(" ", ""))):
        option, colon, value = part.partition(":")
        expected = ALLOCATOR_OPTIONS.get(option, ".+")
        if not colon or not re.fullmatch(expected, value):
            raise SpecError(f"{variable}: {option} is {value!r}, expected {expected}. Correct or unset {variable}.")
        if option not in ALLOCATOR_OPTIONS:
            log.warning("%s: torch 2.13 has no allocator option %s and may refuse it on a GPU", variable, option)
        options.append((option, value))
    return options


def allocator_setting() -> dict[str, str | None]:
    """The setting in force, for the manifest."""
    return {variable: os.environ.get(variable) for variable in ALLOCATOR_VARIABLES}


def environment_of_git() -> dict[str, str]:
    """An environment for git that lets it look at its current folder, also if a git hook has started this process."""
    return {name: value for name, value in os.environ.items() if name not in GIT_LOCATIONS}


def available_threads() -> int:
    """OMP_NUM_THREADS, where a user or site has set it; else the number of CPUs that affinity and cgroup allow."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal() and int(threads) > 0:
        return int(threads)
    cpus = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cpus
    # A container with --cpus=2 still sees every CPU of the machine.
    return cpus if quota == "max" else max(1, min(cpus, int(quota) // int(period)))
