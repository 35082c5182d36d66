import io
from pathlib import Path

import numpy as np
import pytest
import soundfile

from emotion.data.songs import Song, write_songs
from job.results.report_facts import EXCERPT_SECONDS, excerpt_of, report_facts
from job.spec.load import load_spec
from tests.conftest import TINY
from tests.manifests import MINIMAL, manifest_with

RATE = 22050


def song_of(number: int) -> Song:
    return Song(number, 0.0, 0.0, None, None, "", f"audio/{number}.wav")


def write_song(path: Path, seconds: int) -> None:
    """A song whose pitch is 100 Hz times the number of the second, from 1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    times = np.arange(seconds * RATE) / RATE
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * 100 * (1 + times.astype(int)) * times), RATE)


@pytest.mark.parametrize(("seconds", "first", "last"), [(40, 16, 23), (12, 5, 12), (3, 1, 3)])
def test_an_excerpt_is_a_few_seconds_of_the_right_song_as_a_small_mp3(
    tmp_path: Path, seconds: int, first: int, last: int
) -> None:
    for name, length in ((77, 5), (7, seconds)):
        write_song(tmp_path / "audio" / f"{name}.wav", length)
    write_songs(tmp_path / "songs.csv", [song_of(77), song_of(7)])
    content = excerpt_of(tmp_path, 7)
    assert content is not None
    assert len(content) < 80_000
    sound, rate = soundfile.read(io.BytesIO(content))
    assert len(sound) / rate == pytest.approx(min(seconds, EXCERPT_SECONDS), abs=0.1)

    def pitch(second: slice) -> float:
        return float(np.abs(np.fft.rfft(sound[second])).argmax() * rate / len(sound[second]))

    # The encoder puts less than a tenth of a second of silence before the sound.
    assert pitch(slice(rate // 4, rate * 3 // 4)) == pytest.approx(100 * first, abs=5)
    assert pitch(slice(-rate * 3 // 4, -rate // 4)) == pytest.approx(100 * last, abs=5)


def test_songs_that_are_gone_or_damaged_have_no_excerpt(tmp_path: Path) -> None:
    assert excerpt_of(tmp_path, 7) is None  # scratch is lost
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / "8.wav").write_bytes(b"no sound")
    write_songs(tmp_path / "songs.csv", [song_of(7), song_of(8)])
    assert [excerpt_of(tmp_path, song) for song in (7, 8, "9.wav")] == [None] * 3


def test_only_generated_songs_are_heard_unless_the_spec_says_that_others_may_be(tmp_path: Path) -> None:
    write_song(tmp_path / "audio" / "7.wav", 5)
    write_songs(tmp_path / "songs.csv", [song_of(7)])
    phases = {name: {**MINIMAL_PHASE, "measured": {"device": {"kind": "cpu"}}} for name in ("gan", "vit")}
    manifest = manifest_with(spec={"data": {"source": "x"}}, phases=phases)
    for overrides, heard in (
        ([], True),
        ([f"data.source={tmp_path}"], False),
        ([f"data.source={tmp_path}", "artifacts.excerpts=true"], True),
    ):
        found = report_facts(manifest, load_spec(TINY, overrides), tmp_path).excerpt(7)
        assert (found is not None) == heard
    facts = report_facts(manifest, load_spec(TINY), tmp_path)
    assert dict(facts.provenance)["device of gan"] == "cpu"
    assert dict(facts.provenance)["run"] == MINIMAL["name"]


MINIMAL_PHASE = {"key": "k", "inputs": {}, "notes": {}, "outputs_sha256": "0"}
