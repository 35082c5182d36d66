"""The Dockerfile and the shell scripts pass their linters."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from job.entry import HELD_SIGNALS

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "container/Dockerfile"
DEFINITION = ROOT / "container/emotion.def"
HADOLINT = str(Path(sys.executable).with_name("hadolint"))


def lint(program: str, *arguments: str | Path) -> tuple[int, str]:
    found = subprocess.run([program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return found.returncode, found.stdout


def test_the_dockerfile_passes_hadolint(tmp_path: Path) -> None:
    assert lint(HADOLINT, DOCKERFILE) == (0, "")
    worse = tmp_path / "Dockerfile"
    worse.write_text(DOCKERFILE.read_text() + "ENTRYPOINT emotion-job\n")
    assert lint(HADOLINT, worse)[0] == 1, "the control"


def test_the_entry_point_is_not_run_by_a_shell() -> None:
    """A shell would not forward signals."""
    (line,) = (line for line in DOCKERFILE.read_text().splitlines() if line.startswith("ENTRYPOINT"))
    env, block, program = json.loads(line.removeprefix("ENTRYPOINT"))
    assert (env, program) == ("/usr/bin/env", "/opt/emotion/bin/emotion-job")
    assert block == "--block-signal=" + ",".join(number.name.removeprefix("SIG") for number in HELD_SIGNALS)
    assert f"exec {env} {block} {program}" in DEFINITION.read_text()


@pytest.mark.full
def test_the_shell_scripts_pass_shellcheck(component: Callable[[str], str], tmp_path: Path) -> None:
    shellcheck = component("shellcheck")
    scripts = [ROOT / ".ci/run", *ROOT.glob("container/*.sh"), *ROOT.glob("tests/container/*.sh")]
    assert len(scripts) > 4
    assert lint(shellcheck, *scripts) == (0, "")
    worse = Path(shutil.copy(ROOT / "container/lock.sh", tmp_path))
    worse.write_text(worse.read_text() + "rm $1\n")
    assert lint(shellcheck, worse)[0] == 1, "the control"
