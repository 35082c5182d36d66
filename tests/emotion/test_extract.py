"""Phase features: what is wrong with audio, threads, kills and full disks."""

import hashlib
import logging
import math
import os
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from emotion.audio import mpeg
from emotion.audio.feature_store import Features
from emotion.audio.mel import LogMel
from emotion.audio.song_decoding import ChangedFileError, decode_song
from emotion.data.faults import Fault, read_faults
from emotion.data.songs import AUDIO_FORMATS, Song
from emotion.errors import DataError, Interrupted
from tests.emotion.extraction import die_at, exit_code_of, extract, files_of, song_of, write_songs
from tests.emotion.sounds import SMALL, Array, decode, noise

PARTIAL, JOURNAL = ".features.f16.part", ".songs.jsonl"


def refusal(songs: Sequence[Song], root: Path, label_faults: Sequence[Fault] = (), **data: Any) -> str:
    """The error of a dataset that is refused; the folder is left empty."""
    with pytest.raises(DataError) as caught:
        extract(songs, root, label_faults, **data)
    assert list((root / "out").iterdir()) == []
    return str(caught.value)


# A file that is not the one that was staged


def digests_of(songs: Sequence[Song], root: Path) -> dict[str, str]:
    return {song.audio: hashlib.sha256((root / song.audio).read_bytes()).hexdigest() for song in songs}


def replaced_by(path: Path, content: bytes) -> None:
    """Other bytes of the same size, with the same time."""
    status = path.stat()
    assert len(content) == status.st_size
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("other", ["another sound", "no sound"])
def test_a_file_that_was_replaced_after_staging_is_an_error_and_never_left_out(tmp_path: Path, other: str) -> None:
    songs = write_songs(tmp_path, [0.2, 0.2, 0.2])
    digests = digests_of(songs, tmp_path)
    path = tmp_path / songs[1].audio
    replaced_by(path, (tmp_path / songs[2].audio).read_bytes() if other == "another sound" else bytes(path.stat().st_size))
    said = refusal(songs, tmp_path, digests=digests, faults="drop", drop_at_most=1.0)
    assert f"{path} changed while the job ran" in said
    assert digests[songs[1].audio] in said


def test_a_file_that_is_gone_after_staging_is_an_error(tmp_path: Path) -> None:
    songs = write_songs(tmp_path, [0.2, 0.2])
    digests = digests_of(songs, tmp_path)
    (tmp_path / songs[0].audio).unlink()
    assert "it is gone" in refusal(songs, tmp_path, digests=digests)


class Replacing(LogMel):
    """Does something to the file while it is decoded."""

    act: Callable[[], None] = staticmethod(lambda: None)

    def of_blocks(self, blocks: Iterable[Array]) -> Array:
        found = super().of_blocks(blocks)
        self.act()
        return found


def test_a_file_that_is_replaced_while_it_is_decoded_is_an_error(tmp_path: Path) -> None:
    one, other = write_songs(tmp_path, [0.2, 0.2])
    path, log_mel = tmp_path / one.audio, Replacing(SMALL)
    assert decode_song(path, log_mel, 60.0).file_sha256 == digests_of([one], tmp_path)[one.audio]
    log_mel.act = lambda: replaced_by(path, (tmp_path / other.audio).read_bytes())
    with pytest.raises(ChangedFileError, match=f"{path} changed while the job ran"):
        decode_song(path, log_mel, 60.0)


def test_a_file_that_is_renamed_onto_it_and_back_while_it_is_decoded_is_an_error(tmp_path: Path) -> None:
    """The digests before and after are equal, but not the file's inode."""
    (one,) = write_songs(tmp_path, [0.2])
    path, log_mel = tmp_path / one.audio, Replacing(SMALL)

    def copy_over() -> None:
        shutil.copy2(path, tmp_path / "copy")
        (tmp_path / "copy").replace(path)

    log_mel.act = copy_over
    with pytest.raises(ChangedFileError):
        decode_song(path, log_mel, 60.0)


@pytest.mark.parametrize(("is_staged", "times"), [(True, 1), (False, 2)])
def test_the_frames_of_an_mp3_are_scanned_once_and_a_staged_file_is_hashed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_staged: bool, times: int
) -> None:
    path = tmp_path / "2.mp3"
    soundfile.write(path, noise(16000), 16000, format="MP3")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    calls: list[str] = []

    def counted(place: str, real: Callable[..., Any]) -> None:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            calls.append(place)
            return real(*arguments, **named)

        monkeypatch.setattr(place, wrapped)

    counted("emotion.audio.mpeg._scan", mpeg._scan)
    counted("hashlib.file_digest", hashlib.file_digest)
    found = decode_song(path, LogMel(SMALL), 60.0, digest if is_staged else None)
    assert found.file_sha256 == digest
    assert sorted(calls) == ["emotion.audio.mpeg._scan", *["hashlib.file_digest"] * times]


def test_an_mp3_shorter_than_its_header_announces_gets_a_remark(tmp_path: Path) -> None:
    path = tmp_path / "2.mp3"
    soundfile.write(path, noise(5 * 16000), 16000, format="MP3")
    assert decode_song(path, LogMel(SMALL), 60.0).remark == ""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert re.fullmatch(r"its header announces 5\.0\d s, it lasts 2\.\d\d s", decode_song(path, LogMel(SMALL), 60.0).remark)


def test_the_order_is_that_of_the_songs_and_the_bytes_do_not_depend_on_threads(tmp_path: Path) -> None:
    songs = write_songs(tmp_path, [8, 0.1, 3, 0.01, 0.5, 0.2, 1, 0.1, 0.1])
    contents = []
    for threads in (1, 4):
        assert extract(songs, tmp_path, threads=threads, out=str(threads)) == []
        contents.append(files_of(tmp_path / str(threads)))
    assert contents[0] == contents[1]
    assert sorted(contents[0]) == [JOURNAL, "features.f16", "mel.json", "songs.csv", "tonality.f32"]
    assert not (tmp_path / "faults.csv").exists()

    features = Features(tmp_path / "4")
    of_whole = LogMel(SMALL)
    for index, song in enumerate(songs):
        row = features.songs[index]
        assert (row.song_id, row.valence, row.arousal, row.valence_sd, row.arousal_sd, row.group) == (
            song.song_id,
            song.valence,
            song.arousal,
            song.valence_sd,
            song.arousal_sd,
            song.group,
        )
        expected = of_whole(decode(tmp_path / song.audio, 8000))
        np.testing.assert_allclose(features.song(index), expected, atol=0.04)


def test_a_song_has_the_digests_of_its_file_and_of_its_samples(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).integers(-9000, 9000, 4000, np.int16)
    soundfile.write(tmp_path / "2.wav", samples, 8000)
    extract([song_of(2, "2.wav")], tmp_path)
    (row,) = Features(tmp_path / "out").songs
    assert row.file_sha256 == hashlib.sha256((tmp_path / "2.wav").read_bytes()).hexdigest()
    assert row.sound_sha256 == hashlib.sha256(samples.astype("<i2").tobytes()).hexdigest()


def write_unusable(root: Path) -> tuple[list[Song], list[Fault]]:
    """Songs 1 to 4 and 2001 have a second of sound; each of the others has another fault."""
    good = noise(8000)

    def sound(name: str, samples: Array, **how: Any) -> None:
        soundfile.write(root / name, samples, 8000, **how)

    for seed, name in enumerate(("1.wav", "2.flac", "3.ogg", "4.wav", "2001.wav"), 1):
        sound(name, noise(8000, seed=seed))
    faults = []

    def wrong(song_id: int, says: str, kind: str = "unfit audio", suffix: str = "wav") -> str:
        faults.append(Fault(kind, song_id, f"{song_id}.{suffix}", says))
        return f"{song_id}.{suffix}"

    sound(wrong(10, "lasts 0.50 s, expected at least data.shortest_seconds 0.6"), good[:4000])
    too_long = "lasts longer than 2 s. Shorten it, or raise data.longest_seconds."
    sound(wrong(11, too_long, "undecodable audio"), noise(16001))
    silent = "is silent, channels averaged: RMS {} dB, expected data.silence_db -60 or more"
    sound(wrong(12, silent.format("-100.0")), np.zeros((8000, 2), np.float32))
    sound(wrong(13, silent.format("-100.0")), np.hstack([good, -good]), subtype="FLOAT")
    sound(wrong(14, silent.format("-60.9")), np.tile(np.array([9e-4, -9e-4], np.float32), 4000), subtype="FLOAT")
    peak = np.where(np.arange(8000) == 99, np.float32(22), good[:, 0])
    sound(wrong(15, "has a peak of 22, expected at most data.largest_peak 4"), peak, subtype="FLOAT")
    sound(
        wrong(16, "infinite or NaN samples after 0.0 s. Replace the file.", "undecodable audio"), np.inf * good, subtype="FLOAT"
    )
    expected = f"cannot be decoded; expected {AUDIO_FORMATS}, found {{}} bytes that begin with {{}}. Replace the file."
    (root / wrong(17, expected.format(12, b"\0\1not audio\2"), "undecodable audio", "mp3")).write_bytes(b"\0\1not audio\2")
    (root / wrong(18, f"is empty; expected {AUDIO_FORMATS}. Replace the file.", "undecodable audio", "m4a")).write_bytes(b"")
    wrong(19, "no such audio file.", "undecodable audio")
    (root / "20.wav").write_bytes((root / "4.wav").read_bytes())
    wrong(20, "is the sound of song 4", "copied audio")
    content = (root / "4.wav").read_bytes()
    says = "is cut, or its header is wrong: it announces 16000 bytes of sound, the file has 8000. Replace the file."
    (root / wrong(21, says, "undecodable audio")).write_bytes(content[: 44 + 8000])
    says = (
        "its header announces 4000 bytes of sound, but 12000 bytes that are no metadata follow. The header is wrong, or the file "
        "was larger than its format allows. Write it again as flac, w64 or rf64."
    )
    (root / wrong(22, says, "undecodable audio")).write_bytes(content[:40] + (4000).to_bytes(4, "little") + content[44:])
    names = ["1.wav", "2.flac", "3.ogg", "4.wav", *(fault.place for fault in faults), "2001.wav"]
    return [song_of(int(Path(name).stem), name) for name in names], faults


LIMITS: dict[str, Any] = {"shortest_seconds": 0.6, "longest_seconds": 2.0}


def test_every_fault_of_audio_is_reported_once_with_its_song(tmp_path: Path) -> None:
    songs, faults = write_unusable(tmp_path)
    assert extract(songs, tmp_path, faults="drop", drop_at_most=0.9, **LIMITS) == faults
    assert [song.song_id for song in Features(tmp_path / "out").songs] == [1, 2, 3, 4, 2001]
    assert read_faults(tmp_path / "faults.csv") == faults


def test_an_excerpt_more_than_a_second_short_is_a_fault_and_a_full_song_is_not(tmp_path: Path) -> None:
    seconds = {1: 1.5, 2: 1.49, 2000: 1.49, 2001: 1.49, 3: 4.0}
    for song_id, length in seconds.items():
        soundfile.write(tmp_path / f"{song_id}.wav", noise(int(length * 8000), seed=song_id), 8000)
    songs = [song_of(song_id, f"{song_id}.wav") for song_id in seconds]
    assert extract(songs, tmp_path) == [], "not asked for"
    said = "is cut: lasts 1.49 s, expected an excerpt of data.excerpt_seconds 2.5"
    cut = [Fault("unfit audio", song_id, f"{song_id}.wav", said) for song_id in (2, 2000)]
    assert extract(songs, tmp_path, faults="drop", drop_at_most=0.5, excerpt_seconds=2.5) == cut
    assert [song.song_id for song in Features(tmp_path / "out").songs] == [1, 2001, 3]


def test_a_song_whose_id_is_text_is_checked_like_an_excerpt_and_named_by_it(tmp_path: Path) -> None:
    (tmp_path / "é").mkdir()
    for name, length in (("é/1.wav", 3.0), ("é/2.wav", 1.4)):
        soundfile.write(tmp_path / name, noise(int(length * 8000), seed=5), 8000)
    shutil.copyfile(tmp_path / "é/1.wav", tmp_path / "copy.wav")
    songs = [replace(song_of(1, name), song_id=name) for name in ("copy.wav", "é/1.wav", "é/2.wav")]
    said = "is cut: lasts 1.40 s, expected an excerpt of data.excerpt_seconds 2.5"
    assert extract(songs, tmp_path, faults="drop", drop_at_most=0.9, excerpt_seconds=2.5) == [
        Fault("copied audio", "é/1.wav", "1.wav", "is the sound of song copy.wav"),
        Fault("unfit audio", "é/2.wav", "2.wav", said),
    ]
    assert [song.song_id for song in Features(tmp_path / "out").songs] == ["copy.wav"]


def test_a_song_exactly_at_every_limit_is_used(tmp_path: Path) -> None:
    square = np.where(np.arange(8000) // 40 % 2, np.float32(0.25), np.float32(-0.25))
    soundfile.write(tmp_path / "2.wav", square, 8000, subtype="FLOAT")
    exact: dict[str, Any] = {
        "shortest_seconds": 1.0,
        "longest_seconds": 1.0,
        "largest_peak": 0.25,
        "silence_db": 20 * math.log10(0.25),
    }
    assert extract([song_of(2, "2.wav")], tmp_path, **exact) == []
    for name, value in (("shortest_seconds", 1.001), ("longest_seconds", 0.999), ("largest_peak", 0.249), ("silence_db", -12)):
        refusal([song_of(2, "2.wav")], tmp_path, **{**exact, name: value})


@pytest.mark.parametrize(("file_rate_hz", "suffix"), [(8000, "wav"), (44100, "flac"), (22050, "mp3"), (48000, "mp3")])
def test_a_constant_is_silent_and_a_song_around_one_is_not(file_rate_hz: int, suffix: str, tmp_path: Path) -> None:
    constant = np.full(2 * file_rate_hz, 0.5, np.float32)
    soundfile.write(tmp_path / "2.flac", constant, file_rate_hz, format="MP3" if suffix == "mp3" else None)
    soundfile.write(tmp_path / "3.wav", constant + 0.1 * noise(len(constant))[:, 0], file_rate_hz)
    songs = [song_of(2, "2.flac"), song_of(3, "3.wav")]
    says = "is silent, channels averaged: RMS -100.0 dB, expected data.silence_db -60 or more"
    assert extract(songs, tmp_path, faults="drop", drop_at_most=0.5) == [Fault("unfit audio", 2, "2.flac", says)]


def test_the_same_sound_in_several_files_is_used_once(tmp_path: Path) -> None:
    samples = np.random.default_rng(1).integers(-9000, 9000, (8000, 2), np.int16)
    soundfile.write(tmp_path / "2.wav", samples, 8000)
    soundfile.write(tmp_path / "3.flac", samples, 8000)
    size = (tmp_path / "2.wav").stat().st_size
    tagged = bytearray((tmp_path / "2.wav").read_bytes() + b"LIST" + (12).to_bytes(4, "little") + b"INFOINAM    ")
    tagged[4:8] = (size + 20 - 8).to_bytes(4, "little")
    (tmp_path / "4.wav").write_bytes(tagged)
    soundfile.write(tmp_path / "5.mp3", noise(16000), 16000, format="MP3")
    tag = b"ID3\x04\0\0" + bytes([0, 0, 1, 0]) + bytes(128)
    (tmp_path / "6.mp3").write_bytes(tag + (tmp_path / "5.mp3").read_bytes())
    soundfile.write(tmp_path / "7.wav", samples[:, ::-1], 8000)
    soundfile.write(tmp_path / "8.wav", samples[:-1], 8000)
    names = ["2.wav", "3.flac", "4.wav", "5.mp3", "6.mp3", "7.wav", "8.wav"]
    songs = [song_of(int(Path(name).stem), name) for name in names]
    twins = [(3, "3.flac", 2), (4, "4.wav", 2), (6, "6.mp3", 5), (7, "7.wav", 2)]
    expected = [Fault("copied audio", song, name, f"is the sound of song {first}") for song, name, first in twins]
    for threads in (1, 3):
        out = f"out{threads}"
        assert extract(songs, tmp_path, threads=threads, out=out, faults="drop", drop_at_most=1.0) == expected
        assert [song.song_id for song in Features(tmp_path / out).songs] == [2, 5, 8]


def test_copies_of_unusable_audio_are_reported_as_unusable_not_as_copies(tmp_path: Path) -> None:
    for song_id in (2, 3):
        soundfile.write(tmp_path / f"{song_id}.wav", np.zeros(8000, np.float32), 8000)
    said = refusal([song_of(2, "2.wav"), song_of(3, "3.wav")], tmp_path)
    assert said.count("is silent") == 2
    assert "copied" not in said


# Fail or leave out

LABEL_FAULTS = [
    Fault("label", 30, "labels.csv, line 3", "valence_mean is 'nan', expected 1 to 9"),
    Fault("label", None, "labels.csv, line 4", "song_id is 'x', expected a whole number"),
    Fault("audio without label", 31, "31.mp3", "no label file has a row with this id"),
]


def test_the_error_names_faults_of_labels_and_audio_together_and_the_folder_is_left_empty(tmp_path: Path) -> None:
    songs, faults = write_unusable(tmp_path)
    said = refusal(songs, tmp_path, LABEL_FAULTS, **LIMITS)
    head, *lines, advice = said.splitlines()
    assert head == f"data: 15 of 20 songs cannot be used as they are; 16 faults, all in {tmp_path / 'faults.csv'}"
    assert sorted(lines) == sorted(f"  {fault}" for fault in [*LABEL_FAULTS, *faults])
    assert "data.faults" in advice
    assert read_faults(tmp_path / "faults.csv") == [*LABEL_FAULTS, *faults]


def test_of_many_faults_of_a_kind_the_error_shows_ten_and_the_table_has_all(tmp_path: Path) -> None:
    songs = write_songs(tmp_path, [0.1] * 25)
    (tmp_path / songs[0].audio).unlink()
    for song in songs[2:24]:
        (tmp_path / song.audio).write_text("<html>")
    head, *named, more, _ = refusal(songs, tmp_path).splitlines()
    assert "23 of 25 songs" in head
    assert [line.split(",")[0] for line in named] == [
        f"  undecodable audio: song {song.song_id}" for song in [songs[0], *songs[2:11]]
    ]
    assert more == "  undecodable audio: 13 more"
    assert [fault.song_id for fault in read_faults(tmp_path / "faults.csv")] == [
        song.song_id for song in [songs[0], *songs[2:24]]
    ]


def test_with_songs_left_out_the_folder_is_that_of_the_other_songs_alone(tmp_path: Path) -> None:
    songs = write_songs(tmp_path, [0.1] * 9)
    good = [song for number, song in enumerate(songs) if number not in (0, 5)]
    extract(good, tmp_path, out="alone")
    for number in (0, 5):
        (tmp_path / songs[number].audio).write_text("<html>")
    faults = extract(songs, tmp_path, LABEL_FAULTS[:1], faults="drop", drop_at_most=0.3)
    assert [fault.song_id for fault in faults] == [30, songs[0].song_id, songs[5].song_id]
    assert read_faults(tmp_path / "faults.csv") == faults
    for name in ("features.f16", "songs.csv", "mel.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_leaving_out_too_many_songs_is_an_error_that_names_the_limit(tmp_path: Path) -> None:
    songs = write_songs(tmp_path, [0.1] * 9)
    for number in (0, 5):
        (tmp_path / songs[number].audio).write_text("<html>")
    said = refusal(songs, tmp_path, LABEL_FAULTS[:1], faults="drop", drop_at_most=0.29)
    assert "3 of 10 songs" in said
    assert "data.drop_at_most 0.29 allows 2 songs" in said
    assert len(read_faults(tmp_path / "faults.csv")) == 3
    assert "allows 0 songs" in refusal(songs, tmp_path, faults="drop", drop_at_most=0.0)


def test_a_dataset_without_faults_passes_even_if_no_song_may_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "faults.csv").write_text("of an earlier attempt")
    assert extract(write_songs(tmp_path, [0.1] * 3), tmp_path, faults="drop", drop_at_most=0.0) == []
    assert len(Features(tmp_path / "out").songs) == 3
    assert not (tmp_path / "faults.csv").exists()


def test_a_dataset_without_usable_songs_is_refused_even_if_all_may_be_left_out(tmp_path: Path) -> None:
    songs = write_songs(tmp_path, [0.1] * 3)
    for song in songs:
        (tmp_path / song.audio).write_bytes(b"")
    assert "no usable song is left" in refusal(songs, tmp_path, faults="drop", drop_at_most=1.0)
    assert "no usable song is left" in refusal([], tmp_path, LABEL_FAULTS, faults="drop", drop_at_most=1.0)
    assert "no usable song is left" in refusal([], tmp_path)
    assert "2 of 2 songs" in refusal([], tmp_path, LABEL_FAULTS)


# Resuming


@pytest.fixture
def mixed(tmp_path: Path) -> list[Song]:
    """Seven songs: number 1 is a web page, 3 a copy of 0, and 4 is shorter than its header announces."""
    songs = write_songs(tmp_path, [0.3, 0.1, 0.2, 0.1, 2.0, 0.1, 0.4])
    audio = tmp_path / "audio"
    (audio / "1.wav").write_text("<html>")
    shutil.copy(audio / "0.wav", audio / "3.wav")
    soundfile.write(audio / "4.wav", noise(32000, seed=4), 16000, format="MP3")
    (audio / "4.wav").write_bytes((audio / "4.wav").read_bytes()[:4000])
    return songs


DROP: dict[str, Any] = {"faults": "drop", "drop_at_most": 0.9}


def uninterrupted(songs: list[Song], root: Path, caplog: pytest.LogCaptureFixture) -> dict[str, Any]:
    faults = extract(songs, root, LABEL_FAULTS, out="uninterrupted", **DROP)
    assert [fault.song_id for fault in faults] == [30, None, 31, songs[1].song_id, songs[3].song_id]
    assert f"used as they are: {songs[4].song_id}" in caplog.text
    caplog.clear()
    return {"faults": faults, "table": (root / "faults.csv").read_bytes(), "files": files_of(root / "uninterrupted")}


def assert_resumes_to(
    expected: dict[str, Any], songs: list[Song], root: Path, known: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Resume without the audio of the first `known` songs."""
    (root / "faults.csv").unlink()
    for song in songs[:known]:
        (root / song.audio).unlink()
    faults = extract(songs, root, LABEL_FAULTS, **DROP)
    found = {"faults": faults, "table": (root / "faults.csv").read_bytes(), "files": files_of(root / "out")}
    assert found == expected
    assert f"used as they are: {songs[4].song_id}" in caplog.text


@pytest.mark.parametrize("asked", [1, 4, 7, *(pytest.param(n, marks=pytest.mark.full) for n in (2, 3, 5, 6))])
def test_killed_after_any_song_the_phase_resumes_behind_it_to_the_same_bytes(
    tmp_path: Path, mixed: list[Song], asked: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = uninterrupted(mixed, tmp_path, caplog)
    monkeypatch.setattr("emotion.audio.feature_store.DURABLE_SECONDS", 0.0)
    should_stop = partial(die_at, asked, count(1))
    assert exit_code_of(partial(extract, mixed, tmp_path, LABEL_FAULTS, should_stop=should_stop, **DROP)) == -signal.SIGKILL
    assert_resumes_to(expected, mixed, tmp_path, asked - 1, caplog)


@pytest.mark.parametrize("asked", [1, 2, 3, 5, 7])
def test_asked_to_stop_the_phase_resumes_behind_the_last_song_to_the_same_bytes(
    tmp_path: Path, mixed: list[Song], asked: int, caplog: pytest.LogCaptureFixture
) -> None:
    expected = uninterrupted(mixed, tmp_path, caplog)
    answers = iter([False] * (asked - 1) + [True])
    with pytest.raises(Interrupted, match=f"after {asked - 1} of 7"):
        extract(mixed, tmp_path, LABEL_FAULTS, should_stop=lambda: next(answers), **DROP)
    with pytest.raises(Interrupted, match=f"after {asked - 1} of 7"):
        extract(mixed, tmp_path, LABEL_FAULTS, should_stop=lambda: True, **DROP)
    assert_resumes_to(expected, mixed, tmp_path, asked - 1, caplog)


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.full)])
def test_killed_before_any_fsync_rename_or_removal_the_phase_resumes_to_the_same_bytes(
    tmp_path: Path, mixed: list[Song], every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    songs = mixed[:3]
    attempt = partial(extract, songs, tmp_path, **DROP)
    attempt(out="uninterrupted")
    expected = files_of(tmp_path / "uninterrupted")
    monkeypatch.setattr("emotion.audio.feature_store.DURABLE_SECONDS", 0.0)

    def killed_before(change: int) -> None:
        changes = count(1)

        def counted(real: Callable[..., object]) -> Callable[..., object]:
            def wrapped(*arguments: Any, **named: Any) -> object:
                die_at(change, changes)
                return real(*arguments, **named)

            return wrapped

        for name in ("fsync", "replace", "unlink"):
            setattr(os, name, counted(getattr(os, name)))
        attempt()

    for change in count(1, every):
        exit_code = exit_code_of(partial(killed_before, change))
        if exit_code == 0:
            break
        assert exit_code == -signal.SIGKILL
        attempt()
        assert files_of(tmp_path / "out") == expected
        shutil.rmtree(tmp_path / "out")
    assert change > 20


def test_killed_again_and_again_the_phase_finishes(
    tmp_path: Path, mixed: list[Song], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = uninterrupted(mixed, tmp_path, caplog)
    monkeypatch.setattr("emotion.audio.feature_store.DURABLE_SECONDS", 0.0)
    for _ in range(7):
        should_stop = partial(die_at, 2, count(1))
        exit_code = exit_code_of(partial(extract, mixed, tmp_path, LABEL_FAULTS, should_stop=should_stop, **DROP))
    assert exit_code == 0
    assert_resumes_to(expected, mixed, tmp_path, 7, caplog)


def test_a_full_disk_is_an_error_and_the_phase_resumes_from_what_was_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    songs = write_songs(tmp_path, [0.6] * 5)
    extract(songs, tmp_path, out="uninterrupted")
    monkeypatch.setattr("emotion.audio.feature_store.DURABLE_SECONDS", 0.0)

    def without_room(bytes_of_a_file: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_of_a_file, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match="too large"):
            extract(songs, tmp_path)

    # A song has 38 frames of 32 bytes: so many songs fit, and a part of the next.
    for known in (0, 1, 2, 3):
        assert exit_code_of(partial(without_room, 38 * 32 * known + 500)) == 0
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [PARTIAL, JOURNAL]
        with pytest.raises(Interrupted, match=f"after {known} of 5"):
            extract(songs, tmp_path, should_stop=lambda: True)
    extract(songs, tmp_path)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "uninterrupted")


def test_features_of_other_songs_or_limits_are_not_used(tmp_path: Path) -> None:
    songs = write_songs(tmp_path, [0.1, 0.2, 0.3])
    extract(songs, tmp_path)
    relabelled = [song_of(song.song_id + 1, song.audio) for song in songs]
    extract(relabelled, tmp_path)
    assert [song.song_id for song in Features(tmp_path / "out").songs] == [101, 100, 99]
    assert "lasts 0.10 s" in refusal(relabelled, tmp_path, shortest_seconds=0.15)


def test_away_from_a_terminal_progress_is_a_log_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO):
        extract(write_songs(tmp_path, [0.1, 0.1]), tmp_path)
    assert "phase=features songs=2/2" in caplog.messages
    assert capsys.readouterr().err == ""
