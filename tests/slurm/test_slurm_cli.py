"""How answers of SLURM's commands are parsed."""

import pytest

from slurm.slurm_cli import accounting_states, expand_job_name, parse_duration
from tests.slurm.conftest import LoginNode


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30", 30),
        ("5:00", 300),
        ("1:00:00", 3600),
        ("2-00:00:00", 172800),
        ("2-12", 216000),
        ("2-12:30", 217800),
        ("UNLIMITED", None),
        ("NONE", None),
    ],
)
def test_durations_of_slurm_are_parsed_to_seconds(text: str, expected: float | None) -> None:
    assert parse_duration(text) == expected


@pytest.mark.parametrize(
    ("name", "jobs"),
    [
        ("7", ["7"]),
        ("7_2", ["7_2"]),
        ("3_[0-1]", ["3_0", "3_1"]),
        ("3_[4]", ["3_4"]),
        ("3_[0-2,5%4]", ["3_0", "3_1", "3_2", "3_5"]),
    ],
)
def test_job_names_of_sacct_are_expanded_to_job_ids(name: str, jobs: list[str]) -> None:
    assert expand_job_name(name) == jobs


def test_sacct_is_asked_for_whole_arrays_and_not_for_every_task(login: LoginNode) -> None:
    login.program("sacct", 'echo "$@" > "$STATE/asked"; echo "12_0|COMPLETED"; echo "12_[1-9999]|CANCELLED by 0"')
    found = accounting_states([f"12_{index}" for index in range(9000)])
    assert (found["12_0"], found["12_8999"], len(found)) == ("COMPLETED", "CANCELLED", 9000)
    assert "-j 12 -o" in (login.state / "asked").read_text(encoding="utf-8")
