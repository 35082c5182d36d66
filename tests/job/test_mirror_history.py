"""Attempts and log of several machines, merged in the mirror and in the run folder."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.preemption import StopRequest
from job.run_folder.mirror import Mirror
from job.run_folder.mirror_fetch import merged_lines
from job.spec.load import load_spec
from tests.conftest import TINY

DUMP = b"{time} ERROR no progress for 30 minutes\nThread 0x1 (most recent call first):\n  File x.py, line 3 in read\n"
FIRST, SECOND, THIRD = (DUMP.replace(b"{time}", time) for time in (b"10:00", b"11:00", b"12:00"))

LINES = st.lists(st.sampled_from([b"a\n", b"b\n", b"c\n", b"\n", b"a\r\n", b"ab\n"]), max_size=8).map(b"".join)
TORN = st.sampled_from([b"", b"a", b"b", b"\r"])


def mirror_in(root: Path, machine: Path) -> Mirror:
    (machine / "tiny-0").mkdir(parents=True, exist_ok=True)
    made = Mirror(load_spec(TINY, [f"checkpoint.mirror={root}"]), machine / "tiny-0", StopRequest())
    made.connect("fail")
    return made


def complete_lines(text: bytes) -> list[bytes]:
    return text.split(b"\n")[:-1]


def has_in_order(text: bytes, lines: list[bytes]) -> bool:
    rest = iter(complete_lines(text))
    return all(line in rest for line in lines)


@given(LINES, LINES, LINES, TORN, TORN)
def test_merging_loses_no_line_and_merging_again_adds_nothing(
    common: bytes, first: bytes, second: bytes, first_torn: bytes, second_torn: bytes
) -> None:
    first, second = common + first + first_torn, common + second + second_torn
    merged = merged_lines(first, second)
    assert merged.startswith(first)
    assert has_in_order(merged, complete_lines(second))
    assert merged_lines(merged, second) == merged_lines(merged, first) == merged


@given(LINES, LINES, LINES)
def test_of_a_text_that_was_merged_and_has_grown_only_what_is_new_is_added(first: bytes, second: bytes, new: bytes) -> None:
    merged = merged_lines(first, second)
    grown = merged_lines(merged, second + new)
    assert new.endswith(grown.removeprefix(merged))
    assert has_in_order(grown, complete_lines(second + new))


@pytest.mark.parametrize(
    ("first", "second", "merged"),
    [
        (b"", b"a\n", b"a\n"),
        (b"a\nb\n", b"a\n", b"a\nb\n"),
        (b"a\nb", b"a\nbc\n", b"a\nbc\n"),  # copied while its last line was written
        (b"a\nb\n", b"a\nc\nb\n", b"a\nb\nc\nb\n"),
        (b"a\nb\nc\n", b"a\nc\nd\n", b"a\nb\nc\nd\n"),  # c was merged before
        (b"a\nb", b"a\nc\n", b"a\nb\nc\n"),
    ],
)
def test_merged_lines(first: bytes, second: bytes, merged: bytes) -> None:
    assert merged_lines(first, second) == merged


def test_a_job_that_hangs_twice_at_the_same_place_keeps_both_dumps_on_all_machines(tmp_path: Path) -> None:
    """The lines of a stack have no time."""
    root, one, other = tmp_path / "mirror", tmp_path / "one", tmp_path / "other"
    root.mkdir()
    for machine, dump in ((one, FIRST), (one, SECOND), (other, THIRD)):
        mirror = mirror_in(root, machine)
        mirror.fetch_history()
        with mirror, (machine / "tiny-0" / "job.log").open("ab") as file:
            file.write(dump)
    mirror_in(root, one).fetch_history()
    logs = [folder / "tiny-0" / "job.log" for folder in (root, one, other)]
    assert [log.read_bytes() for log in logs] == [FIRST + SECOND + THIRD] * 3


def test_logs_that_began_apart_are_both_kept_once(tmp_path: Path) -> None:
    """As of a job that started while its mirror could not be reached."""
    root = tmp_path / "mirror"
    (root / "tiny-0").mkdir(parents=True)
    (root / "tiny-0" / "job.log").write_bytes(FIRST)
    mirror = mirror_in(root, tmp_path)
    for dump in (SECOND, THIRD):
        with (tmp_path / "tiny-0" / "job.log").open("ab") as file:
            file.write(dump)
        with mirror_in(root, tmp_path):
            pass
    assert (root / "tiny-0" / "job.log").read_bytes() == FIRST + SECOND + THIRD
    mirror.fetch_history()
    assert (tmp_path / "tiny-0" / "job.log").read_bytes() == FIRST + SECOND + THIRD


# In a process of its own, as the limit holds for all files of a process.
ON_A_FULL_DISK = """
import resource, sys
from pathlib import Path
from tests.job.test_mirror_history import mirror_in
mirror = mirror_in(Path(sys.argv[1]), Path(sys.argv[2]))
resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
mirror.fetch_history()
"""


def test_attempts_that_cannot_be_merged_on_a_full_disk_stay_as_they_are(tmp_path: Path) -> None:
    for folder, text in (("mirror", "theirs\n"), ("work", "ours\n")):
        (tmp_path / folder / "tiny-0").mkdir(parents=True)
        (tmp_path / folder / "tiny-0" / "attempts.jsonl").write_text(text)
    command = [sys.executable, "-c", ON_A_FULL_DISK, tmp_path / "mirror", tmp_path / "work"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "File too large" in found.stderr
    assert (tmp_path / "work" / "tiny-0" / "attempts.jsonl").read_text() == "ours\n"
