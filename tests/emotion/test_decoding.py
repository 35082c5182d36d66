"""Decoding against librosa, and against files that lie about their content."""

import csv
import math
import os
import struct
import tracemalloc
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import numpy.typing as npt
import pytest
import soundfile

from emotion.audio.decoding import READ_SAMPLES, decode_blocks
from emotion.audio.mel import LogMel
from emotion.errors import DataError
from tests.emotion.sounds import MEL, RATE_HZ, Array, decode, noise, tone


@pytest.fixture(scope="module")
def log_mel() -> LogMel:
    return LogMel(MEL)


@pytest.mark.full
@pytest.mark.parametrize(("file_rate_hz", "channels"), [(44100, 2), (48000, 1), (22050, 2), (32000, 3), (11025, 1)])
def test_decoding_in_blocks_is_bit_equal_to_librosa(tmp_path: Path, file_rate_hz: int, channels: int) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, noise(200_001, channels), file_rate_hz, subtype="FLOAT")
    expected, _ = librosa.load(path, sr=RATE_HZ)
    found = decode(path, RATE_HZ)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
    assert len(found) == math.ceil(200_001 * RATE_HZ / file_rate_hz)
    assert len(list(decode_blocks(path, RATE_HZ))) > 1, "longer than a block"


@pytest.mark.full
@pytest.mark.parametrize(("file_rate_hz", "channels"), [(44100, 2), (44100, 1), (24000, 2), (16000, 1)])
def test_an_mp3_decodes_bit_equal_to_librosa(tmp_path: Path, file_rate_hz: int, channels: int) -> None:
    path = tmp_path / "a.mp3"
    soundfile.write(path, noise(4 * file_rate_hz, channels), file_rate_hz, format="MP3")
    expected, _ = librosa.load(path, sr=RATE_HZ)
    np.testing.assert_array_equal(decode(path, RATE_HZ), expected)


def test_channels_are_averaged(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, np.array([[0.5, -0.25], [1.0, 0.0]]), RATE_HZ, subtype="FLOAT")
    np.testing.assert_array_equal(decode(path, RATE_HZ), np.array([0.125, 0.5], np.float32))


def test_an_mp3_without_its_length_is_decoded_to_its_end(tmp_path: Path) -> None:
    """Variable bit rate, loud in the first half and nearly silent in the second: estimated from its beginning it is far too
    short. libsndfile stops there."""
    sound = np.concatenate([noise(6 * 44100, 2), 1e-3 * noise(6 * 44100, 2, seed=1)])
    path = tmp_path / "a.mp3"
    soundfile.write(path, sound, 44100, format="MP3", bitrate_mode="VARIABLE", compression_level=0.5)
    whole = path.read_bytes()
    assert whole.count(b"Xing") == 1
    path.write_bytes(whole.replace(b"Xing", bytes(4)))
    assert soundfile.info(path).duration < 11, "the premise"
    assert 12 <= len(decode(path, 44100)) / 44100 < 12.2


def test_a_cut_mp3_gives_the_samples_that_are_there(tmp_path: Path) -> None:
    path = tmp_path / "a.mp3"
    soundfile.write(path, noise(5 * 44100, 2), 44100, format="MP3")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert soundfile.info(path).duration == pytest.approx(5, abs=0.1), "its header still has the whole length"
    assert len(decode(path, RATE_HZ)) / RATE_HZ == pytest.approx(2.5, abs=0.1)


def test_the_format_is_found_by_content_not_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.mp3"
    soundfile.write(path, tone(440, 0.5), RATE_HZ, format="WAV", subtype="FLOAT")
    np.testing.assert_array_equal(decode(path, RATE_HZ), tone(440, 0.5))


def wav_of(content: Array, rate_hz: int = RATE_HZ) -> Callable[[Path], None]:
    return lambda path: soundfile.write(path, content, rate_hz, format="WAV", subtype="FLOAT")


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path: None, "no such audio file"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_text("<!DOCTYPE html><p>404"), "found a web page"),
        (wav_of(np.zeros(0, np.float32)), "no samples"),
        (wav_of(np.array([0.1, np.nan], np.float32)), "NaN"),
        (wav_of(np.array([0.1, np.inf], np.float32), 44100), "infinite"),
        (wav_of(np.zeros(10, np.float32), 1), "1 Hz"),
    ],
)
def test_a_file_without_usable_sound_is_refused_with_its_path(tmp_path: Path, write: Callable[[Path], None], said: str) -> None:
    path = tmp_path / "732.mp3"
    write(path)
    with pytest.raises(DataError) as error:
        decode(path, RATE_HZ)
    assert str(path) in str(error.value)
    assert said in str(error.value)


def test_a_long_song_is_never_in_memory_as_a_whole(tmp_path: Path, log_mel: LogMel) -> None:
    path = tmp_path / "long.wav"
    seconds = 150
    with wave.open(str(path), "wb") as file:
        file.setparams((2, 2, 44100, 0, "NONE", ""))
        file.writeframes(bytes(4 * 44100 * seconds))
    tracemalloc.start()
    try:
        found = log_mel.of_blocks(decode_blocks(path, RATE_HZ))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.shape == (MEL.frames(seconds), MEL.mels)
    as_a_whole = 4 * RATE_HZ * seconds
    assert peak - 2 * found.nbytes < 0.2 * as_a_whole, "the result and its parts, and little else"


def sparse_wav(path: Path, seconds: int, channels: int = 1) -> None:
    """16-bit silence at 8 kHz, as a sparse file."""
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, 2, 8000, 0, "NONE", ""))
        file.writeframes(b"")
    header = bytearray(path.read_bytes())
    size = 2 * channels * 8000 * seconds
    header[4:8], header[40:44] = (36 + size).to_bytes(4, "little"), size.to_bytes(4, "little")
    path.write_bytes(header)
    os.truncate(path, 44 + size)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers (samples times channels) that each read from a sound has given."""
    numbers: list[int] = []
    read = soundfile.SoundFile.read

    def counted(self: soundfile.SoundFile, *arguments: Any, **named: Any) -> npt.NDArray[Any]:
        block: npt.NDArray[Any] = read(self, *arguments, **named)
        numbers.append(block.size)
        return block

    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    return numbers


@pytest.mark.parametrize("rate_hz", [8000, RATE_HZ])
@pytest.mark.parametrize("channels", [1, 2])
def test_of_a_song_that_is_too_long_at_most_one_block_too_much_is_decoded(
    tmp_path: Path, decoded: list[int], rate_hz: int, channels: int
) -> None:
    sparse_wav(tmp_path / "2.wav", 3600, channels)
    given: list[int] = []
    with pytest.raises(DataError) as caught:
        given.extend(len(block) for block in decode_blocks(tmp_path / "2.wav", rate_hz, longest_seconds=30))
    assert str(caught.value).endswith("2.wav: lasts longer than 30 s")
    assert sum(given) <= 30 * rate_hz
    assert 30 * 8000 * channels < sum(decoded) <= 30 * 8000 * channels + READ_SAMPLES


def test_a_song_may_be_exactly_as_long_as_allowed(tmp_path: Path) -> None:
    for samples in (16000, 16001):
        soundfile.write(tmp_path / f"{samples}.wav", noise(samples), 8000)
    assert sum(map(len, decode_blocks(tmp_path / "16000.wav", 8000, longest_seconds=2))) == 16000
    with pytest.raises(DataError, match=r"16001\.wav: lasts longer than 2 s"):
        list(decode_blocks(tmp_path / "16001.wav", 8000, longest_seconds=2))


def test_a_file_that_would_fill_the_memory_is_refused_whatever_the_limit_in_seconds(
    tmp_path: Path, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse_wav(tmp_path / "2.wav", 600, channels=8)
    most_bytes = 1 << 22
    monkeypatch.setattr("emotion.audio.decoding.MOST_DECODED_BYTES", most_bytes)
    with pytest.raises(DataError, match=r"2\.wav: decodes to more than"):
        decode(tmp_path / "2.wav", RATE_HZ)
    assert most_bytes < 4 * sum(decoded) <= most_bytes + 4 * READ_SAMPLES


def test_a_header_of_hours_with_one_second_of_samples_takes_no_memory(tmp_path: Path) -> None:
    sparse_wav(tmp_path / "2.wav", 36000)
    os.truncate(tmp_path / "2.wav", 44 + 2 * 8000)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"2\.wav: is cut, .* announces 576000000 bytes of sound, the file has 16000\."):
            decode(tmp_path / "2.wav", 8000)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_odd_mp3s_decode_to_their_length_or_are_refused(real_data: Path) -> None:
    with (real_data / "odd_mp3" / "expected.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    wrong = []
    for row in rows:
        found, said = np.zeros(0, np.float32), ""
        try:
            found = decode(real_data / "odd_mp3" / row["file"], RATE_HZ)
        except DataError as error:
            said = str(error)
        is_right = {
            "decode": len(found) > 0 and abs(len(found) / RATE_HZ - float(row["seconds"] or 0)) <= 0.06,
            "refuse": row["file"] in said,
            "either": len(found) > 0 or row["file"] in said,
        }
        if not is_right[row["should"]] or not np.isfinite(found).all():
            wrong.append(f"{row['file']}: {row['should']} {row['seconds']} s; found {len(found) / RATE_HZ:.3f} s {said}")
    assert len(rows) == 45
    assert wrong == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
            "found a git-lfs pointer and not the file itself",
        ),
        (b"/annex/objects/MD5E-s9--00.mp3\n", "found a git-annex pointer and not the file itself; run `git annex get`"),
        (b"<!DOCTYPE html><title>404</title>", "found a web page"),
        (bytes(9000), "found nothing but zero bytes"),
    ],
)
def test_what_lies_in_the_place_of_a_song_is_called_what_it_is(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "1.wav"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(decode_blocks(path, 8000))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"OggS\0\2" + bytes(20) + b"\1\x33\x7fFLAC\1\0" + bytes(60), "flac inside ogg, .* convert it to plain flac"),
        (b"OggS\0\2" + bytes(20) + b"\1\x40Speex   1.2" + bytes(60), "Speex inside ogg"),
        (b"\x1aE\xdf\xa3\x9fB\x86\x81\1" + bytes(60), "webm or Matroska"),
        (b"\0\0\0\x1cftypM4A " + bytes(60), "mp4 or m4a"),
        (b"\xff\xf1l@F\x7f\xfc" + bytes(60), "found aac"),
        (b"fLaC\0\0\0\x22" + bytes(20), "begins as flac, but is cut or damaged"),
    ],
)
def test_a_format_without_a_decoder_is_called_by_its_name(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "1.ogg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=said):
        decode(path, RATE_HZ)


def mp3_in_wav(mp3: bytes, rate_hz: int, samples: int) -> bytes:
    """As Windows and ffmpeg write it: frames of mp3 as the data of a wav, whose chunk `fact` has the number of samples."""
    form = struct.pack("<HHIIHHHHIHHH", 0x55, 1, rate_hz, 8000, 1, 0, 12, 1, 2, 576, 1, 1393)
    chunks = [(b"fmt ", form), (b"fact", struct.pack("<I", samples)), (b"data", mp3 + bytes(len(mp3) % 2))]
    body = b"WAVE" + b"".join(name + struct.pack("<I", len(content)) + content for name, content in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def test_mp3_inside_a_wav_is_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.mp3", tone(440, 0.3, 2.0), RATE_HZ, format="MP3")
    path = tmp_path / "a.wav"
    path.write_bytes(mp3_in_wav((tmp_path / "a.mp3").read_bytes(), RATE_HZ, 2 * RATE_HZ))
    assert soundfile.info(path).subtype == "MPEG_LAYER_III", "the premise"
    with pytest.raises(DataError, match="is mp3 inside WAV, of which the length cannot be verified; convert it to flac"):
        decode(path, RATE_HZ)
