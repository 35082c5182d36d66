"""Sixty songs with a fault of every kind: one report names them all, or the job continues without those songs and reports it."""

import csv
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from emotion.data.toy_dataset import generate_dataset

TINY = Path(__file__).parent.parent / "tiny.yaml"

pytestmark = pytest.mark.full


def plant(root: Path) -> tuple[dict[int | None, str], set[int]]:
    """Damage a dataset of 60 songs. Returns the text of each song's fault, and the songs with odd spellings, which are usable."""
    (first,) = root.rglob("static_annotations_averaged_songs_1_2000.csv")
    header, *lines = first.read_text().splitlines()
    rows = {int(line.split(",")[0]): line.split(",") for line in lines}
    excerpts = iter(sorted(rows))
    audio = {int(path.stem): path for path in root.rglob("*.mp3")}
    faults: dict[int | None, str] = {}

    def label(column: int, text: str, says: str) -> None:
        song = next(excerpts)
        rows[song][column] = text
        faults[song] = says

    label(1, "nan", "valence_mean is 'nan', expected 1 to 9")
    label(3, "inf", "arousal_mean is 'inf', expected 1 to 9")
    label(1, "0.5", "valence_mean is '0.5', expected 1 to 9")
    label(3, "9.5", "arousal_mean is '9.5', expected 1 to 9")
    label(1, "happy", "valence_mean is 'happy'")
    label(2, "-1", "valence_std is '-1', expected 0 or more")
    song = next(excerpts)
    rows[song].pop()
    faults[song] = "4 cells, expected 5 as in the header"
    song = next(excerpts)
    twice = [*rows[song][:1], "1.25", *rows[song][2:]]
    faults[song] = "valence 1.25"
    song = next(excerpts)
    del rows[song]
    faults[song] = "no label file has a row with this id"
    song = next(excerpts)
    audio[song].unlink()
    faults[song] = f"expected {song}.mp3 (or wav, flac, ogg,"
    song = next(excerpts)
    soundfile.write(audio[song].with_suffix(".wav"), np.zeros(8000), 8000)
    faults[song] = "expected one for a song"
    semicolons = [next(excerpts), next(excerpts)]
    moved = [";".join(cell.replace(".", ",") for cell in rows.pop(song)) for song in semicolons]
    (first.parent / "static_annots_excel.csv").write_text("\n".join([";".join(header.split(",")), *moved]))
    lines = [header, *map(",".join, rows.values()), ",".join(twice), "n7,5,1,5,1"]
    first.write_bytes("\ufeff".encode() + "\r\n".join(lines).encode())
    (first.parent / "static_annots_empty.csv").write_text("")
    (first.parent / "static_annots_short.csv").write_text("song_id,valence_mean\n2,5\n")

    rng = np.random.default_rng(0)
    noise = 0.1 * rng.standard_normal((10 * 8000, 1))

    def sound(samples: np.ndarray, says: str, subtype: str = "PCM_16") -> None:
        song = next(excerpts)
        audio[song].unlink()
        soundfile.write(audio[song].with_suffix(".WAV"), samples, 8000, format="WAV", subtype=subtype)
        faults[song] = says

    sound(noise[:1600], "lasts 0.20 s, expected at least data.shortest_seconds")
    sound(noise[:48000], "is cut: lasts 6.00 s, expected an excerpt of data.excerpt_seconds 10")
    sound(np.tile(noise, (3, 1)), "lasts longer than 25 s")
    sound(0 * noise, "is silent, channels averaged: RMS -100.0 dB")
    sound(np.hstack([noise, -noise]), "is silent")
    sound(220 * noise, "has a peak of", "FLOAT")
    sound(np.where(np.arange(80000)[:, None] == 99, np.nan, noise), "infinite or NaN samples", "FLOAT")
    for content, says in (
        (b"<html>404</html>", "found a web page"),
        (b"", "is empty"),
        (audio[2001].read_bytes()[:700], "lasts 0.05 s"),
    ):
        song = next(excerpts)
        audio[song].write_bytes(content)
        faults[song] = says
    original, copy = next(excerpts), next(excerpts)
    shutil.copyfile(audio[original], audio[copy])
    faults[copy] = f"is the sound of song {original}"

    odd = next(excerpts)
    folder = root / os.fsdecode(b"caf\xe9 \xf0\x9f\x8e\xb5")
    folder.mkdir()
    audio[odd].rename(folder / f"000{odd}.MP3")
    return faults, {*semicolons, original, odd}


@pytest.fixture(scope="module")
def dirty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int | None, str], set[int]]:
    root = tmp_path_factory.mktemp("dirty")
    generate_dataset(root, 60, 1, lambda: False)
    return root, *plant(root)


def test_one_report_names_every_fault_and_the_job_finishes_without_those_songs(
    dirty: tuple[Path, dict[int | None, str], set[int]],
    emotion_job: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    root, faults, fine = dirty
    settings = [f"data.source={root}", "data.excerpt_seconds=10", "data.longest_seconds=25"]
    arguments = ["run", TINY, "--work", tmp_path, *(word for setting in settings for word in ("--set", setting))]

    failed = emotion_job(*arguments)
    assert failed.returncode == 65
    assert "Traceback" not in failed.stderr
    assert "phase=stage faults=" in failed.stderr
    report = failed.stderr[failed.stderr.index("emotion-job: data:") :]
    assert f"{len(faults)} of 60 songs cannot be used as they are" in report
    for song, says in faults.items():
        (line,) = [line for line in report.splitlines() if f"song {song}," in line]
        assert says in line
    for says in ("song_id is 'n7'", "static_annots_empty.csv: the file is empty", "missing or repeated: valence_std"):
        assert says in report
    assert not any(f"song {song}," in report for song in fine)
    (table,) = tmp_path.glob("tiny-*/faults.csv")
    with table.open(encoding="utf-8", newline="") as file:
        assert {row["song_id"] for row in csv.DictReader(file)} == {*map(str, faults), ""}

    # A few too many, then enough.
    refused = emotion_job(*arguments, "--set", "data.faults=drop", "--set", "data.drop_at_most=0.3")
    assert refused.returncode == 65
    assert "data.drop_at_most 0.3 allows 18 songs" in refused.stderr
    finished = emotion_job(*arguments, "--set", "data.faults=drop", "--set", "data.drop_at_most=0.5")
    assert finished.returncode == 0, finished.stderr
    published = Path(finished.stdout.splitlines()[-1])
    manifest = json.loads((published / "manifest.json").read_text())
    assert {fault["song_id"] for fault in manifest["left_out"]} == {*faults, None}
    for fault in manifest["left_out"]:
        if fault["song_id"] is not None:
            assert faults[fault["song_id"]] in fault["what"]
    assert sum(json.loads((published / "metrics.json").read_text())["songs"].values()) == 60 - len(faults)
    page = (published / "report.html").read_text()
    assert "data.excerpt_seconds 10" in page
