import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from emotion.errors import SpecError
from job.environment import ALLOCATOR_VARIABLES, CACHES, available_threads, merged_allocator_setting
from job.spec.load import load_spec
from tests.conftest import TINY


def test_expandable_segments_are_the_default() -> None:
    assert merged_allocator_setting({}) == "expandable_segments:True"


@pytest.mark.parametrize("variable", ALLOCATOR_VARIABLES)
def test_the_users_own_options_are_kept(variable: str) -> None:
    merged = merged_allocator_setting({variable: "max_split_size_mb:128, roundup_power2_divisions:[256:1,512:2,>:4]"})
    assert merged == ("expandable_segments:True,max_split_size_mb:128,roundup_power2_divisions:[256:1,512:2,>:4]")


def test_the_users_value_replaces_the_default() -> None:
    assert merged_allocator_setting({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}) == "expandable_segments:False"


def test_an_unknown_option_is_passed_on_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    merged = merged_allocator_setting({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segment:True"})
    assert merged == "expandable_segment:True,expandable_segments:True"
    assert "PYTORCH_CUDA_ALLOC_CONF: torch 2.13 has no allocator option expandable_segment " in caplog.text


VALUES = {
    "max_split_size_mb": ["x", "0", "10", "19", "20", "21", "128", "-1", "030", "+30", "30x", "1e3", "99999999999999999999", ""],
    "max_non_split_rounding_mb": ["10", "20", "128"],
    "garbage_collection_threshold": ["2", "0.0", "1.0", "1", "0.8", ".5", "00.5", "5e-1", "abc", "nan", "inf", "-0.5"],
    "roundup_power2_divisions": [
        "3",
        "0",
        "1",
        "4",
        "64",
        "[256:3]",
        "[255:2]",
        "[256:1,512:2,>:4]",
        "[]",
        "[256:1,]",
        "[256:0]",
        "[0:2]",
        "[256:1,512:2",
        "256:1]",
        "[256:1",
        "256:1",
        "[256:1:2]",
        "[[256:1]]",
    ],
    "pinned_max_cached_size_mb": ["64:3", "[64]", "64"],
    "large_segment_size_mb": ["5", "10", "11", "20", "1024"],
    "expandable_segments": ["yes", "true", "1", "True", "False", ""],
    "pinned_use_background_threads": ["True", "on"],
    "throw_on_cudamalloc_oom": ["True", "False"],  # of a build for CUDA only, as are the next
    "release_lock_on_cudamalloc": ["True", "False"],
    "graph_capture_record_stream_reuse": ["True"],
    "per_process_memory_fraction": ["0.5", "1.0"],
    "pinned_num_register_threads": ["1", "8"],
}


def test_exactly_what_torch_refuses_is_refused() -> None:
    import torch

    for setting in [f"{option}:{value}" for option, values in VALUES.items() for value in values]:
        # Another option is read against the size of large segments, which stays from one call to the next.
        torch._C._accelerator_setAllocatorSettings("large_segment_size_mb:20")
        by_torch = by_us = False
        try:
            torch._C._accelerator_setAllocatorSettings(setting)
        except (ValueError, RuntimeError, IndexError):
            by_torch = True
        try:
            merged_allocator_setting({"PYTORCH_CUDA_ALLOC_CONF": setting})
        except SpecError:
            by_us = True
        assert by_us is by_torch, setting


def test_a_split_size_below_that_of_large_segments_is_refused() -> None:
    with pytest.raises(SpecError, match="max_split_size_mb is '30', expected 64 or more"):
        merged_allocator_setting({"PYTORCH_ALLOC_CONF": "max_split_size_mb:30,large_segment_size_mb:64"})


def test_the_same_option_twice_in_one_variable_is_named() -> None:
    with pytest.raises(SpecError, match="max_split_size_mb is in it twice, as 64 and as 128"):
        merged_allocator_setting({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64,max_split_size_mb:128"})
    assert "max_split_size_mb:64" in merged_allocator_setting(
        {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64, max_split_size_mb:64"}
    )


@pytest.mark.parametrize("setting", ["expandable_segments:yes", "max_split_size_mb:1", "x"])
def test_a_malformed_option_is_refused_with_its_name(setting: str) -> None:
    with pytest.raises(SpecError, match=r"PYTORCH_CUDA_ALLOC_CONF: .*" + setting.split(":")[0]):
        merged_allocator_setting({"PYTORCH_CUDA_ALLOC_CONF": setting})


def test_a_setting_that_is_no_option_gets_an_example() -> None:
    with pytest.raises(SpecError, match="'garbage' has no value, expected such as expandable_segments:True"):
        merged_allocator_setting({"PYTORCH_CUDA_ALLOC_CONF": "garbage"})


def test_two_variables_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(SpecError, match=r"64 .* 128"):
        merged_allocator_setting(
            {"PYTORCH_ALLOC_CONF": "max_split_size_mb:128", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}
        )


@pytest.mark.parametrize(("setting", "expected"), [("3", 3), (" 3 ", 3), ("04", 4), ("4,2", 4), ("4096", 4096)])
def test_omp_num_threads_is_the_number_of_threads(setting: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", setting)
    assert available_threads() == expected


@pytest.mark.parametrize("setting", ["", " "])
def test_without_omp_num_threads_the_processors_of_this_process_count(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", setting)
    assert 1 <= available_threads() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize("setting", ["zero", "0", "-2", "1.5", "4 cores", ",4", "4097", "9" * 5000, "\udcff"])
def test_omp_num_threads_that_is_no_number_of_threads_is_refused(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", setting)
    with pytest.raises(SpecError, match=r"^OMP_NUM_THREADS is '.{1,40}', expected a number of threads from 1 to 4096\. Correct "):
        available_threads()
    with pytest.raises(SpecError, match=r"device\.threads: expected a whole number from 1 to 4096"):
        load_spec(TINY, ["device.threads=4097"])


def test_the_environment_is_set_before_torch_is_imported_and_refused_after() -> None:
    program = """
import os, sys
from job.environment import prepare_environment
prepare_environment(1)
assert "torch" not in sys.modules and "numpy" not in sys.modules
import torch
assert torch.get_num_threads() == 1
print(os.environ["PYTORCH_ALLOC_CONF"], os.environ["PYTORCH_CUDA_ALLOC_CONF"], os.environ["WANDB_ERROR_REPORTING"])
try:
    prepare_environment(1)
except RuntimeError as error:
    print(error)
"""
    environment = {key: value for key, value in os.environ.items() if key not in (*ALLOCATOR_VARIABLES, "WANDB_ERROR_REPORTING")}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    first, second = found.stdout.splitlines()
    assert first == "expandable_segments:True expandable_segments:True false"
    assert "after torch" in second


@pytest.mark.parametrize(
    ("of_user", "expected"),
    [
        ({}, "PASSIVE 1000"),
        ({"GOMP_SPINCOUNT": "5"}, "PASSIVE 5"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "PASSIVE None"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None"),
    ],
)
def test_threads_spin_for_a_limited_time_unless_the_user_says_how_they_wait(of_user: dict[str, str], expected: str) -> None:
    program = """
import os
from job.environment import prepare_environment
prepare_environment(1)
print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"))
"""
    clean = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    found = subprocess.run([sys.executable, "-c", program], env=clean | of_user, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == expected


def test_plots_need_no_screen_whatever_the_shell_of_a_notebook_says() -> None:
    program = """
from job.environment import prepare_environment
prepare_environment(1)
import matplotlib.pyplot
print(matplotlib.get_backend())
"""
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip().lower() == "agg"


def places(tmp_path: Path, **environment: str) -> dict[str, str]:
    """Each cache variable after `prepare_caches`."""
    program = """
import json, os, sys, tempfile
from pathlib import Path
from job.environment import CACHES, prepare_caches
prepare_caches(Path(sys.argv[1]))
print(json.dumps({name: os.environ.get(name) for name in CACHES} | {"temporary": tempfile.gettempdir()}))
"""
    clean = {key: value for key, value in os.environ.items() if key not in (*CACHES, "HOME", "EMOTION_IMAGE")}
    command = [sys.executable, "-c", program, tmp_path / "caches"]
    found = subprocess.run(command, env={**clean, **environment}, capture_output=True, text=True, check=True)
    answer: dict[str, str] = json.loads(found.stdout)
    return answer


def test_caches_stay_where_the_home_folder_can_be_written(tmp_path: Path) -> None:
    found = places(tmp_path, HOME=str(tmp_path), MPLCONFIGDIR=str(tmp_path / "mine"))
    assert found.pop("MPLCONFIGDIR") == str(tmp_path / "mine")
    assert found.pop("temporary")
    assert set(found.values()) == {None}


def test_caches_are_redirected_where_the_home_folder_cannot_be_written(tmp_path: Path) -> None:
    found = places(tmp_path, HOME="/proc/none", MPLCONFIGDIR="/proc/none", TMPDIR="/proc/none", HF_HOME="/proc/none")
    assert found.pop("HF_HOME") == "/proc/none", "weights may be where nothing can be written"
    for name, place in found.items():
        assert Path(place).is_relative_to(tmp_path / "caches"), name


IMPORTS = """
from job.environment import prepare_environment, temporary_caches
with temporary_caches():
    prepare_environment(1)
    import matplotlib.font_manager, scipy.fft, sklearn.svm, soundfile, soxr
    from emotion.compat import timm
"""


@pytest.mark.full
@pytest.mark.parametrize("home", [None, "/nonexistent"])
def test_a_user_without_a_name_imports_a_read_only_installation(home: str | None, component: Callable[[str], str]) -> None:
    if os.getuid() != 0:
        pytest.skip("not root: cannot become another user")
    # The user may read all, as an administrator's environment may be anywhere, and write nothing.
    may_read = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    user = [component("setpriv"), "--reuid=54321", "--regid=54321", "--clear-groups", *may_read]
    environment = {key: value for key, value in os.environ.items() if key not in (*CACHES, "HOME", "EMOTION_IMAGE")}
    environment |= {"HOME": home} if home else {}
    found = subprocess.run([*user, sys.executable, "-c", IMPORTS], env=environment, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.parametrize(("image", "made"), [("emotion-job:x", True), ("", False)])
def test_caches_are_redirected_only_in_a_container_image(tmp_path: Path, image: str, made: bool) -> None:
    program = """
import os, sys, tempfile
from pathlib import Path
from job.environment import prepare_caches
prepare_caches(Path(sys.argv[1]))
import matplotlib, huggingface_hub.constants
print(tempfile.gettempdir(), matplotlib.get_cachedir(), os.environ["TORCH_HOME"], huggingface_hub.constants.HF_HOME, sep="\\n")
"""
    environment = {key: value for key, value in os.environ.items() if key not in (*CACHES, "HOME")}
    environment |= {"EMOTION_IMAGE": image, "HOME": str(tmp_path / "home"), "TORCH_HOME": "/as/the/user/said"}
    caches = tmp_path / "caches"
    command = [sys.executable, "-c", program, caches]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert found[2] == "/as/the/user/said"
    assert [Path(place).is_relative_to(caches) for place in (found[0], found[1], found[3])] == [made] * 3
