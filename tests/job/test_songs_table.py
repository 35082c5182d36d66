"""A collection with a `songs.csv`, from `check` to the published tables, from a folder and from object storage."""

import csv
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from emotion.config import DataConfig
from emotion.data.songs import Song, read_songs
from emotion.data.unused import MISNAMED, OTHER
from emotion.errors import DataError, SpecError
from job.config import StorageConfig
from job.spec.load import load_spec
from job.storage.stage import source_files, stage
from tests.conftest import TINY
from tests.stores.dataset import config_of, no
from tests.stores.dataset import staged as numbered
from tests.stores.scripted import Object, ScriptedS3

Command = Callable[..., subprocess.CompletedProcess[str]]

NAMES = [
    f"{folder}{number}{suffix}" for number in range(6) for folder, suffix in (("", ".wav"), ("räksmörgås, live/", " 音.FLAC"))
]
SPLITS = ["train"] * 8 + ["validation", "test"] * 2


def sound(number: int) -> np.ndarray:
    return np.random.default_rng(number).normal(0, 0.1, 6 * 8000)


def write_table(root: Path, names: list[str] = NAMES, **changed: str) -> None:
    """A row per name, on 0..10. changed: `row3` → another row in its place."""
    with (root / "songs.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "valence", "arousal", "group", "split"])
        for number, name in enumerate(names):
            row = changed.get(f"row{number}")
            cells = [name, 10 - number % 11, number % 7, f"artist {number // 2}", SPLITS[number % len(SPLITS)]]
            writer.writerow(row.split("|") if row else cells)


@pytest.fixture
def songs(tmp_path: Path) -> Path:
    root = tmp_path / "my songs"
    for number, name in enumerate(NAMES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(root / name, sound(number), 8000, format=name[-4:].strip(".").upper())
    write_table(root)
    return root


def settings(root: Path, scale: str = "[0, 10]", **more: str) -> list[str]:
    values = {"data.source": str(root), "data.scale": scale, **{key.replace("__", "."): value for key, value in more.items()}}
    return [word for key, value in values.items() if value for word in ("--set", f"{key}={value}")]


def staged(source: str, out: Path, storage: StorageConfig | None = None, **data: object) -> list[Song]:
    out.mkdir()
    config = DataConfig.model_validate({"source": source, "scale": (0.0, 10.0), **data})
    stage(config, storage or StorageConfig(), out.parent / "manifests", out, no)
    return read_songs(out / "songs.csv")


def test_check_and_plan_say_what_they_found(emotion_job: Command, songs: Path, tmp_path: Path) -> None:
    (songs / "new.mp3").touch()
    for command in (["check", TINY], ["plan", TINY, "--work", tmp_path / "work"]):
        found = emotion_job(*command, *settings(songs, split__protocol="column"))
        assert (found.returncode, "splits: the column divides 2 of 6 groups" in found.stderr) == (0, True)
        assert "data: 12 of 12 songs can be used" in found.stdout
        assert (
            "data: labels on 0..10, no standard deviations, so no ceiling, 6 groups, 8 for train, 2 for validation"
            in found.stdout
        )
        assert "not used: audio files that songs.csv does not list; add a row to use one (1: new.mp3)" in found.stdout


@pytest.mark.parametrize(
    ("scale", "protocol", "row", "code", "says"),
    [
        ("", "kfold", None, 64, "data.scale: "),
        ("[10, 0]", "kfold", None, 64, "scale is [10.0, 0.0], expected the lowest rating and then a higher one"),
        (
            "[0, 10]",
            "kfold",
            "1.wav|10.5|2|x|test",
            65,
            "label: song 1.wav, songs.csv, line 4: valence is '10.5', expected 0..10",
        ),
        ("[0, 10]", "kfold", "../1.wav|5|2|x|test", 65, "file is '../1.wav', expected a path inside the dataset's folder"),
        ("[0, 10]", "column", "1.wav|5|2|x|", 65, "1 of 12 songs have no split: 1.wav. Fill the column split"),
    ],
)
def test_check_refuses_with_the_documented_exit_code(
    emotion_job: Command, songs: Path, scale: str, protocol: str, row: str | None, code: int, says: str
) -> None:
    write_table(songs, **({"row2": row} if row else {}))
    found = emotion_job("check", TINY, *settings(songs, scale, split__protocol=protocol))
    assert (found.returncode, says in found.stderr) == (code, True), found.stderr
    assert "Traceback" not in found.stderr


def test_check_refuses_songs_that_the_split_cannot_divide(emotion_job: Command, songs: Path, tmp_path: Path) -> None:
    lists = tmp_path / "lists"
    lists.mkdir()
    for name in ("train", "validation", "test"):
        (lists / f"{name}.txt").write_text("1.wav\n" if name == "test" else "")
    for split, says in (
        ({"split__folds": "7"}, "6 groups (12 songs) cannot fill 7 folds. Lower split.folds"),
        (
            {"split__protocol": "holdout", "split__validation_fraction": "0.9"},
            "Use more songs, or lower split.validation_fraction or split.test_fraction",
        ),
        ({"split__protocol": "lists", "split__lists": str(lists)}, "found songs in no list (11): 0.wav, 2.wav"),
    ):
        found = emotion_job("check", TINY, *settings(songs, **split))
        assert (found.returncode, says in found.stderr) == (65, True), found.stderr


def test_a_scale_that_nothing_asked_for_is_refused(emotion_job: Command) -> None:
    found = emotion_job("check", TINY, "--set", "data.scale=[1, 9]")
    assert found.returncode == 64
    assert "data.scale: generated songs have a scale of their own" in found.stderr


def test_generated_songs_have_no_split_of_their_own() -> None:
    with pytest.raises(SpecError, match=r"split\.protocol: generated songs have no column split; choose another protocol"):
        load_spec(TINY, ["split.protocol=column", "split.fold=0"])


def test_staging_keeps_the_names_of_files_linked_or_copied(songs: Path, tmp_path: Path) -> None:
    found = staged(str(songs), tmp_path / "linked", copy="never")
    assert [song.song_id for song in found] == sorted(NAMES)
    assert [song.audio for song in found] == [f"audio/{song.song_id}" for song in found]
    assert found == staged(str(songs), tmp_path / "copied", copy="always")
    for song in found:
        path = tmp_path / "copied" / song.audio
        assert path.read_bytes() == (songs / str(song.song_id)).read_bytes()
        assert (path.is_symlink(), (tmp_path / "linked" / song.audio).is_symlink()) == (False, True)
    assert json.loads((tmp_path / "copied/scale.json").read_text()) == {"scale": [0, 10]}


def test_object_storage_gives_the_same_songs(store: ScriptedS3, songs: Path, tmp_path: Path) -> None:
    (songs / "not listed.mp3").write_bytes(b"x")
    for path in (path for path in songs.rglob("*") if path.is_file()):
        store.objects[f"music/{path.relative_to(songs).as_posix()}"] = Object(path.read_bytes())
    store.objects["music/deep/notes.txt"] = Object(b"x")
    store.objects["music/metadata.csv"] = Object(b"not a table of this layout")
    remote = staged("s3://bucket/music", tmp_path / "remote", config_of(store))
    assert remote == staged(str(songs), tmp_path / "local")
    for song in remote:
        assert (tmp_path / "remote" / song.audio).read_bytes() == (songs / str(song.song_id)).read_bytes()
    assert store.sent("GetObject", "music/not listed.mp3") == 0
    assert sorted(path.name for path in (tmp_path / "remote").iterdir()) == ["audio", "faults.csv", "scale.json", "songs.csv"]


def test_a_wrong_table_in_object_storage_is_named_by_its_address(store: ScriptedS3, tmp_path: Path) -> None:
    store.objects |= {"music/a.mp3": Object(b"x"), "music/songs.csv": Object(b"file,valence\na.mp3,1\n")}
    with pytest.raises(DataError, match=r"^s3://bucket/music/songs\.csv: expected one column each of file, valence, arousal"):
        staged("s3://bucket/music", tmp_path / "one", config_of(store))
    store.objects["music/songs.csv"] = Object(b"file,valence,arousal\na.mp3,1,1\n")
    with pytest.raises(SpecError, match=r"^data\.scale: s3://bucket/music/songs\.csv does not say"):
        staged("s3://bucket/music", tmp_path / "two", config_of(store), scale=None)


def test_without_a_table_in_object_storage_audio_of_any_name_is_only_named(store: ScriptedS3, tmp_path: Path) -> None:
    store.objects |= {"deam/intro.mp3": Object(b"x"), "deam/metadata.csv": Object(b"song_id,artist\n2,Ann\n")}
    assert numbered(store, tmp_path / "out")["not_used"] == {MISNAMED: 1, OTHER: 1}
    songs = read_songs(tmp_path / "out" / "songs.csv")
    assert [song.song_id for song in songs] == list(range(2, 14))
    assert songs[0].group == "ann"


def test_the_key_of_the_phase_has_the_scale(songs: Path) -> None:
    keys = [
        source_files(DataConfig.model_validate({"source": str(songs), "scale": scale}), StorageConfig(), no)
        for scale in ((0.0, 10.0), (0.0, 20.0))
    ]
    assert keys[0] != keys[1]
    assert keys[0]["files"] == keys[1]["files"]


def test_one_report_names_faults_of_rows_files_and_sounds(emotion_job: Command, songs: Path, tmp_path: Path) -> None:
    soundfile.write(songs / "1.wav", 0 * sound(0), 8000)
    soundfile.write(songs / "2.wav", np.where(np.arange(48000) == 99, np.nan, sound(2)), 8000, subtype="FLOAT")
    (songs / "3.wav").write_bytes((songs / "0.wav").read_bytes())
    (songs / "4.wav").write_text("<html>404</html>")
    (songs / "5.wav").unlink()
    write_table(songs, row1="räksmörgås, live/0 音.FLAC|nan|2|x|train")
    found = emotion_job("run", TINY, *settings(songs), "--work", tmp_path / "work", "--until", "features")
    assert found.returncode == 65
    assert "data: 6 of 12 songs cannot be used as they are; 6 faults" in found.stderr
    (table,) = (tmp_path / "work").glob("tiny-*/faults.csv")
    with table.open(encoding="utf-8", newline="") as file:
        faults = {row["song_id"]: row for row in csv.DictReader(file)}
    assert {song: row["kind"] for song, row in faults.items()} == {
        "räksmörgås, live/0 音.FLAC": "label",
        "1.wav": "unfit audio",
        "2.wav": "undecodable audio",
        "3.wav": "copied audio",
        "4.wav": "undecodable audio",
        "5.wav": "label without audio",
    }
    assert faults["3.wav"]["what"] == "is the sound of song 0.wav"
    assert faults["räksmörgås, live/0 音.FLAC"]["place"] == "songs.csv, line 3"
    drop = settings(songs, data__faults="drop", data__drop_at_most="0.5")
    found = emotion_job("run", TINY, *drop, "--work", tmp_path / "work", "--until", "features")
    assert found.returncode == 0, found.stderr


@pytest.mark.full
def test_a_whole_job_publishes_the_split_of_the_column_and_no_ceiling(emotion_job: Command, songs: Path, tmp_path: Path) -> None:
    run = settings(songs, split__protocol="column", artifacts__destination=str(tmp_path / "published"))
    found = emotion_job("run", TINY, *run, "--work", tmp_path / "work")
    assert found.returncode == 0, found.stderr
    (published,) = (tmp_path / "published").iterdir()
    with (published / "split.csv").open(encoding="utf-8", newline="") as file:
        split = {row["song_id"]: row["split"] for row in csv.DictReader(file)}
    assert split == {name: SPLITS[number] for number, name in enumerate(NAMES)}
    with (published / "predictions.csv").open(encoding="utf-8", newline="") as file:
        predictions = {row["song_id"]: row for row in csv.DictReader(file)}
    tested = {number: name for number, name in enumerate(NAMES) if SPLITS[number] == "test"}
    assert set(predictions) == set(tested.values())
    for number, name in tested.items():
        # Labels are float32 in training and evaluation.
        assert float(predictions[name]["valence_true"]) == pytest.approx((10 - number % 11 - 5) / 5)
        assert float(predictions[name]["arousal_true"]) == pytest.approx((number % 7 - 5) / 5)
    metrics = json.loads((published / "metrics.json").read_text())
    assert (metrics["ceiling"], metrics["no_ceiling"][:5]) == (None, "none:")
    assert metrics["scale"].startswith("labels on -1..1, (x - 5) / 5 of 0..10;")
    assert json.loads((published / "model/preprocessing.json").read_text())["label_scale"]["from"] == [0, 10]
    assert "none: not all test songs have standard deviations" in (published / "report.html").read_text()
    found = emotion_job("collect", published, "--out", tmp_path / "collected")
    assert found.returncode == 0, found.stderr
    assert "made from each dataset's own scale" in found.stdout
    assert emotion_job("run", TINY, *run, "--work", tmp_path / "work").returncode == 0
