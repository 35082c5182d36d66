"""Nothing is tested on a song that it was made from, whatever the song's id, file name or format."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from emotion.audio.extract import extract_features
from emotion.audio.feature_store import Features, SongFeatures
from emotion.audio.song_workers import Workers
from emotion.config import DataConfig, MelConfig
from emotion.data.leaks import SEEN, identities, read_seen, refuse_leak, write_seen
from emotion.data.songs import Dataset, Song
from emotion.errors import DataError, ModelError

SMALL = MelConfig(sample_rate_hz=8000, window_samples=256, hop_samples=128, mels=16, fmax_hz=4000.0)


def song(song_id: int, file: str | None = None, sound: str | None = None) -> SongFeatures:
    return SongFeatures(song_id, 0, 10, 0.0, 0.0, 0.1, 0.1, "a", file or f"file {song_id}", sound or f"sound {song_id}")


def test_a_song_is_known_by_its_file_and_by_its_sound() -> None:
    assert identities([song(2), song(3, sound="sound 2")]) == {"file 2", "sound 2", "file 3"}
    assert identities([]) == set()


@pytest.mark.parametrize(("file", "sound"), [("", "sound 5"), ("file 5", ""), ("", "")])
def test_a_synthetic_clip_is_refused_as_a_song(file: str, sound: str) -> None:
    clip = replace(song(5), group="synthetic:5", file_sha256=file, sound_sha256=sound)
    with pytest.raises(ModelError, match=r"leak: clip 5 \(synthetic:5\) is no song"):
        identities([song(2), clip])
    with pytest.raises(ModelError, match="clip 5"):
        refuse_leak("the model", set(), [clip])


@pytest.mark.parametrize(
    "same", [song(2), song(77, file="file 2"), song(77, sound="sound 2"), song(77, file="file 2", sound="sound 2")]
)
def test_a_song_that_was_seen_is_refused_under_any_id(same: SongFeatures) -> None:
    seen = identities([song(1), song(2), song(3)])
    with pytest.raises(ModelError) as caught:
        refuse_leak("the model", seen, [song(8), same, song(9)])
    assert f"leak: the model has seen held-out songs, under these or other ids: {same.song_id}." in str(caught.value)


def test_all_leaked_songs_are_counted() -> None:
    songs = [song(song_id) for song_id in range(100, 123)]
    with pytest.raises(ModelError, match=r"ids: 100, 101, .*, 119 and 3 more\."):
        refuse_leak("the model", identities(songs), songs)


def test_another_song_with_the_same_id_is_no_leak() -> None:
    refuse_leak("the model", identities([song(2)]), [song(2, file="another", sound="another sound"), song(3)])
    refuse_leak("the model", set(), [song(2)])
    refuse_leak("the model", identities([song(2)]), [])


def test_digests_are_read_as_written_and_written_in_one_order(tmp_path: Path) -> None:
    digests = [hashlib.sha256(bytes([number])).hexdigest() for number in range(40)]
    for name, order in (("forth", digests), ("back", digests[::-1])):
        (tmp_path / name).mkdir()
        write_seen(tmp_path / name, set(order))
        assert read_seen(tmp_path / name) == set(digests)
    assert (tmp_path / "forth" / SEEN).read_bytes() == (tmp_path / "back" / SEEN).read_bytes()
    assert (tmp_path / "forth" / SEEN).read_text().splitlines() == sorted(digests)


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_folder_without_a_list_of_seen_songs_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / SEEN).write_bytes(content)
    with pytest.raises(DataError, match=r"seen_songs\.txt: expected the digests of the songs"):
        read_seen(tmp_path)


def test_a_recording_under_another_id_name_and_format_is_the_same_song(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(-9000, 9000, (2, 8000), np.int16)
    soundfile.write(tmp_path / "2.wav", noise[0], 8000)
    soundfile.write(tmp_path / "900.flac", noise[0], 8000)
    soundfile.write(tmp_path / "901.flac", noise[1], 8000)
    config = DataConfig(source="made", shortest_seconds=0.5)
    songs = {}
    for name in ("2.wav", "900.flac", "901.flac"):
        made = Song(int(Path(name).stem), 0.0, 0.0, 0.1, 0.1, "a", name)
        out = tmp_path / Path(name).stem
        dataset, table = Dataset(tmp_path, [made], []), tmp_path / "faults.csv"
        extract_features(dataset, config, SMALL, out=out, faults_table=table, workers=Workers(1), should_stop=lambda: False)
        songs[name] = Features(out).songs
    seen = identities(songs["2.wav"])
    assert len(seen) == 2
    with pytest.raises(ModelError, match=r"ids: 900\."):
        refuse_leak("the model", seen, songs["900.flac"])
    refuse_leak("the model", seen, songs["901.flac"])
