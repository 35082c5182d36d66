"""What is published: the files of the phases, once and for all, also when two machines publish one run at once."""

import csv
from pathlib import Path

import pytest

from emotion.errors import ModelError
from job.results.manifest import MANIFEST, read_manifest, stored_manifest
from job.results.publish import copy_run
from job.storage.local_folder import LocalFolder
from tests.conftest import TinyRun
from tests.manifests import write_manifest


def run_with(folder: Path, log: str, model: str = "weights") -> Path:
    """A run that is ready to be published."""
    for name, text in {"model/model.safetensors": model, "logs/job.log": log, "metrics.json": "{}"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return write_manifest(folder)


@pytest.mark.parametrize("already_sent", [0, 1, 2, 3])
def test_the_slower_of_two_publishers_leaves_the_run_of_the_faster_one_intact(tmp_path: Path, already_sent: int) -> None:
    ours, theirs = run_with(tmp_path / "ours", "our log"), run_with(tmp_path / "theirs", "their longer log")
    storage = LocalFolder(tmp_path / "published" / "run")
    asked = 0

    def publish_theirs_meanwhile() -> bool:
        nonlocal asked
        if asked == already_sent:
            copy_run(theirs, storage, lambda: False)
        asked += 1
        return False

    copy_run(ours, storage, publish_theirs_meanwhile)
    manifest = stored_manifest(storage)
    assert manifest is not None
    assert manifest.changed(storage) == []
    log = "their longer log" if already_sent < 3 else "our log"
    assert (storage.path / "logs" / "job.log").read_text() == log


def test_an_empty_manifest_which_a_killed_writer_left_counts_as_none(tmp_path: Path) -> None:
    storage = LocalFolder(tmp_path)
    storage.write("manifest.json", b"")
    copy_run(run_with(tmp_path / "ours", "log"), storage, lambda: False)
    manifest = stored_manifest(storage)
    assert manifest is not None
    assert manifest.changed(storage) == []


def test_a_different_result_of_the_same_run_is_never_overwritten(tmp_path: Path) -> None:
    storage = LocalFolder(tmp_path / "published")
    copy_run(run_with(tmp_path / "one", "log"), storage, lambda: False)
    with pytest.raises(ModelError, match=r"holds another result of this spec \(model/model\.safetensors differs\)"):
        copy_run(run_with(tmp_path / "other", "log", "other"), storage, lambda: False)
    (storage.path / "metrics.json").write_text("[]")
    with pytest.raises(ModelError, match=r"is published, but metrics\.json differs from manifest\.json\. Move"):
        copy_run(run_with(tmp_path / "again", "log"), storage, lambda: False)
    (storage.path / "metrics.json").unlink()
    with pytest.raises(ModelError, match=r"is published, but metrics\.json is missing\. Move"):
        copy_run(run_with(tmp_path / "again", "log"), storage, lambda: False)
    assert (storage.path / "model" / "model.safetensors").read_text() == "weights"
    (storage.path / MANIFEST).write_text("{")
    with pytest.raises(ModelError, match=r"is published, but manifest\.json cannot be read"):
        copy_run(run_with(tmp_path / "again", "log"), storage, lambda: False)


def test_the_published_split_has_every_song_once_and_the_predicted_songs_as_test_songs(tiny_run: TinyRun) -> None:
    artifacts = read_manifest(tiny_run.published / MANIFEST, "test").artifacts
    assert {"split.csv", "left_out.csv"} <= artifacts.keys()
    header, *rows = csv.reader((tiny_run.published / "split.csv").read_text().splitlines())
    assert header == ["song_id", "group", "split"]
    songs = list(csv.DictReader((tiny_run.phase("stage") / "songs.csv").read_text().splitlines()))
    assert {(song_id, group) for song_id, group, _ in rows} == {(song["song_id"], song["group"]) for song in songs}
    assert len(rows) == len(songs) == 24
    assert {split for _, _, split in rows} == {"train", "validation", "test"}
    assert {song for song, _, split in rows if split == "test"} == {row["song_id"] for row in tiny_run.predictions}
    splits_of_group: dict[str, set[str]] = {}
    for _, group, split in rows:
        splits_of_group.setdefault(group, set()).add(split)
    assert all(len(splits) == 1 for splits in splits_of_group.values())
