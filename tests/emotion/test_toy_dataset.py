"""The toy dataset: reproducible, in DEAM's layout, and with sound that follows the labels."""

import csv
import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import librosa
import numpy as np
import numpy.typing as npt
import pytest
import soundfile

from emotion.data.deam import dataset_files, find_dataset, join_labels
from emotion.data.label_tables import Label
from emotion.data.songs import Song
from emotion.data.toy_dataset import generate_dataset
from emotion.errors import Interrupted

AUDIO = "DEAM_audio/MEMD_audio"
LABELS = "DEAM_Annotations/annotations/annotations averaged per song/song_level"
SONGS = 36


def never() -> bool:
    return False


def after(songs: int) -> Callable[[], bool]:
    asked = itertools.count()
    return lambda: next(asked) >= songs


def labels_of(root: Path) -> list[Label]:
    return join_labels(root, dataset_files(root))[0]


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("generated")
    generate_dataset(root, SONGS, 0, never)
    return root


@pytest.fixture(scope="module")
def three_songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("three")
    generate_dataset(root, 3, 0, never)
    return root


@pytest.fixture(scope="module")
def songs(generated: Path) -> list[Song]:
    return find_dataset(generated).songs


@pytest.fixture(scope="module")
def sounds(generated: Path, songs: list[Song]) -> list[npt.NDArray[np.float32]]:
    return [soundfile.read(generated / song.audio, dtype="float32")[0] for song in songs]


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> list[Label]:
    """The labels of 1,200 songs. An empty audio file exists for every id, so no sound is generated."""
    root = tmp_path_factory.mktemp("labels")
    (root / AUDIO).mkdir(parents=True)
    for song_id in range(1, 2059):
        (root / AUDIO / f"{song_id}.mp3").touch()
    generate_dataset(root, 1200, 0, never)
    return labels_of(root)


def correlation_with_arousal(songs: list[Song], measured: list[float]) -> float:
    return float(np.corrcoef([song.arousal for song in songs], measured)[0, 1])


def test_a_song_depends_on_the_seed_and_not_on_the_number_of_songs(generated: Path, three_songs: Path) -> None:
    again, first = contents(three_songs / AUDIO), contents(generated / AUDIO)
    assert len(again) == 3
    assert again.items() <= first.items()
    assert set(labels_of(three_songs)) <= set(labels_of(generated))


def test_another_seed_gives_other_sound_and_other_labels(generated: Path, tmp_path: Path) -> None:
    generate_dataset(tmp_path, 2, 1, never)
    other, first = contents(tmp_path / AUDIO), contents(generated / AUDIO)
    assert len(other) == 2
    assert not other.items() & first.items()
    assert not set(labels_of(tmp_path)) & set(labels_of(generated))


@pytest.mark.parametrize("stop_at", [0, 2])
def test_a_stopped_generation_resumes_to_the_same_bytes(three_songs: Path, tmp_path: Path, stop_at: int) -> None:
    with pytest.raises(Interrupted):
        generate_dataset(tmp_path, 3, 0, after(stop_at))
    assert len(contents(tmp_path)) == stop_at, "a table came before the last song, or a song is missing"
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / AUDIO).iterdir()}
    generate_dataset(tmp_path, 3, 0, never)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items()), "a finished song was generated again"
    assert contents(tmp_path) == contents(three_songs)


def test_every_song_has_audio_a_label_and_an_artist_with_several_songs(songs: list[Song]) -> None:
    assert len(songs) == SONGS
    assert all(-1 <= song.valence <= 1 and -1 <= song.arousal <= 1 for song in songs)
    assert not any(song.group.startswith("song:") for song in songs), "a song without an artist"
    sizes = Counter(song.group for song in songs).values()
    assert 2.5 <= len(songs) / len(sizes) <= 3.5


def test_an_artist_is_the_same_in_the_tables_of_all_years(songs: list[Song]) -> None:
    def artists(first: int, last: int) -> set[str]:
        return {song.group for song in songs if first <= song.song_id <= last}

    assert artists(1, 1000) & artists(1001, 2000)
    assert artists(2001, 2058) <= artists(1, 2000)


def test_one_song_in_24_is_a_full_one_and_longer(songs: list[Song], sounds: list[npt.NDArray[np.float32]]) -> None:
    seconds = {song.song_id: len(sound) / 22050 for song, sound in zip(songs, sounds, strict=True)}
    assert [song_id for song_id in seconds if song_id > 2000] == [2001, 2002]
    assert all(length == pytest.approx(20 if song_id > 2000 else 10, abs=0.1) for song_id, length in seconds.items())


def test_fewer_than_twelve_songs_have_no_full_one_and_are_readable(tmp_path: Path) -> None:
    generate_dataset(tmp_path, 1, 0, never)
    assert [song.song_id for song in find_dataset(tmp_path).songs] == [2]


def test_sound_is_finite_and_never_clips(sounds: list[npt.NDArray[np.float32]]) -> None:
    assert all(np.isfinite(sound).all() for sound in sounds)
    peaks = [float(np.abs(sound).max()) for sound in sounds]
    assert 0.005 < min(peaks) < max(peaks) < 0.95
    assert max(peaks) > 3 * min(peaks), "all peaks alike: the loudness that carries arousal was normalised away"


def test_louder_songs_have_higher_arousal(songs: list[Song], sounds: list[npt.NDArray[np.float32]]) -> None:
    decibels = [10 * float(np.log10(np.mean(np.square(sound)))) for sound in sounds]
    assert correlation_with_arousal(songs, decibels) > 0.3


@pytest.mark.full
def test_songs_with_more_onsets_a_second_have_higher_arousal(songs: list[Song], sounds: list[npt.NDArray[np.float32]]) -> None:
    some = sounds[::2]
    rates = [len(librosa.onset.onset_detect(y=sound, sr=22050)) / len(sound) for sound in some]
    assert correlation_with_arousal(songs[::2], rates) > 0.3


def test_a_chorus_is_louder_than_its_verse(generated: Path) -> None:
    sound, rate = soundfile.read(generated / AUDIO / "2001.mp3")
    verse, chorus, verse_again, chorus_again = (np.std(sound[k * 5 * rate : (k + 1) * 5 * rate]) for k in range(4))
    assert min(chorus, chorus_again) > 1.2 * max(verse, verse_again)


def test_labels_are_distributed_like_deams(labels: list[Label]) -> None:
    means = np.array([(label.valence, label.arousal) for label in labels])
    assert means.mean(axis=0) == pytest.approx([4.90, 4.81], abs=0.15)
    assert means.std(axis=0) == pytest.approx([1.17, 1.28], abs=0.1)
    assert np.corrcoef(means.T)[0, 1] == pytest.approx(0.57, abs=0.08)
    deviations = np.array([(label.valence_sd, label.arousal_sd) for label in labels])
    assert deviations.mean(axis=0) == pytest.approx([1.5, 1.46], abs=0.25)


def test_ids_of_the_largest_dataset_are_deams_with_gaps(labels: list[Label]) -> None:
    ids = [label.song_id for label in labels]
    assert len(set(ids)) == 1200
    excerpts = [song_id for song_id in ids if song_id <= 2000]
    assert (excerpts[0], ids[len(excerpts)], ids[-1]) == (2, 2001, 2050)
    assert excerpts[-1] - excerpts[0] + 1 > len(excerpts)


def test_tables_have_deams_spellings(generated: Path) -> None:
    excerpts = (generated / LABELS / "static_annotations_averaged_songs_1_2000.csv").read_text(encoding="utf-8")
    full = (generated / LABELS / "static_annotations_averaged_songs_2000_2058.csv").read_text(encoding="utf-8")
    assert excerpts.splitlines()[0] == "song_id, valence_mean, valence_std, arousal_mean, arousal_std"
    assert len(full.splitlines()[0].split(",")) == len(full.splitlines()[1].split(",")) == 13
    assert ", valence_ max_mean, " in full

    def row(year: int, song_id: int) -> list[str]:
        with (generated / "metadata" / f"metadata_{year}.csv").open(encoding="utf-8", newline="") as file:
            return next(row for row in csv.reader(file) if row[0] == str(song_id))

    assert row(2013, 2) == ["2", "\t2.mp3", "The Amber Anchors\t", "\tStudy No. 2\t", "\tBlues\t"]
    assert row(2014, 1001)[:6] == ["1001", "The Amber Anchors", "Studies", "Study No. 1001", "Blues", "made"]
    assert row(2015, 2001)[3] == "n/a"


def test_a_full_songs_label_lies_between_its_lowest_and_its_highest_section(generated: Path) -> None:
    path = generated / LABELS / "static_annotations_averaged_songs_2000_2058.csv"
    with path.open(encoding="utf-8", newline="") as file:
        for song in csv.DictReader(file, skipinitialspace=True):
            assert float(song["valence_min_mean"]) <= float(song["valence_mean"]) <= float(song["valence_ max_mean"])
            assert float(song["arousal_min_mean"]) < float(song["arousal_mean"]) < float(song["arousal_max_mean"])
