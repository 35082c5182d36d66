"""Benchmarks that no other test runs end to end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from emotion.audio.decoding import decode_blocks
from emotion.audio.mpeg import scan_mpeg
from emotion.data.deam import find_dataset
from tests.bench.deam_sized import make_dataset

ROOT = Path(__file__).parents[1]


@pytest.mark.full
def test_the_dataset_of_deams_size_has_whole_songs_of_its_format_that_all_differ(tmp_path: Path) -> None:
    make_dataset(tmp_path, excerpts=3, full=1)
    songs = find_dataset(tmp_path).songs
    assert [song.song_id for song in songs] == [2, 3, 4, 2001]
    contents = set()
    for song, seconds in zip(songs, (45, 45, 45, 234), strict=True):
        path = tmp_path / song.audio
        info = soundfile.info(path)
        assert (info.samplerate, info.channels) == (44100, 2)
        scan = scan_mpeg(path)
        assert scan is not None
        assert scan.frames_seconds == pytest.approx(seconds, abs=0.4)
        assert path.stat().st_size == pytest.approx(scan.frames_seconds * 128_000 / 8, rel=0.001)
        assert sum(map(len, decode_blocks(path, 22050))) / 22050 == pytest.approx(scan.frames_seconds, abs=0.2)
        contents.add(path.read_bytes())
    assert len(contents) == len(songs)


@pytest.mark.full
def test_the_benchmark_for_a_gpu_runs_end_to_end_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.bench.gpu", "--device", "cpu", "--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row[3] for row in found["goals"]] == ["toy size"] * len(found["goals"]), done.stderr
    assert f"| {found['goals'][0][0]} |" in done.stdout
