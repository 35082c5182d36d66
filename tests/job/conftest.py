"""The tiny job, run once by its command for all tests that look at its results."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

TINY = Path(__file__).parent.parent / "tiny.yaml"


@dataclass(frozen=True)
class TinyRun:
    work: Path
    run_folder: Path
    published: Path
    output: str


@pytest.fixture(scope="session")
def emotion_job() -> Callable[..., subprocess.CompletedProcess[str]]:
    """emotion_job("check", "x.yaml") runs the command line as a user would."""

    def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "job", *map(str, arguments)],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def tiny_run(
    tmp_path_factory: pytest.TempPathFactory, emotion_job: Callable[..., subprocess.CompletedProcess[str]]
) -> TinyRun:
    work = tmp_path_factory.mktemp("tiny")
    found = emotion_job("run", TINY, "--work", work, PYTORCH_ALLOC_CONF="max_split_size_mb:64")
    assert found.returncode == 0, found.stderr
    (run_folder,) = work.glob("tiny-*")
    return TinyRun(work, run_folder, work / "published" / run_folder.name, found.stderr)
