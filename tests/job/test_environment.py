import os
import subprocess
import sys
from pathlib import Path

import pytest

from emotion.errors import SpecError
from job.environment import ALLOCATOR_VARIABLES, CACHES, merged_allocator_setting


def test_expandable_segments_are_asked_for() -> None:
    assert merged_allocator_setting({}) == "expandable_segments:True"


@pytest.mark.parametrize("variable", ALLOCATOR_VARIABLES)
def test_the_users_own_options_are_kept(variable: str) -> None:
    merged = merged_allocator_setting({variable: "max_split_size_mb:128, roundup_power2_divisions:[256:1,512:2,>:4]"})
    assert merged == ("expandable_segments:True,max_split_size_mb:128,roundup_power2_divisions:[256:1,512:2,>:4]")


def test_where_both_speak_the_user_wins() -> None:
    assert merged_allocator_setting({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}) == "expandable_segments:False"


@pytest.mark.parametrize("setting", ["expandable_segment:True", "expandable_segments:yes", "max_split_size_mb:-1", "x"])
def test_what_torch_does_not_know_is_refused_with_its_name(setting: str) -> None:
    with pytest.raises(SpecError, match=r"PYTORCH_CUDA_ALLOC_CONF: .*" + setting.split(":")[0]):
        merged_allocator_setting({"PYTORCH_CUDA_ALLOC_CONF": setting})


def test_two_variables_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(SpecError, match=r"64 .* 128"):
        merged_allocator_setting(
            {"PYTORCH_ALLOC_CONF": "max_split_size_mb:128", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}
        )


def test_everything_stands_before_torch_is_imported_and_cannot_come_after() -> None:
    program = """
import os, sys
from job.environment import prepare_environment
prepare_environment(1)
assert "torch" not in sys.modules and "numpy" not in sys.modules
import torch
assert torch.get_num_threads() == 1
print(os.environ["PYTORCH_ALLOC_CONF"], os.environ["PYTORCH_CUDA_ALLOC_CONF"])
try:
    prepare_environment(1)
except RuntimeError as error:
    print(error)
"""
    environment = {key: value for key, value in os.environ.items() if key not in ALLOCATOR_VARIABLES}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    first, second = found.stdout.splitlines()
    assert first == "expandable_segments:True expandable_segments:True"
    assert "after torch" in second


@pytest.mark.parametrize(("image", "made"), [("emotion-job:x", True), ("", False)])
def test_only_in_an_image_do_caches_go_where_the_job_says(tmp_path: Path, image: str, made: bool) -> None:
    program = """
import os, sys, tempfile
from pathlib import Path
from job.environment import prepare_caches
prepare_caches(Path(sys.argv[1]))
import matplotlib, numba, huggingface_hub.constants
print(tempfile.gettempdir(), matplotlib.get_cachedir(), numba.config.CACHE_DIR, huggingface_hub.constants.HF_HOME, sep="\\n")
"""
    environment = {key: value for key, value in os.environ.items() if key not in (*CACHES, "HOME")}
    environment |= {"EMOTION_IMAGE": image, "HOME": str(tmp_path / "home"), "NUMBA_CACHE_DIR": "/as/the/user/said"}
    caches = tmp_path / "caches"
    command = [sys.executable, "-c", program, caches]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert found[2] == "/as/the/user/said"
    assert [Path(place).is_relative_to(caches) for place in (found[0], found[1], found[3])] == [made] * 3
