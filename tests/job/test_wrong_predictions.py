"""A wrong call of predict or export: one clear line, and the documented exit code."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from emotion.errors import DataError
from job.results.predict_files import predict_files
from job.spec.load import load_spec
from job.spec.model import to_yaml
from tests.conftest import TINY, TinyRun
from tests.stores.servers import S3Server

PROGRAM = """
import contextlib, io, json, sys
from job.__main__ import command
found = {}
for name, (arguments, missing) in json.load(sys.stdin).items():
    if missing:
        sys.modules[missing] = None  # as if it were not installed
    said = io.StringIO()
    sys.argv = ["emotion-job", *arguments]
    with contextlib.redirect_stderr(said):
        code = command()
    found[name] = [code, said.getvalue(), "torch" in sys.modules]
    if missing:
        del sys.modules[missing]
print(json.dumps(found))
"""
# Name → arguments, exit code, what the line says. {tmp}, {run}, {song}, {bucket} stand for what the fixture makes.
CASES: dict[str, tuple[list[str], int, str]] = {
    "a missing file": (["predict", "{run}", "{tmp}/absent.mp3"], 65, "there is no file {tmp}/absent.mp3"),
    "a folder without audio": (["predict", "{run}", "{tmp}/texts"], 65, "{tmp}/texts is a folder without audio files (mp3, wav"),
    "a link to nothing": (["predict", "{run}", "{tmp}/link.mp3"], 65, "is a link to annex/1.mp3, which is not here. Fetch"),
    "a device": (["predict", "{run}", "/dev/null"], 65, "/dev/null is a terminal or another device; expected an audio file"),
    "an unknown scheme": (["predict", "{run}", "gs://b/1.mp3"], 64, "gs:// is not supported here"),
    "an export from an unknown scheme": (["export", "gs://b/run", "--onnx", "m.onnx"], 64, "model: gs://b/run: gs:// is not"),
    "an export of a changed model": (
        ["export", "{tmp}/changed", "--onnx", "m.onnx"],
        65,
        "model: {tmp}/changed: stack/stack.json",
    ),
    "a web page": (["predict", "{run}", "https://h/1.mp3"], 64, "https:// is not supported here"),
    "a bucket that is missing": (["predict", "{run}", "s3://no-such-{bucket}/music"], 69, "no-such-{bucket}"),
    "an object that is missing": (["predict", "{run}", "s3://{bucket}/1.mp3"], 69, "s3://{bucket}/1.mp3"),
    "a prefix without audio": (["predict", "{run}", "s3://{bucket}/music"], 65, "has no audio files below it"),
    "no audio": (["predict", "{run}"], 64, "AUDIO"),
    "a missing model": (["predict", "{tmp}/absent", "{song}"], 65, "there is no folder {tmp}/absent. Name a published run"),
    "a model and audio in the wrong order": (["predict", "{song}", "{run}"], 65, "is a file. Name a published run"),
    "a folder that is no model": (["predict", "{tmp}/texts", "{song}"], 65, "{tmp}/texts holds no model.safetensors"),
    "the work folder of a run": (
        ["predict", "{work}", "{song}"],
        65,
        "work folder of a run, whose result is in {done}: name that.",
    ),
    "a phase of a run": (["predict", "{work}/publish-0", "{song}"], 65, "whose result is in {done}: name that."),
    "a folder of runs": (["predict", "{tmp}/work", "{song}"], 65, "It holds published runs: {done}. Name one of them."),
    "an export of a work folder": (["export", "{work}", "--onnx", "m.onnx"], 65, "whose result is in {done}: name that."),
    "a work folder to reproduce": (["reproduce", "{work}"], 65, "whose result is in {done}: name that."),
    "a work folder to collect": (["collect", "{work}", "--out", "c"], 65, "whose result is in {done}: name that."),
    "a model in a bucket without one": (["predict", "s3://{bucket}/music", "{song}"], 65, "holds no model.safetensors"),
    "a copy of a model without a file": (["predict", "{tmp}/part", "{song}"], 65, "{tmp}/part lacks preprocessing.json. Copy"),
    "a model with a changed byte": (["predict", "{tmp}/changed", "{song}"], 65, "stack.json differs from manifest.json."),
    "a damaged manifest": (["predict", "{tmp}/cut", "{song}"], 65, "manifest.json is not a manifest that this version can read"),
    "two forms of rows": (["predict", "{run}", "{song}", "--json", "--csv"], 64, "--json and --csv exclude each other"),
    "a byte order mark in JSON": (["predict", "{run}", "{song}", "--json", "--bom"], 64, "--bom is for --csv only"),
    "curves as a text": (["predict", "{run}", "{song}", "--curve", "c.txt"], 64, "c.txt has to end in .csv, .jsonl or .png"),
    "curves over labels": (
        ["predict", "{run}", "{song}", "--curve", "{tmp}/songs.csv"],
        64,
        "{tmp}/songs.csv exists and holds no",
    ),
    "an export over a file": (["export", "{run}", "--onnx", "{tmp}/m.onnx"], 64, "{tmp}/m.onnx exists. Name another file"),
    "an export without a file": (["export", "{run}"], 64, "--onnx"),
    "an export to another kind of file": (["export", "{run}", "--onnx", "m.pb"], 64, "m.pb has to end in .onnx"),
    "an export without its libraries": (["export", "{run}", "--onnx", "m.onnx"], 64, "--editable '.[onnx]'"),
    "an export of a model that is missing": (["export", "{tmp}/absent", "--onnx", "m.onnx"], 65, "there is no folder"),
}


@pytest.fixture(scope="module")
def said(tiny_run: TinyRun, moto: S3Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, bool, str]]:
    """Exit code, standard error, whether torch was loaded, and the expected text of each case; all of one process."""
    tmp, bucket = tmp_path_factory.mktemp("wrong"), moto.new_bucket()
    (tmp / "texts").mkdir()
    (tmp / "texts" / "a.txt").touch()
    (tmp / "songs.csv").write_text("file,valence,arousal\n", encoding="utf-8")
    (tmp / "m.onnx").touch()
    (tmp / "link.mp3").symlink_to("annex/1.mp3")
    moto.client().put_object(Bucket=bucket, Key="music/a.txt", Body=b"x")
    shutil.copytree(tiny_run.published / "model", tmp / "part")
    (tmp / "part" / "preprocessing.json").unlink()
    for name, file in (("changed", "stack/stack.json"), ("cut", "manifest.json")):
        shutil.copytree(tiny_run.published, tmp / name)
        (tmp / name / file).write_bytes((tmp / name / file).read_bytes()[:-3] + b" ")
    shutil.copytree(tiny_run.published, tmp / "work" / "published" / "tiny-0")
    (tmp / "work" / "tiny-0" / "publish-0").mkdir(parents=True)
    (tmp / "work" / "tiny-0" / "attempts.jsonl").touch()
    (tmp / "work" / "tiny-0" / "spec.yaml").write_text(to_yaml(load_spec(TINY)), encoding="utf-8")
    places = {
        "tmp": tmp,
        "run": tiny_run.published,
        "song": next((tiny_run.published / "samples").glob("*.wav")),
        "bucket": bucket,
        "work": tmp / "work" / "tiny-0",
        "done": tmp / "work" / "published" / "tiny-0",
    }
    missing = {"an export without its libraries": "onnx"}
    asked = {name: ([word.format(**places) for word in words], missing.get(name)) for name, (words, _, _) in CASES.items()}
    environment = {**os.environ, **moto.environment()}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, env=environment, cwd=TINY.parents[1])
    assert done.returncode == 0, done.stderr
    return {name: (*found, CASES[name][2].format(**places)) for name, found in json.loads(done.stdout).items()}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_call_is_one_line_and_an_exit_code_before_torch_is_loaded(
    name: str, said: dict[str, tuple[int, str, bool, str]]
) -> None:
    code, text, has_torch, expected = said[name]
    assert code == CASES[name][1], text
    assert len(text.splitlines()) == 1, text
    assert text.startswith("emotion-job: ")
    assert expected in text
    assert not has_torch, "it takes seconds"


def test_a_missing_model_and_a_missing_song_are_both_named(tmp_path: Path) -> None:
    model, song = str(tmp_path / "absent"), str(tmp_path / "absent.mp3")
    with pytest.raises(DataError) as caught:
        predict_files(model, [song], plain=False, form="tsv", curves=[], say=lambda text, stream: None, should_stop=lambda: False)
    assert str(caught.value).splitlines() == [
        f"model: there is no folder {model}. Name a published run or its folder model/.",
        f"predict: there is no file {song}",
    ]


def test_sounds_that_cannot_be_decoded_are_named_and_the_others_predicted(tiny_run: TinyRun, tmp_path: Path) -> None:
    good = next((tiny_run.published / "samples").glob("*.wav")).read_bytes()
    contents = {
        "1 empty.mp3": (b"", "is empty"),
        "2 page.mp3": (b"<html>" * 100, "expected audio, found"),
        "3 für ☂.wav": (good, ""),
        "4 cut.wav": (good[: len(good) // 2], "is cut, or its header is wrong"),
        "5 table.flac": (b"PK\x03\x04" + bytes(400), "expected audio, found"),
    }
    for name, (content, _) in contents.items():
        (tmp_path / name).write_bytes(content)
    # The memory of a process is a file that may be opened, and cannot be read from its begin.
    sounds = [str(tmp_path), "/proc/self/mem", "-", str(tmp_path / "absent.mp3")]
    command = [sys.executable, "-m", "job", "predict", tiny_run.published, *sounds, "--csv", "--bom"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, input=b"", capture_output=True, env=environment)
    assert done.returncode == 65  # 69 for the one that could not be read is not the first to act on
    assert done.stdout.startswith(b"\xef\xbb\xbfvalence,")
    (row,) = csv.DictReader(io.StringIO(done.stdout.decode("utf-8-sig")))
    assert row["file"] == str(tmp_path / "3 für ☂.wav")
    # Before it stand notes and warnings, and what mpg123 writes on its own account.
    refused = done.stderr.decode().rpartition("emotion-job: ")[2].splitlines()
    expected = [(name.encode("ascii", "backslashreplace").decode(), text) for name, (_, text) in contents.items() if text]
    expected += [
        ("/proc/self/mem", "cannot be read: Input/output error"),
        ("standard input", "is empty"),
        ("absent.mp3", "no file"),
    ]
    assert len(refused) == len(expected), done.stderr
    for line, (name, text) in zip(refused, expected, strict=True):
        assert name in line
        assert text in line
