"""--json of commands that print facts."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from emotion.errors import DataError, SpecError
from job.__main__ import app
from tests.conftest import TINY, TinyRun


def facts(*words: str | Path, raises: type[Exception] | None = None) -> dict[str, Any]:
    """What a command prints as JSON, though it may fail."""
    found = CliRunner().invoke(app, [*map(str, words), "--json"], standalone_mode=False)
    assert type(found.exception) is (raises or type(None)), found.output
    parsed: dict[str, Any] = json.loads(found.stdout)
    return parsed


def test_check_prints_the_run_and_what_is_wrong(tmp_path: Path) -> None:
    valid = facts("check", TINY)
    assert (valid["valid"], valid["run"][:5], valid["problems"], valid["exit_code"]) == (True, "tiny-", [], 0)
    wrong = facts("check", TINY, "--set", "gan.epochs=-1", "--set", "seed=x", raises=SpecError)
    assert (wrong["valid"], wrong["run"], wrong["exit_code"]) == (False, None, 64)
    assert [problem.split(":")[0] for problem in wrong["problems"]] == ["--set seed=x", "--set gan.epochs=-1"]
    of_data = facts("check", TINY, "--set", f"data.source={tmp_path}", raises=DataError)
    assert (of_data["valid"], of_data["exit_code"]) == (False, 65)
    assert "no label file" in of_data["problems"][0]


def test_no_secret_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush-hush")
    found = CliRunner().invoke(app, ["check", str(TINY), "--set", "seed=hush-hush-hush", "--json"], standalone_mode=False)
    assert "[AWS_SECRET_ACCESS_KEY]" in found.stdout
    assert "hush-hush" not in found.stdout


def test_plan_prints_states_and_seconds(tiny_run: TinyRun, tmp_path: Path) -> None:
    to_do = facts("plan", TINY, "--work", tmp_path)
    assert [phase["state"] for phase in to_do["phases"]] == ["to do"] * 10
    assert to_do["expected_seconds"] == pytest.approx(sum(phase["expected_seconds"] for phase in to_do["phases"]), abs=1)
    done = facts("plan", TINY, "--work", tiny_run.work)
    assert {phase["state"].split()[0] for phase in done["phases"]} == {"done"}
    assert done["expected_seconds"] == 0


def test_plan_says_how_long_each_phase_will_take(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["plan", str(TINY), "--work", str(tmp_path)])
    lines = found.stdout.splitlines()
    assert lines[1].startswith("stage     to do, about 2.2 s")
    assert lines[11].startswith("expected: about ")


def test_collect_prints_what_it_has_written(tiny_run: TinyRun, tmp_path: Path) -> None:
    printed = facts("collect", tiny_run.published, "--out", tmp_path / "out")
    assert printed == json.loads((tmp_path / "out" / "collected.json").read_text())
