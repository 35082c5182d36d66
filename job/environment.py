"""Environment variables that must be set before torch is imported. The only place that writes `os.environ`."""

import contextlib
import logging
import os
import pwd
import re
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from emotion.config import MOST_THREADS
from emotion.errors import SpecError, StorageError, as_failure, printable

log = logging.getLogger(__name__)

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # since torch 2.9; before. Both are set
DEFAULT_OPTIONS = {"expandable_segments": "True"}
EXAMPLE = "expandable_segments:True"
LARGE_SEGMENT_MB = 20  # torch's default of large_segment_size_mb, which is the minimum of two other options


def _whole(text: str) -> int:
    """The integer that C++ reads (std::stoull): text after the digits is ignored, negative numbers wrap around at 2**64.
    Raises ValueError for no digits and for a number that needs more than 64 bits."""
    number = int(re.match(r"[+-]?\d+|", text)[0])  # type: ignore[index]
    if abs(number) >= 2**64:
        raise ValueError
    return number % 2**64


def _fraction(text: str) -> float:
    """The number that C++ reads (std::stod): text after it is ignored. Raises ValueError for no number."""
    return float(re.match(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|", text, re.IGNORECASE)[0])  # type: ignore[index]


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def _are_divisions(text: str) -> bool:
    """Whether this is a power of two, or a list such as [256:1,512:2,>:4]: sizes in MB and the divisions up to them."""
    if not text.startswith("["):
        return _is_power_of_two(_whole(text))
    for part in filter(None, text.strip("[]").split(",")):
        size, divisions = part.split(":")
        if not (size == ">" or _is_power_of_two(_whole(size))) or not (
            _whole(divisions) == 0 or _is_power_of_two(_whole(divisions))
        ):
            return False
    return True


_BOOL = ("True or False", {"True", "False"}.__contains__)
_NUMBER = ("a whole number", lambda text: _whole(text) >= 0)
ALLOCATOR_OPTIONS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "backend": ("native or cudaMallocAsync", {"native", "cudaMallocAsync"}.__contains__),
    "expandable_segments": _BOOL,
    "garbage_collection_threshold": ("a number between 0 and 1", lambda text: 0 < _fraction(text) < 1),
    "graph_capture_record_stream_reuse": _BOOL,
    "large_segment_size_mb": ("more than 10", lambda text: _whole(text) > 10),
    "max_non_split_rounding_mb": _NUMBER,
    "max_split_size_mb": _NUMBER,
    "per_process_memory_fraction": ("a number from 0 to 1", lambda text: 0 <= _fraction(text) <= 1),
    "pinned_free_catch_all": _BOOL,
    "pinned_max_cached_size_mb": _NUMBER,
    "pinned_max_round_threshold_mb": _NUMBER,
    "pinned_num_register_threads": ("a power of two", lambda text: _is_power_of_two(_whole(text))),
    "pinned_reserve_segment_size_mb": _NUMBER,
    "pinned_use_background_threads": _BOOL,
    "pinned_use_cuda_host_register": _BOOL,
    "release_lock_on_cudamalloc": _BOOL,
    "roundup_power2_divisions": ("a power of two, or a list such as [256:1,512:2,>:4]", _are_divisions),
    "throw_on_cudamalloc_oom": _BOOL,
}
"""Option of torch 2.13 → expected value in words, and a check. torch itself checks options only when it first uses a GPU, which
can be an hour later."""
CACHES = {
    "XDG_CACHE_HOME": "",
    "CUDA_CACHE_PATH": "cuda",
    "HF_HOME": "huggingface",
    "MPLCONFIGDIR": "matplotlib",
    "TMPDIR": "tmp",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_HOME": "torch",
    "TRITON_CACHE_DIR": "triton",
}
"""Variable that names a cache → subfolder of the folder of all caches. timm uses those of Hugging Face and torch."""
PREPARED_CACHES = ("HF_HOME", "TORCH_HOME")  # may hold weights, and be read-only on purpose
OTHER_THREADS = 8  # in addition to compute threads: lease, checkpoints, mirror, transfers, spot notices
GIT_LOCATIONS = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR")  # set by git for its hooks


def prepare_environment(threads: int) -> None:
    """Set allocator, threads and reproducibility variables. Must run before torch or numpy's BLAS is first used.
    Raises SpecError for an allocator setting that torch would refuse, LimitError if the threads cannot be started."""
    if "torch" in sys.modules:
        raise RuntimeError("prepare_environment was called after torch was imported, which reads these variables once")
    allocator = merged_allocator_setting(os.environ)
    for variable in ALLOCATOR_VARIABLES:
        os.environ[variable] = allocator
    _require_threads(threads + OTHER_THREADS)
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(threads)
    # Feature extraction and scikit-learn are parallel themselves; more threads of BLAS below them slow them down.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    limit_spinning()
    # A notebook's shell names a backend that exists in the notebook only.
    os.environ["MPLBACKEND"] = "Agg"
    if sys.warnoptions:
        # Such as PYTHONWARNINGS=error: a library's warning would end the job.
        warnings.simplefilter("default")
    # Weights & Biases would report its own errors and speed to its makers, and log each time that it cannot.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    # Needed for equal results of equal calls (NVIDIA cuBLAS documentation, "Results reproducibility").
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def limit_spinning() -> None:
    """Let OpenMP's threads spin for about ten microseconds before they sleep, unless the environment says how they wait.

    Measured on two cores (tests/bench/spinning.py): a training step of a small ViT takes 25 ms, and 43 ms if threads sleep at
    once; beside a busy process 56 ms, 36 and, without a limit, 87. Has no effect after torch is imported.
    """
    if not os.environ.get("OMP_WAIT_POLICY"):
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # for GNU's OpenMP, which torch's wheels bring
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # for others


def _require_threads(count: int) -> None:
    """Start and end this many threads. Raises LimitError: OpenMP would abort the process silently if it could not start one."""
    is_over = threading.Event()
    threads = [threading.Thread(target=is_over.wait) for _ in range(count)]
    try:
        for thread in threads:
            thread.start()
    except RuntimeError as error:
        raise as_failure(error) from error
    finally:
        is_over.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()


def prepare_caches(folder: Path) -> None:
    """Put the caches of libraries below `folder` if the usual place is not writable, and always in images of this project:
    there the home folder and /tmp may be missing, read-only, or only 64 MB. A variable that is set is kept, unless its folder
    cannot be written; folders of weights may be read-only. Must run before the libraries are imported."""
    home = _home_cache()
    is_moved = bool(os.environ.get("EMOTION_IMAGE")) or home is None or not _can_be_written(home)
    for variable, name in CACHES.items():
        is_prepared = variable in PREPARED_CACHES
        if place := os.environ.get(variable):
            if not is_prepared and not _can_be_written(Path(place)):
                os.environ[variable] = str(folder / name)
        elif is_moved:
            usual = home / name if home and is_prepared and os.access(home / name, os.R_OK) else None
            os.environ[variable] = str(usual or folder / name)
    if temporary := os.environ.get("TMPDIR"):
        Path(temporary).mkdir(parents=True, exist_ok=True)  # libraries make the other folders themselves
        tempfile.tempdir = None  # Python cached the folder; it looks it up again


def _home_cache() -> Path | None:
    """The folder of this user's caches; None for a user id without a name, which some libraries look up."""
    try:
        pwd.getpwuid(os.getuid())
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except (KeyError, RuntimeError):
        return None


def _can_be_written(folder: Path) -> bool:
    """Whether a file can be created in the folder or, if it does not exist, in its nearest existing parent."""
    try:
        with tempfile.TemporaryFile(dir=next(path for path in (folder, *folder.parents) if path.exists())):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def temporary_caches() -> Iterator[None]:
    """`prepare_caches` with a temporary folder, for commands that have no scratch folder."""
    try:
        temporary = tempfile.TemporaryDirectory(prefix="emotion-job-")
    except OSError as error:
        raise StorageError.of(error, f"no folder for temporary files ({error.strerror}). Set TMPDIR to one.") from error
    with temporary as folder:
        prepare_caches(Path(folder))
        yield


def merged_allocator_setting(environment: Mapping[str, str]) -> str:
    """DEFAULT_OPTIONS and the options that the user has set, which take precedence. Raises SpecError for a malformed value or a
    contradiction. An option that is not in ALLOCATOR_OPTIONS is a warning: a newer torch may have it."""
    merged: dict[str, tuple[str, str]] = {}
    for variable in ALLOCATOR_VARIABLES:
        for option, value in _options(variable, environment.get(variable, "")):
            first, value_before = merged.setdefault(option, (variable, value))
            if value_before != value and first == variable:
                raise SpecError(f"{variable}: {option} is in it twice, as {value_before} and as {value}. Keep one.")
            if value_before != value:
                raise SpecError(
                    f"{variable}: {option} is {value} here and {value_before} in {first}. Set one of the two variables."
                )
    options = DEFAULT_OPTIONS | {option: value for option, (_, value) in merged.items()}
    least = _whole(options.get("large_segment_size_mb", str(LARGE_SEGMENT_MB)))
    for option in ("max_split_size_mb", "max_non_split_rounding_mb"):
        if option in merged and _whole(options[option]) < least:
            variable, value = merged[option]
            raise SpecError(
                f"{variable}: {option} is {value!r}, expected {least} or more, as large segments have. Correct or unset it."
            )
    return ",".join(f"{option}:{value}" for option, value in sorted(options.items()))


def _options(variable: str, text: str) -> list[tuple[str, str]]:
    """[(option, value)] of a setting such as "max_split_size_mb:128,roundup_power2_divisions:[256:1,512:2]"."""
    options = []
    for part in filter(None, re.split(r",(?![^\[]*\])", re.sub(r"\s", "", text))):
        option, _, value = part.partition(":")
        expected, accepts = ALLOCATOR_OPTIONS.get(option, ("a value", bool))
        is_list = option == "roundup_power2_divisions" and re.fullmatch(r"\[[^\[\]]*\]", value)
        try:
            is_right = (is_list or not re.search(r"[:\[\]]", value)) and accepts(value)
        except ValueError:
            is_right = False
        if not value:
            raise SpecError(f"{variable}: {option!r} has no value, expected such as {EXAMPLE}. Correct or unset {variable}.")
        if not is_right:
            raise SpecError(f"{variable}: {option} is {value!r}, expected {expected}. Correct or unset {variable}.")
        if option not in ALLOCATOR_OPTIONS:
            log.warning("%s: torch 2.13 has no allocator option %s and may refuse it on a GPU", variable, option)
        options.append((option, value))
    return options


def allocator_setting() -> dict[str, str | None]:
    """The setting in force, for the manifest."""
    return {variable: printable(value) if (value := os.environ.get(variable)) else value for variable in ALLOCATOR_VARIABLES}


def environment_of_git() -> dict[str, str]:
    """An environment in which git uses its current folder, even if a git hook has started this process."""
    return {name: value for name, value in os.environ.items() if name not in GIT_LOCATIONS}


def available_threads() -> int:
    """OMP_NUM_THREADS if a user or site has set it, otherwise the number of CPUs that affinity and cgroup allow.
    Raises SpecError for a value that is no number of threads."""
    setting = os.environ.get("OMP_NUM_THREADS", "")
    if setting.strip():
        threads = setting.partition(",")[0].strip()  # a list is for nested loops
        if re.fullmatch(r"0*[1-9][0-9]{0,3}", threads) is None or int(threads) > MOST_THREADS:
            raise SpecError(
                f"OMP_NUM_THREADS is {setting[:40]!r}, expected a number of threads from 1 to {MOST_THREADS}. Correct or unset "
                f"it."
            )
        return int(threads)
    cpus = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cpus
    # A container with --cpus=2 still sees every CPU of the machine.
    return cpus if quota == "max" else max(1, min(cpus, int(quota) // int(period)))
