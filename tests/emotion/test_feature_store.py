"""The feature store against damage, interruption and wrong input."""

import contextlib
import errno
import math
import os
import shutil
import stat
import tracemalloc
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from emotion.audio.feature_store import Features, FeatureWriter, widened
from emotion.config import MelConfig
from emotion.data.faults import Fault
from emotion.data.songs import SongLabels
from emotion.errors import DataError, Interrupted
from tests.emotion.sounds import SMALL, Array


def clip_of(frames: int, value: float) -> Array:
    """[frames, mels]: every frame and every band has a value of its own."""
    return (value - np.arange(frames)[:, np.newaxis] - np.arange(SMALL.mels) / 16).astype(np.float32)


def write_folder(out: Path) -> None:
    with FeatureWriter(out, SMALL) as writer:
        writer.append(SongLabels(7, 0.5, -0.25, 0.1, 0.2, 'a, "quoted" group'), clip_of(10, 0))
        writer.append(SongLabels(3, -1.0, 1.0, 0.0, 0.0, "b"), clip_of(4, -50))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_folder(tmp_path)
    features = Features(tmp_path)
    assert features.mel == SMALL
    assert [(song.song_id, song.first_frame, song.frames, song.group) for song in features.songs] == [
        (7, 0, 10, 'a, "quoted" group'),
        (3, 10, 4, "b"),
    ]
    assert features.labels.dtype == np.float32
    np.testing.assert_array_equal(features.labels, np.array([[0.5, -0.25], [-1, 1]], np.float32))
    assert (features.songs[0].valence_sd, features.songs[0].arousal_sd) == (0.1, 0.2)
    np.testing.assert_allclose(features.song(1), clip_of(4, -50), atol=0.03)
    clip = features.clip(0, 3, 5)
    assert clip.dtype == np.float32
    assert clip.flags.c_contiguous
    np.testing.assert_allclose(clip, clip_of(10, 0)[3:8], atol=0.03)
    assert (tmp_path / "features.f16").stat().st_size == 14 * 16 * 2


def test_a_stored_song_is_a_view_of_the_file(tmp_path: Path) -> None:
    write_folder(tmp_path)
    features = Features(tmp_path).only([1])
    assert np.array_equal(features.stored(0), clip_of(4, -50).astype(np.float16))
    assert np.shares_memory(features.stored(0), features.stored(0))


def test_a_short_song_is_repeated_from_its_beginning(tmp_path: Path) -> None:
    write_folder(tmp_path)
    clip = Features(tmp_path).clip(1, 0, 11)
    assert clip.shape == (11, 16)
    np.testing.assert_allclose(clip[:, 0], [-50, -51, -52, -53, -50, -51, -52, -53, -50, -51, -52], atol=0.03)


def test_a_clip_that_would_reach_into_the_next_song_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path)
    with pytest.raises(AssertionError):
        Features(tmp_path).clip(0, 6, 5)


def test_a_view_has_only_the_chosen_songs_in_their_order(tmp_path: Path) -> None:
    with FeatureWriter(tmp_path, SMALL) as writer:
        for song_id, value in ((7, 0.0), (3, -20.0), (5, -40.0)):
            labels = SongLabels(song_id, song_id / 10, -0.5, 0.0, 0.0, "a")
            writer.append(labels, clip_of(4, value), file_sha256=f"file {song_id}", sound_sha256="sound")
    features = Features(tmp_path)
    view = features.only([2, 0])
    assert [(song.song_id, song.file_sha256, song.sound_sha256) for song in view.songs] == [
        (5, "file 5", "sound"),
        (7, "file 7", "sound"),
    ]
    np.testing.assert_array_equal(view.labels, np.array([[0.5, -0.5], [0.7, -0.5]], np.float32))
    np.testing.assert_array_equal(view.song(0), features.song(2))
    np.testing.assert_array_equal(view.clip(1, 1, 3), features.clip(0, 1, 3))
    assert view.mel == features.mel
    with pytest.raises(IndexError):
        view.song(2)
    assert [song.song_id for song in view.only([1]).songs] == [7]
    assert (len(features.songs), len(features.labels)) == (3, 3), "the whole is as it was"
    nothing = features.only([])
    assert (nothing.songs, nothing.labels.shape) == ([], (0, 2))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("features.f16", lambda content: content[:-2]),
        ("features.f16", lambda content: content + b"\0\0"),
        ("mel.json", lambda content: content.replace(b'"frames": 14', b'"frames": 13')),
        ("mel.json", lambda content: content.replace(b'"mels": 16', b'"mels": "16"')),
        ("mel.json", lambda content: content[:20]),
        ("mel.json", lambda content: b"[]"),
        ("songs.csv", lambda content: content.replace(b"3,10,4,-1.0,1.0", b"3,10,4,-1.0")),
        ("songs.csv", lambda content: content.replace(b"3,10,4,-1.0", b"3,10,4,nan")),
        ("songs.csv", lambda content: content.replace(b"3,10,4", b"3,9,4")),
        ("songs.csv", lambda content: content.replace(b"3,10,4", b"3,10,5")),
        ("songs.csv", lambda content: content.replace(b"valence,arousal,", b"arousal,valence,")),
        ("songs.csv", lambda content: content.splitlines()[0] + b"\n"),
        ("songs.csv", lambda content: b""),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path: Path, file: str, damage: Callable[[bytes], bytes]) -> None:
    write_folder(tmp_path)
    content = (tmp_path / file).read_bytes()
    assert damage(content) != content
    (tmp_path / file).write_bytes(damage(content))
    with pytest.raises(DataError, match=str(tmp_path)):
        Features(tmp_path)


@pytest.mark.parametrize("file", ["features.f16", "songs.csv", "mel.json"])
def test_a_folder_that_lacks_a_file_is_refused(tmp_path: Path, file: str) -> None:
    write_folder(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(DataError, match=str(tmp_path)):
        Features(tmp_path)


def test_numbers_as_they_are_stored_are_written_as_they_are(tmp_path: Path) -> None:
    """The synthetic clips come so: rounded, and in another order in memory."""
    clip = np.linspace(-1000, 1000, 80).astype(np.float16).reshape(16, 5).T
    with FeatureWriter(tmp_path, SMALL) as writer:
        writer.append(SongLabels(1, 0.0, 0.0, 0.0, 0.0, "a"), clip)
        writer.append(SongLabels(2, 0.0, 0.0, 0.0, 0.0, "b"), clip.astype(np.float32))
    stored = Features(tmp_path)
    assert np.array_equal(stored.stored(0), clip)
    assert np.array_equal(stored.stored(1), clip)


@pytest.mark.parametrize(
    ("log_mel", "valence"),
    [
        (clip_of(5, 0).T, 0.0),
        (clip_of(5, 0)[:, :-1], 0.0),
        (clip_of(0, 0), 0.0),
        (clip_of(5, np.nan), 0.0),
        (clip_of(5, 1e6), 0.0),
        (clip_of(5, np.inf), 0.0),
        (clip_of(5, -1001), 0.0),
        (clip_of(5, 1001).astype(np.float16), 0.0),
        (clip_of(5, np.nan).astype(np.float16), 0.0),
        (clip_of(5, 0), math.nan),
    ],
)
def test_a_wrong_log_mel_or_label_is_refused_and_nothing_is_left(tmp_path: Path, log_mel: Array, valence: float) -> None:
    with pytest.raises(DataError, match="song 12"), FeatureWriter(tmp_path, SMALL) as writer:
        writer.append(SongLabels(12, valence, 0.0, 0.0, 0.0, "a"), log_mel)
    assert list(tmp_path.iterdir()) == []


# Resuming

PARTIAL, JOURNAL = ".features.f16.part", ".songs.jsonl"
LEFT_OUT = Fault("copied audio", 8, "8.mp3", 'is the "sound" of song 7')


def write_song(writer: FeatureWriter, number: int) -> None:
    """Song 2 is left out. Labels and group are hard to write and read exactly."""
    if number == 2:
        writer.leave_out(LEFT_OUT)
        return
    labels = SongLabels(number, number / 7, -1 / 3, 0.1 + 0.2, 1e-17, f'a, "b" \n{number} é')
    writer.append(labels, clip_of(3 + number, -number), may_be_cut=number > 2)


def write_songs(out: Path, until: int = 5, mel: MelConfig = SMALL, made_from: object = None) -> int:
    """Write the five songs, or raise Interrupted before song `until`. Returns the number of songs that were done at the start."""
    with FeatureWriter(out, mel, made_from) as writer:
        done_before = writer.done
        for number in range(done_before, 5):
            if number == until:
                raise Interrupted
            write_song(writer, number)
        assert (writer.faults, writer.may_be_cut) == ([LEFT_OUT], [3, 4])
    return done_before


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    """The files of an uninterrupted attempt."""
    write_songs(tmp_path / "whole")
    return files_of(tmp_path / "whole")


def stopped_songs(out: Path, until: int) -> None:
    with pytest.raises(Interrupted):
        write_songs(out, until)
    assert sorted(path.name for path in out.iterdir()) == [PARTIAL, JOURNAL]


def test_a_stopped_attempt_is_resumed_behind_its_last_song(tmp_path: Path, whole: dict[str, bytes]) -> None:
    for until in range(5):
        stopped_songs(tmp_path / "out", until)
    assert write_songs(tmp_path / "out") == 4
    assert files_of(tmp_path / "out") == whole


@pytest.mark.parametrize(
    ("file", "damage", "done_before"),
    [
        (PARTIAL, lambda content: b"", 0),
        (PARTIAL, lambda content: content[:95], 0),
        (PARTIAL, lambda content: content[:96], 1),
        (PARTIAL, lambda content: content[:-1], 3),
        (PARTIAL, lambda content: content[:-16] + bytes(16), 3),
        (PARTIAL, lambda content: content[:-200] + bytes(200), 1),
        (PARTIAL, lambda content: bytes(len(content)), 0),
        (PARTIAL, lambda content: content + bytes(4096), 4),
        (PARTIAL, lambda content: content[:96] + content, 1),
        (JOURNAL, lambda content: b"", 0),
        (JOURNAL, lambda content: content[:10], 0),
        (JOURNAL, lambda content: content[:-1], 3),
        (JOURNAL, lambda content: content[:-200], 3),
        (JOURNAL, lambda content: content[:-100] + bytes(100), 3),
        (JOURNAL, lambda content: content + bytes(4096), 4),
        (JOURNAL, lambda content: content + b"\n\xff\n", 4),
        (JOURNAL, lambda content: content + content, 4),
        (JOURNAL, lambda content: b"".join(content.splitlines(keepends=True)[1:]), 0),
        (JOURNAL, lambda content: b"".join(np.delete(content.splitlines(keepends=True), 2)), 2),
        (JOURNAL, lambda content: content.replace(b"-0.333", b"-0.334", 1), 0),
        (JOURNAL, lambda content: content.replace(b'"frames": 6', b'"frames": 60000000000000'), 3),
        (JOURNAL, lambda content: content.replace(b'"frames": 6', b'"frames": -6'), 3),
    ],
)
def test_partial_files_are_used_up_to_the_damage(
    tmp_path: Path, whole: dict[str, bytes], file: str, damage: Callable[[bytes], bytes], done_before: int
) -> None:
    stopped_songs(tmp_path / "out", 4)
    content = (tmp_path / "out" / file).read_bytes()
    assert damage(content) != content
    (tmp_path / "out" / file).write_bytes(damage(content))
    assert write_songs(tmp_path / "out") == done_before
    assert files_of(tmp_path / "out") == whole


@pytest.mark.parametrize("every_bytes", [41, pytest.param(5, marks=pytest.mark.full)])
@pytest.mark.parametrize("file", [PARTIAL, JOURNAL])
def test_no_flipped_bit_of_partial_files_reaches_the_result(
    tmp_path: Path, whole: dict[str, bytes], file: str, every_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    stopped_songs(tmp_path / "stopped", 4)
    content = (tmp_path / "stopped" / file).read_bytes()
    for place in range(0, len(content), every_bytes):
        shutil.copytree(tmp_path / "stopped", tmp_path / "out")
        flipped = content[place] ^ 1 << place % 8
        (tmp_path / "out" / file).write_bytes(content[:place] + bytes([flipped]) + content[place + 1 :])
        assert write_songs(tmp_path / "out") < 4
        assert files_of(tmp_path / "out") == whole, f"byte {place}"
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("lost", [PARTIAL, JOURNAL])
def test_one_of_the_two_partial_files_alone_is_not_used(tmp_path: Path, whole: dict[str, bytes], lost: str) -> None:
    stopped_songs(tmp_path / "out", 2)
    (tmp_path / "out" / lost).unlink()
    assert write_songs(tmp_path / "out") == 0
    assert files_of(tmp_path / "out") == whole


def test_what_other_settings_or_another_version_wrote_is_not_used(
    tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    stopped_songs(out, 4)
    assert write_songs(out, mel=SMALL.model_copy(update={"fmin_hz": 50.0})) == 0
    assert Features(out).mel.fmin_hz == 50
    assert write_songs(out, made_from={"seed": 1}) == 0
    assert write_songs(out) == 0
    monkeypatch.setattr("emotion.audio.feature_store.JOURNAL_VERSION", 0)
    assert write_songs(out) == 0
    assert {name: files_of(out)[name] for name in OUTPUTS} == {name: whole[name] for name in OUTPUTS}


OUTPUTS = ("features.f16", "songs.csv", "mel.json")


@pytest.mark.parametrize("lost", [*OUTPUTS[1:], None])
def test_a_finished_folder_without_a_receipt_is_finished_again_from_its_journal(
    tmp_path: Path, whole: dict[str, bytes], lost: str | None
) -> None:
    if lost:
        (tmp_path / "whole" / lost).unlink()
    assert write_songs(tmp_path / "whole") == 5
    assert files_of(tmp_path / "whole") == whole


def test_a_finished_array_without_a_journal_is_not_truncated_while_others_have_it_mapped(
    tmp_path: Path, whole: dict[str, bytes]
) -> None:
    with (tmp_path / "whole" / "features.f16").open("rb") as mapped:
        (tmp_path / "whole" / JOURNAL).unlink()
        stopped_songs(tmp_path / "whole", 1)
        assert mapped.read() == whole["features.f16"]


def test_after_a_failed_fsync_no_song_since_the_last_one_is_used(
    tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may drop pages that it could not write, and reports that only once."""
    monkeypatch.setattr("emotion.audio.feature_store.DURABLE_SECONDS", 0.0)
    fsync, calls = os.fsync, count(1)

    def broken_once(descriptor: int) -> None:
        # Two for each of two songs came before. Folders do not count.
        if stat.S_ISREG(os.fstat(descriptor).st_mode) and next(calls) == 5:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", broken_once)
    with pytest.raises(OSError, match="Input/output"):
        write_songs(tmp_path / "out")
    assert write_songs(tmp_path / "out") == 2
    assert files_of(tmp_path / "out") == whole


def test_a_failed_attempt_leaves_its_journal_but_no_folder_that_looks_finished(tmp_path: Path) -> None:
    write_folder(tmp_path)

    def fail_midway() -> None:
        with FeatureWriter(tmp_path, SMALL, "other songs") as writer:
            writer.append(SongLabels(1, 0.0, 0.0, 0.0, 0.0, "a"), clip_of(3, 0))
            raise KeyError

    with pytest.raises(KeyError):
        fail_midway()
    assert {path.name: path.read_bytes().count(b"\n") for path in tmp_path.glob("*.jsonl")} == {JOURNAL: 1}
    with pytest.raises(DataError):
        Features(tmp_path)


@pytest.mark.parametrize("done", range(6))
def test_a_suspended_job_that_wakes_after_another_took_over_changes_no_byte(
    tmp_path: Path, whole: dict[str, bytes], done: int
) -> None:
    with contextlib.ExitStack() as stack:
        sleeper = stack.enter_context(FeatureWriter(tmp_path / "out", SMALL))
        write_song(sleeper, 0)
        write_song(sleeper, 1)
        leave = stack.pop_all()
    with FeatureWriter(tmp_path / "out", SMALL) as owner:
        for number in range(owner.done, done):
            write_song(owner, number)
        write_song(sleeper, 2)
        write_song(sleeper, 3)
        with pytest.raises(Interrupted), leave:
            raise Interrupted
        for number in range(done, 5):
            write_song(owner, number)
    assert files_of(tmp_path / "out") == whole


def test_songs_are_made_durable_together_every_two_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    lines = []
    with FeatureWriter(tmp_path, SMALL) as writer:
        for now in (0.5, 1.9, 2.1, 2.2, 4.0, 4.2):  # noqa: B007 - the clock reads it
            writer.append(SongLabels(1, 0.0, 0.0, 0.0, 0.0, "a"), clip_of(1, 0))
            lines.append((tmp_path / JOURNAL).read_bytes().count(b"\n"))
    assert lines == [0, 0, 3, 3, 3, 6]


def test_resuming_reads_one_song_at_a_time(tmp_path: Path) -> None:
    with FeatureWriter(tmp_path, SMALL) as writer:
        for song_id in range(50):
            writer.append(SongLabels(song_id, 0.0, 0.0, 0.0, 0.0, "a"), clip_of(900, 0))
    tracemalloc.start()
    try:
        with FeatureWriter(tmp_path, SMALL) as writer:
            assert writer.done == 50
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 6 * 900 * 16 * 2 < 50 * 900 * 16 * 2 / 8


def test_every_float16_is_widened_to_the_same_number() -> None:
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    assert widened(finite.reshape(-1, 8)).tobytes() == finite.astype(np.float32).tobytes()
    assert widened(finite).dtype == np.float32
    for number in (np.nan, np.inf, -np.inf):
        one = np.array([[-40, number]], np.float16)
        np.testing.assert_array_equal(widened(one), one.astype(np.float32))
    assert widened(np.zeros((0, 4), np.float16)).shape == (0, 4)
