"""The table of `python -m tests.bench`, and benchmarks that no other test runs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import soundfile
import yaml

from emotion.audio.decoding import decode_blocks
from emotion.audio.mpeg import scan_mpeg
from emotion.data.deam import find_dataset
from tests.bench.__main__ import BENCHMARKS, is_met, rows_of, table
from tests.bench.deam_sized import make_dataset
from tests.bench.rows import ROWS_FILE

ROOT = Path(__file__).parents[1]
SCRIPT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests.bench.rows import record
record("time / the peer's", 0.5, most=0.7, raw={{"ours": [1.0, 2.0]}})
record("rate / the peer's", 0.5, least=0.7)
"""


def row(value: float | None, least: float | None = None, most: float | None = None) -> dict[str, Any]:
    return {"benchmark": "one", "what": "time / the peer's", "value": value, "least": least, "most": most}


def test_a_goal_is_met_from_its_limit_on() -> None:
    assert is_met(row(0.7, most=0.7))
    assert not is_met(row(0.71, most=0.7))
    assert is_met(row(0.7, least=0.7))
    assert not is_met(row(0.69, least=0.7))
    assert not is_met(row(1.2, least=0.9, most=1.1))
    assert not is_met(row(None))


def test_the_rows_of_a_benchmark_that_fails_are_kept_with_one_that_says_so(tmp_path: Path) -> None:
    script = tmp_path / "one.py"
    script.write_text(SCRIPT)
    rows = rows_of(script)
    assert [found["what"] for found in rows] == ["time / the peer's", "rate / the peer's"]
    assert rows[0]["raw"] == {"ours": [1.0, 2.0]}
    assert {found["benchmark"] for found in rows} == {"one"}
    script.write_text(f"{SCRIPT}\nsys.exit(3)")
    failed = rows_of(script)
    assert failed[:2] == rows
    assert failed[2]["value"] is None
    assert "3" in failed[2]["what"]


def test_the_table_says_of_each_goal_whether_it_is_met() -> None:
    lines = table({"cores": 2}, [row(0.5, most=0.7), row(0.5, least=0.7), row(0.5), row(None)]).splitlines()
    assert lines[0] == "cores 2"
    assert lines[4:] == [
        "| one | time / the peer's | 0.5 | at most 0.7 | met |",
        "| one | time / the peer's | 0.5 | at least 0.7 | missed |",
        "| one | time / the peer's | 0.5 |  |  |",
        "| one | time / the peer's |  |  | missed |",
    ]


def test_a_benchmark_that_runs_alone_records_nothing(tmp_path: Path) -> None:
    script = tmp_path / "one.py"
    script.write_text(SCRIPT)
    subprocess.run([sys.executable, script], cwd=tmp_path, check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["one.py"]


def test_every_benchmark_of_the_table_is_a_script_that_adds_rows() -> None:
    for name in BENCHMARKS:
        assert "record(" in (ROOT / "tests" / "bench" / f"{name}.py").read_text(encoding="utf-8"), name


@pytest.mark.full
def test_the_cost_of_the_phases_is_measured_at_every_size(tmp_path: Path) -> None:
    command = [sys.executable, "tests/bench/scaling.py", "--parts", "gan", "vit", "quality"]
    command += ["--songs", "20", "40", "--synthetic", "6", "--rounds", "1"]
    file = tmp_path / "rows.jsonl"
    environment = {**os.environ, ROWS_FILE: str(file)}
    found = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    for line in ("| gan | 20 | 1 |", "| vit | 40 | 1 |", "| quality | 20 | 1 |", "| quality | 40 | 1 |", "| quality | 40 | 2 |"):
        assert line in found
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["what"].split(":")[1].split()[0] for row in rows] == [
        "growth",
        "growth",
        "seconds",
        "growth",
        "speed",
        "seconds,",
    ]


@pytest.mark.full
def test_retraining_compares_four_models_of_the_same_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.bench import retraining

    for name, value in {"SONGS": 60, "VALIDATION": 4, "FIRST_EPOCHS": 2, "EPOCHS": 1}.items():
        monkeypatch.setattr(retraining, name, value)
    found = retraining.compare(1, tmp_path)
    assert list(found) == ["alone", "warm", "slower", "first"]
    assert all(-1 <= value <= 1 for pair in found.values() for value in pair)
    # A warm start is another training than one from random weights.
    assert found["warm"] != found["alone"]


@pytest.mark.full
def test_the_dataset_of_deams_size_has_whole_songs_of_its_format_that_all_differ(tmp_path: Path) -> None:
    make_dataset(tmp_path, excerpts=3, full=1, pieces=7)
    songs = find_dataset(tmp_path).songs
    assert [song.song_id for song in songs] == [2, 3, 4, 2001]
    contents = set()
    for song, seconds in zip(songs, (45, 45, 45, 234), strict=True):
        path = tmp_path / song.audio
        info = soundfile.info(path)
        assert (info.samplerate, info.channels) == (44100, 2)
        scan = scan_mpeg(path)
        assert scan is not None
        assert scan.frames_seconds == pytest.approx(seconds, abs=0.4)
        assert path.stat().st_size == pytest.approx(scan.frames_seconds * 128_000 / 8, rel=0.001)
        assert sum(map(len, decode_blocks(path, 22050))) / 22050 == pytest.approx(scan.frames_seconds, abs=0.2)
        contents.add(path.read_bytes())
    assert len(contents) == len(songs)


@pytest.mark.full
def test_the_benchmark_for_a_gpu_runs_end_to_end_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.bench.gpu", "--device", "cpu", "--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row[3] for row in found["goals"]] == ["toy size"] * len(found["goals"]), done.stderr
    assert f"| {found['goals'][0][0]} |" in done.stdout


@pytest.mark.full
def test_the_cost_of_a_training_grows_with_its_epochs_and_each_part_with_its_own(tmp_path: Path) -> None:
    from tests.bench.cost import operations

    def cost(text: str) -> dict[str, float]:
        (tmp_path / "spec.yaml").write_text(text, encoding="utf-8")
        return operations(str(tmp_path / "spec.yaml"), songs=1000)

    document = yaml.safe_load((ROOT / "tests/tiny.yaml").read_text(encoding="utf-8"))
    document["gan"] |= {"epochs": 4, "batch_size": 8}
    document["vit"] |= {"epochs": 4, "batch_size": 8, "synthetic_share": 0.5}
    document["synth"] |= {"songs": 100}
    once = cost(yaml.safe_dump(document))
    document["gan"]["epochs"] = document["vit"]["epochs"] = 8
    twice = cost(yaml.safe_dump(document))
    assert all(value > 0 for value in once.values())
    # 1000 songs leave 680 for training; of 8 clips 4 are real.
    assert {part: twice[part] / once[part] for part in once} == {"gan": 2, "synth": 1, "vit": 2, "validation": 2}
    document["vit"]["synthetic_share"] = 0
    assert cost(yaml.safe_dump(document))["vit"] == twice["vit"] / 2
