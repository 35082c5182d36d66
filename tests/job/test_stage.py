import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emotion.config import DataConfig
from emotion.data.faults import Fault, read_faults
from emotion.data.songs import OTHER_FORMATS, read_songs
from emotion.data.unused import HIDDEN, MISNAMED, UNFINISHED, Unused
from emotion.errors import DataError, Interrupted, StorageError
from job.config import StorageConfig
from job.storage import stage as module
from job.storage.local_folder import LocalFolder
from tests.stores.dataset import staged
from tests.stores.scripted import Object, ScriptedS3

HEADER = "song_id, valence_mean, valence_std, arousal_mean, arousal_std\n"


def never() -> bool:
    return False


def source_files(source: str) -> dict[str, Any]:
    return module.source_files(DataConfig(source=source), StorageConfig(), never)


def stage(source: str, out: Path, should_stop: Callable[[], bool], **data: Any) -> dict[str, Any]:
    """The notes of a staging by one thread, so that it is known what has been copied when it is asked to stop."""
    config = DataConfig(source=source, **{"copy": "always", **data})
    return module.stage(config, StorageConfig(connections=1), out.parent / "manifests", out, should_stop)[1]


def write_dataset(root: Path, names: list[str]) -> Path:
    """Labels, and files that are not decoded here, in folders with blanks in their names."""
    (root / "song labels").mkdir(parents=True)
    (root / "MEMD audio").mkdir()
    rows = [f"{int(Path(name).stem)}, {place + 2}, 1, 3, 1\n" for place, name in enumerate(names)]
    (root / "song labels" / "static_annotations_averaged_songs_1_2000.csv").write_text(HEADER + "".join(rows))
    for place, name in enumerate(names):
        path = root / "MEMD audio" / name
        path.write_bytes(f"sound of {name}".encode())
        os.utime(path, ns=(0, 1_000_000_000_000_000_000 + place))
    return root


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "my data", ["2.mp3", "0010.MP3", "30.flac", "4.wav", "5.ogg"])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The phase's folder, which the runner makes."""
    folder = tmp_path / "scratch folder" / "stage"
    folder.mkdir(parents=True)
    return folder


def files_of(root: Path) -> dict[str, list[int]]:
    files: dict[str, list[int]] = source_files(str(root))["files"]
    return files


# The key of the phase


def test_source_files_are_name_size_and_time_of_every_file_of_the_dataset(source: Path) -> None:
    (source / "notes.txt").write_text("what a job writes beside the music changes nothing")
    files = files_of(source)
    assert len(files) == 6
    assert files["MEMD audio/0010.MP3"] == [len("sound of 0010.MP3"), 1_000_000_000_000_000_001]


def change_time(path: Path) -> None:
    os.utime(path, ns=(0, 5))


def change_name(path: Path) -> None:
    path.rename(path.with_name("2.wav"))


def change_size(path: Path) -> None:
    time = path.stat().st_mtime_ns
    path.write_bytes(b"longer than before")
    os.utime(path, ns=(0, time))


def add_another(path: Path) -> None:
    path.with_name("3.mp3").write_bytes(b"new")


@pytest.mark.parametrize("change", [change_time, change_name, change_size, add_another, Path.unlink])
def test_source_files_change_with_any_file(source: Path, change: Callable[[Path], None]) -> None:
    before = source_files(str(source))
    change(source / "MEMD audio" / "2.mp3")
    assert source_files(str(source)) != before


def test_source_files_do_not_depend_on_the_order_of_creation(tmp_path: Path) -> None:
    names = [f"{number}.mp3" for number in range(2, 20)]
    forth, back = tmp_path / "forth", tmp_path / "back"
    for root, order in ((forth, names), (back, names[::-1])):
        root.mkdir()
        for name in order:
            (root / name).write_bytes(name.encode())
            os.utime(root / name, ns=(0, 7))
    assert list(files_of(forth).items()) == list(files_of(back).items())


def test_reading_a_file_does_not_change_source_files(source: Path) -> None:
    before = source_files(str(source))
    (source / "MEMD audio" / "2.mp3").read_bytes()
    assert source_files(str(source)) == before


def test_a_link_to_the_folder_is_the_same_source(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    assert source_files(str(tmp_path / "link")) == source_files(str(source))


def test_files_behind_a_linked_folder_are_part_of_the_source_and_staged(source: Path, tmp_path: Path, out: Path) -> None:
    (source / "MEMD audio").rename(tmp_path / "another disk")
    (source / "linked").symlink_to(tmp_path / "another disk")
    before = files_of(source)
    assert before["linked/2.mp3"][0] == len("sound of 2.mp3")
    change_size(source / "linked" / "2.mp3")
    assert files_of(source) != before
    stage(str(source), out, never)
    assert (out / "audio" / "2.mp3").read_bytes() == b"longer than before"


def test_generated_songs_are_identified_by_their_number_without_disk_access() -> None:
    assert source_files("generated:12") == source_files("generated:12") != source_files("generated:13")


@pytest.mark.parametrize("name", ["absent", "a file"])
def test_a_source_that_is_not_a_folder_is_named_in_the_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "a file").write_text("x")
    with pytest.raises(DataError, match=f"no folder {tmp_path}/{name}"):
        source_files(str(tmp_path / name))


# The phase


def test_songs_csv_names_existing_files_with_the_bytes_of_the_source(source: Path, out: Path) -> None:
    stage(str(source), out, never)
    songs = read_songs(out / "songs.csv")
    assert [(song.song_id, song.audio) for song in songs] == [
        (2, "audio/2.mp3"),
        (4, "audio/4.wav"),
        (5, "audio/5.ogg"),
        (10, "audio/10.mp3"),
        (30, "audio/30.flac"),
    ]
    # 2 on DEAM's scale is -0.75 on ours.
    assert (songs[0].valence, songs[0].arousal) == (-0.75, -0.5)
    for song, name in zip(songs, ["2.mp3", "4.wav", "5.ogg", "0010.MP3", "30.flac"], strict=True):
        assert (out / song.audio).read_bytes() == f"sound of {name}".encode()


@pytest.mark.parametrize("copied", [0, 1, 3])
def test_a_stopped_staging_keeps_its_copies_and_the_next_copies_only_the_rest(source: Path, out: Path, copied: int) -> None:
    with pytest.raises(Interrupted, match="stage: stopped after"):
        stage(str(source), out, lambda: len(list(out.glob("audio/*"))) >= copied)
    assert not (out / "songs.csv").exists()
    kept = {path: path.stat().st_ino for path in out.glob("audio/*")}
    assert len(kept) == copied
    stage(str(source), out, never)
    # A copy is a new file that replaces the old one.
    assert {path: path.stat().st_ino for path in kept} == kept
    assert len(list(out.glob("audio/*"))) == 5


def test_a_copy_with_another_size_or_time_is_made_again(source: Path, out: Path) -> None:
    stage(str(source), out, never)
    cut, touched = out / "audio" / "2.mp3", out / "audio" / "4.wav"
    cut.write_bytes(b"sound")
    touched.write_bytes(b"sounds like 4")
    stage(str(source), out, never)
    assert cut.read_bytes() == b"sound of 2.mp3"
    assert touched.read_bytes() == b"sound of 4.wav"


def test_staging_does_not_change_the_source(source: Path, out: Path) -> None:
    before = source_files(str(source))
    stage(str(source), out, never)
    assert source_files(str(source)) == before


def test_a_folder_without_labels_is_an_error_and_leaves_nothing(source: Path, out: Path) -> None:
    (source / "song labels" / "static_annotations_averaged_songs_1_2000.csv").unlink()
    with pytest.raises(DataError, match="no label file"):
        stage(str(source), out, never)
    assert not list(out.iterdir())


def test_only_usable_songs_are_copied_and_all_faults_are_recorded(source: Path, out: Path) -> None:
    table = source / "song labels" / "static_annotations_averaged_songs_1_2000.csv"
    table.write_text(table.read_text() + "30, 3, 1, 33, 1\n40, 3, 1, 3, 1\n")
    (source / "MEMD audio" / "2.mp3").rename(source / "MEMD audio" / "3.mp3")
    stage(str(source), out, never)
    assert sorted(path.name for path in (out / "audio").iterdir()) == ["10.mp3", "4.wav", "5.ogg"]
    assert [song.song_id for song in read_songs(out / "songs.csv")] == [4, 5, 10]
    rows = "song labels/static_annotations_averaged_songs_1_2000.csv, line"
    expected = f"expected {{}}.mp3 (or {OTHER_FORMATS}) anywhere below the dataset's folder"
    assert read_faults(out / "faults.csv") == [
        Fault("label", 30, f"{rows} 7", "arousal_mean is '33', expected 1 to 9"),
        Fault("label without audio", 2, f"{rows} 2", expected.format(2)),
        Fault("label without audio", 40, f"{rows} 8", expected.format(40)),
        Fault("audio without label", 3, "MEMD audio/3.mp3", "no label file has a row with this id"),
    ]


def test_files_that_are_not_used_are_in_the_log_and_in_the_notes(
    source: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (source / "song 1.mp3").write_bytes(b"x")
    (source / "notes").write_bytes(b"x")
    with caplog.at_level(logging.INFO):
        notes = stage(str(source), out, never)
    (warning,) = [record for record in caplog.records if "song ids" in record.message]
    assert warning.levelno == logging.WARNING
    assert "phase=stage not used: audio files whose names are no song ids" in warning.message
    assert "phase=stage not used: other files (1: notes)" in caplog.messages
    assert sorted(notes["not_used"].values()) == [1, 1]


def test_names_in_a_storage_that_are_not_used_are_counted(tmp_path: Path) -> None:
    for name in ("static_annots.csv", "1.mp3", "a/song.mp3", ".git/2.mp3", "a/2.mp3.part"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    unused = Unused()
    found = module.dataset_entries(LocalFolder(tmp_path), "s3://bucket/songs", unused)
    assert [entry.name for entry in found] == ["1.mp3", "static_annots.csv"]
    assert unused.counts == {MISNAMED: 1, HIDDEN: 1, UNFINISHED: 1}


def test_a_dataset_without_a_usable_song_is_staged_with_its_faults(source: Path, out: Path) -> None:
    (source / "song labels" / "static_annotations_averaged_songs_1_2000.csv").write_text(HEADER)
    stage(str(source), out, never)
    assert read_songs(out / "songs.csv") == []
    assert [fault.song_id for fault in read_faults(out / "faults.csv")] == [None, 2, 4, 5, 10, 30]
    assert not (out / "audio").exists()


def test_a_dataset_without_faults_has_an_empty_table_of_them(source: Path, out: Path) -> None:
    stage(str(source), out, never)
    assert read_faults(out / "faults.csv") == []


@pytest.mark.parametrize("folder", [os.fsdecode(b"caf\xe9 \xff"), "🎵 blanks  ", "new\nline\r", 'com,ma;"quote'])
def test_folders_of_the_source_may_have_any_name(source: Path, out: Path, folder: str) -> None:
    plain = out.with_name("plain")
    plain.mkdir()
    stage(str(source), plain, never)
    (source / folder).mkdir()
    (source / "MEMD audio").rename(source / folder / "MEMD audio")
    (source / folder / "11.mp3").write_bytes(b"no label")
    assert len(files_of(source)) == 7
    stage(str(source), out, never)
    assert (out / "songs.csv").read_bytes() == (plain / "songs.csv").read_bytes()
    (fault,) = read_faults(out / "faults.csv")
    assert (fault.kind, fault.song_id) == ("audio without label", 11)
    assert fault.place.endswith("/11.mp3")
    assert fault.place.isprintable()
    # The recorded manifest can name such files, too.
    assert stage(str(source), out, never)["verified"] == {"as staged before, then by size": 6}


def test_staged_files_do_not_depend_on_the_order_of_creation(tmp_path: Path) -> None:
    names = [f"{number}.mp3" for number in (5, 30, 2, 7, 100, 11)]
    staged = []
    for place, order in enumerate((names, names[::-1], sorted(names))):
        root, out = write_dataset(tmp_path / f"source {place}", names), tmp_path / f"out {place}"
        out.mkdir()
        for name in order:
            (root / "MEMD audio" / name).unlink()
        for name in order:
            if name not in ("7.mp3", "100.mp3"):
                (root / "MEMD audio" / name).write_bytes(name.encode())
        stage(str(root), out, never)
        staged.append({path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()})
    assert staged[0] == staged[1] == staged[2]
    assert [song.song_id for song in read_songs(tmp_path / "out 0" / "songs.csv")] == [2, 5, 11, 30]
    assert [fault.song_id for fault in read_faults(tmp_path / "out 0" / "faults.csv")] == [7, 100]


def test_a_target_that_cannot_be_written_is_a_storage_error(source: Path, out: Path) -> None:
    (out / "audio").write_text("a file is in the way")
    with pytest.raises(StorageError, match="cannot make"):
        stage(str(source), out, never)
    assert not (out / "songs.csv").exists()


def test_generated_songs_are_written_to_the_phase_folder(out: Path) -> None:
    stage("generated:12", out, never)
    songs = read_songs(out / "songs.csv")
    assert len(songs) == 12
    assert all((out / song.audio).stat().st_size > 10_000 for song in songs)


def test_a_table_that_changes_during_staging_is_an_error_and_stays_as_it_is(source: Path, out: Path) -> None:
    table = source / "song labels" / "static_annotations_averaged_songs_1_2000.csv"

    def edit() -> bool:
        with table.open("a") as file:
            file.write("\n")
        return False

    with pytest.raises(DataError, match=r"songs_1_2000\.csv changed while it was staged"):
        stage(str(source), out, edit)
    assert table.read_text().startswith(HEADER)
    assert not table.is_symlink()


def test_a_table_that_gets_other_labels_between_its_check_and_its_reading_is_an_error(
    source: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = source / "song labels" / "static_annotations_averaged_songs_1_2000.csv"
    before, content = table.stat(), table.read_bytes()

    class Editing(logging.Handler):
        """Changes a rating, but neither size nor time, as soon as the log says that the tables are verified."""

        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("phase=stage labels files=1"):
                table.write_bytes(content.replace(b"2, 2, 1", b"2, 8, 1"))
                os.utime(table, ns=(before.st_atime_ns, before.st_mtime_ns))

    editing = Editing()
    module.log.addHandler(editing)
    try:
        with caplog.at_level(logging.INFO, module.log.name), pytest.raises(DataError, match=f"{table} changed while it was read"):
            stage(str(source), out, never)
    finally:
        module.log.removeHandler(editing)
    assert table.read_bytes() != content
    assert not (out / "songs.csv").exists()


def test_songs_on_the_file_system_of_scratch_are_linked_unless_copies_are_asked_for(source: Path, out: Path) -> None:
    notes = stage(str(source), out, never, copy="auto")
    songs = sorted((out / "audio").iterdir())
    assert [path.is_symlink() for path in songs] == [True] * 5
    assert notes == {"verified": {"size": 6}}
    linked = {path.name: path.read_bytes() for path in songs}
    stage(str(source), out, never, copy="always")
    assert [path.is_symlink() for path in songs] == [False] * 5
    assert {path.name: path.read_bytes() for path in songs} == linked


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[" * 100_000, "RecursionError"),
        ("{", "JSONDecodeError"),
        ('{"files": {"2.mp3": 1}}', "TypeError"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "found a git-lfs pointer"),
        ("<html><body>Sign in</body></html>", "found a web page"),
    ],
)
def test_a_dataset_manifest_that_is_none_is_one_line(source: Path, out: Path, content: str, says: str) -> None:
    (source / "dataset.json").write_text(content)
    with pytest.raises(DataError, match=r"dataset\.json: expected") as caught:
        stage(str(source), out, never)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_are_verified_against_a_given_a_found_and_a_recorded_manifest(source: Path, out: Path) -> None:
    stage(str(source), out, never)
    (recorded,) = (out.parent / "manifests").iterdir()
    song = source / "MEMD audio" / "2.mp3"
    times, content = song.stat(), song.read_bytes()
    song.write_bytes(b"sounD of 2.mp3")
    os.utime(song, ns=(times.st_atime_ns, times.st_mtime_ns))
    again = out.with_name("again")
    again.mkdir()
    for name in ("recorded", "found", "given"):
        if name == "found":
            (source / "dataset.json").write_bytes(recorded.read_bytes())
            recorded.unlink()
        given = {"manifest": str(recorded)} if name == "given" else {}
        if given:
            (source / "dataset.json").replace(recorded)
        for copy in ("always", "never"):
            with pytest.raises(DataError, match=r"1 of 5 files .* MEMD audio/2\.mp3: .* is damaged") as caught:
                stage(str(source), again, never, copy=copy, **given)
            assert caught.value.exit_code == 65
    song.write_bytes(content)
    os.utime(song, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert stage(str(source), again, never, manifest=str(recorded))["verified"] == {"as staged before, then by size": 6}
    (source / "MEMD audio" / "30.flac").unlink()
    with pytest.raises(DataError, match=r"data\.source: not what .* lists: MEMD audio/30\.flac is missing"):
        stage(str(source), again, never, manifest=str(recorded))


# Dynamic annotations


def write_dynamic_files(root: Path) -> None:
    folder = root / "annotations" / "dynamic (per second annotations)"
    folder.mkdir(parents=True)
    for name, value in (("valence", 0.25), ("arousal", -0.5)):
        (folder / f"{name}.csv").write_text(f"song_id,sample_15000ms\n2,{value}\n77,0.5\n")


def test_dynamic_annotations_are_staged_as_one_table_where_there_are_any(source: Path, out: Path) -> None:
    stage(str(source), out, never)
    assert not (out / "dynamic.csv").exists()
    before = files_of(source)
    write_dynamic_files(source)
    stage(str(source), out, never)
    # Of the songs that are there.
    assert (out / "dynamic.csv").read_text() == "song_id,seconds,valence,arousal\n2,15.0,0.25,-0.5\n"
    assert len(files_of(source)) == len(before) + 2, "another table is another key"


def test_dynamic_annotations_in_object_storage_are_fetched(store: ScriptedS3, tmp_path: Path) -> None:
    for name, value in (("valence", 0.25), ("arousal", -0.5)):
        content = f"song_id,sample_15000ms\n2,{value}\n".encode()
        store.objects[f"deam/annotations/dynamic (per second annotations)/{name}.csv"] = Object(content)
    staged(store, tmp_path / "out")
    assert (tmp_path / "out" / "dynamic.csv").read_text() == "song_id,seconds,valence,arousal\n2,15.0,0.25,-0.5\n"
