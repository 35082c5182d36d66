"""Mistakes at the command line: the exit code, and the one line that says what is wrong and what to do. In this process."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from job.__main__ import command
from slurm.__main__ import main as slurm_main

HEAD = "name: a\ndata: {source: 'generated:24'}\n"
SPECS = {
    "empty.yaml": b"data: {source: 'generated:24'}\n",
    "picture.yaml": b"\x89PNG\r\n\x1a\n\x00\x00",
    "latin1.yaml": HEAD.encode() + b"# caf\xe9\n",
    "list.yaml": b"- name: a\n",
    "tab.yaml": HEAD.encode() + b"gan:\n\tepochs: 3\n",
    "twice.yaml": HEAD.encode() + b"seed: 1\nseed: 2\n",
    "unknown.yaml": HEAD.encode() + b"gan: {epocs: 3}\n",
    "type.yaml": HEAD.encode() + b"gan: {epochs: many}\n",
    "range.yaml": HEAD.encode() + b"split: {fold: 7}\n",
    "section.yaml": HEAD.encode() + b"gan: 3\n",
    "clip.yaml": HEAD.encode() + b"gan: {clip_seconds: 3}\n",
    "quotes.yaml": "name: a\ndata: {source: “/songs”}\n".encode(),
    "variable.yaml": b"name: a\ndata: {source: $HOME/DEAM}\n",
    "windows.yaml": b"name: a\ndata: {source: 'C:\\Music\\DEAM'}\n",
    "web.yaml": b"name: a\ndata: {source: 'https://example.org/deam.zip'}\n",
    "name.yaml": b"name: My Songs\ndata: {source: 'generated:24'}\n",
    "good.yaml": HEAD.encode(),
    "sweep.yaml": b"{name: x, spec: good.yaml}",
    "manifest.json": b'{"manifest_version": 1, "name": "a", "fingerprint": "", "phases": {}, "artifacts": {}}',
    "cluster.yaml": b"{time_limit_minutes: 9, work: /x, runtime: docker, image: x}",
}
TABLE = "file,valence,arousal\na.wav,2,3\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in SPECS.items():
        Path(name).write_bytes(content)
    for name in ("none", "unlabelled", "columns", "header", "scale", "both"):
        Path(name).mkdir()
    Path("unlabelled/2.mp3").touch()
    for name, text in {
        "columns": "name,valence\nx,2\n",
        "header": "file,valence,arousal\n",
        "scale": TABLE,
        "both": TABLE,
    }.items():
        Path(name, "songs.csv").write_text(text)
        Path(name, "a.wav").touch()
    Path("both/static_annotations.csv").touch()


CASES = [
    ("check absent.yaml", 64, "absent.yaml: no such file, expected a spec in YAML; check the path"),
    ("check none", 64, "none: a folder, expected a spec in YAML"),
    ("check empty.yaml", 64, "name: missing"),
    ("check picture.yaml", 64, "picture.yaml"),
    ("check latin1.yaml", 64, "latin1.yaml:3"),
    ("check list.yaml", 64, "list.yaml:1:1"),
    ("check tab.yaml", 64, "tab.yaml:4:1"),
    ("check twice.yaml", 64, "twice.yaml:4:1: the key 'seed' a second time"),
    ("check unknown.yaml", 64, "unknown.yaml:3:7: gan.epocs"),
    ("check type.yaml", 64, "type.yaml:3:7: gan.epochs: expected a number above 0, found 'many'"),
    ("check range.yaml", 64, "range.yaml:3:1: split: fold is 7, but with 5 folds it must be 0 to 4"),
    ("check section.yaml", 64, "section.yaml:3:1: gan"),
    ("check clip.yaml", 64, "make gan.clip_seconds at least as long"),
    ("check quotes.yaml", 64, "LEFT DOUBLE QUOTATION MARK"),
    ("check variable.yaml", 64, "$HOME"),
    ("check windows.yaml", 64, "Windows"),
    ("check web.yaml", 64, "data.source"),
    ("check name.yaml", 64, "name.yaml:1:1: name: expected 1 to 40 lower-case letters"),
    (
        "check manifest.json",
        64,
        "this is the manifest of a published run, expected a spec; use spec.yaml beside it, or emotion-job",
    ),
    ("check sweep.yaml", 64, "sweep.yaml: this looks like a sweep, expected a spec"),
    ("check cluster.yaml", 64, "cluster.yaml: this looks like a cluster file, expected a spec"),
    ("check good.yaml --set gan.epochs", 64, "--set gan.epochs: expected KEY=VALUE, such as gan.epochs=2"),
    ("check good.yaml --set gan.depth=2", 64, "--set gan.depth=2: gan.depth"),
    ("check good.yaml --set seed=$NOBODY_HAS_THIS", 64, "the environment has no NOBODY_HAS_THIS"),
    ("check good.yaml --set data.source=none", 65, "none: no label file in this folder or below. Write songs.csv"),
    ("check good.yaml --set data.source=unlabelled", 65, "unlabelled: no label file"),
    ("check good.yaml --set data.source=columns", 65, "missing or repeated: file, arousal"),
    ("check good.yaml --set data.source=header", 65, "a header without rows, expected one row per song"),
    ("check good.yaml --set data.source=scale", 64, "data.scale: "),
    ("check good.yaml --set data.source=both", 65, "it is unclear which labels to use. Move one away."),
    ("check good.yaml --set vit.weights=./none", 65, "vit.weights"),
    ("trian good.yaml", 64, "No such command 'trian'"),
    ("run", 64, "Missing argument 'SPEC'"),
    ("run good.yaml --wrok x", 64, "--wrok"),
    ("run good.yaml --until training", 64, "--until: there is no phase 'training'; the phases are stage, features"),
    ("plan good.yaml --work=", 64, "is empty"),
    ("plan good.yaml --work good.yaml", 64, "good.yaml cannot be a folder: "),
    ("init", 64, "Missing argument 'DATA'"),
    ("init scale/songs.csv", 64, "scale/songs.csv is a file; name its folder."),
    ("init absent", 65, "labels and audio; name another folder."),
    ("init scale", 64, "run from 2 to 3, which does not say on which scale. Name the scale that the raters had"),
    ("init scale --scale 1 9", 65, "1 song can be used, and 6 are needed at least"),
    ("init scale --scale 9 1", 64, "expected the lowest rating and then a higher one"),
    ("init s3://bucket/songs", 64, "init looks into a folder"),
    ("init scale --scale 1 9 --out good.yaml", 64, "good.yaml exists, and init overwrites nothing"),
    ("predict none a.wav --curve curve.txt", 64, "--curve"),
    ("reproduce none", 65, "manifest.json"),
    ("collect none", 65, "none"),
]


def one_line(said: str, program: str) -> str:
    assert "Traceback" not in said
    (line,) = said.splitlines()
    assert line.startswith(f"{program}: ")
    return line


@pytest.mark.parametrize(("words", "code", "says"), CASES, ids=[case[0] for case in CASES])
def test_a_mistake_is_one_line_with_its_exit_code(
    words: str, code: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["emotion-job", *words.split()])
    before = {*Path().iterdir()}
    assert command() == code
    assert says in one_line(capsys.readouterr().err, "emotion-job")
    assert {*Path().iterdir()} == before


SLURM_CASES: Sequence[tuple[str, int, str]] = [
    ("submit absent.yaml --cluster cluster.yaml", 64, "absent.yaml: no such file"),
    ("submit sweep.yaml --cluster absent.yaml", 64, "absent.yaml: no such file"),
    ("local good.yaml", 64, "good.yaml: this looks like a spec, expected a sweep"),
    ("submit cluster.yaml --cluster sweep.yaml", 64, "cluster.yaml: this looks like a cluster file, expected a sweep"),
    ("doctor --cluster sweep.yaml", 64, "sweep.yaml: this looks like a sweep, expected a cluster file"),
    ("doctor", 64, "Missing option '--cluster'"),
    ("status none", 64, "none"),
    *((f"{name} ''", 64, "'' is empty") for name in ("status", "logs", "resubmit", "cancel")),
    ("submit '' --cluster cluster.yaml", 64, "'SWEEP': '' is empty"),
    ("submit sweep.yaml --cluster=", 64, "'--cluster': '' is empty"),
    ("local sweep.yaml --work ''", 64, "'--work': '' is empty"),
    ("script good.yaml --cluster ''", 64, "'--cluster': '' is empty"),
    ("doctor --cluster cluster.yaml --sweep ''", 64, "'--sweep': '' is empty"),
    ("logs none three", 64, "'three' is not a valid integer"),
]


@pytest.mark.parametrize(("words", "code", "says"), SLURM_CASES, ids=[case[0] for case in SLURM_CASES])
def test_a_mistake_at_the_launcher_is_one_line(
    words: str, code: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["emotion-slurm", *shlex.split(words)])
    assert slurm_main() == code
    assert says in one_line(capsys.readouterr().err, "emotion-slurm")
