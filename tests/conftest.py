"""What several tests share, and how what cannot run here is counted.

`pytest` runs what needs nothing but Python; `pytest --all` runs the tests marked `full` as well. Those may need a component of
the machine, which they ask for with the fixture `component`: where it is missing they are skipped, which the summary counts,
or fail where REQUIRE_ALL=1.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also run the tests marked full")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: takes long or needs more than Python; runs with --all")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all"):
        return
    for item in items:
        if item.get_closest_marker("full"):
            item.add_marker(pytest.mark.skip(reason="runs with make test-all"))


@pytest.fixture
def component() -> Callable[[str], str]:
    """component("ffmpeg") is the path of a program, or a skip that says what is missing, or a failure with REQUIRE_ALL=1."""

    def find(program: str) -> str:
        path = shutil.which(program)
        if path is None:
            if os.environ.get("REQUIRE_ALL") == "1":
                pytest.fail(f"{program} is not installed, and REQUIRE_ALL=1")
            pytest.skip(f"{program} is not installed")
        return path

    return find


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real music and label files that may not enter the repository; a counted skip where it is not given."""
    folder = os.environ.get("EMOTION_TEST_DATA")
    if not folder:
        pytest.skip("EMOTION_TEST_DATA is not set: needs a folder with deam_annotations, odd_mp3 and vgmidi48")
    return Path(folder)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small networks are quicker, and equal everywhere, on one thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
