"""Decoding and log-mels against librosa and hand-worked answers; the folder of features against damage and interruption."""

import contextlib
import csv
import errno
import hashlib
import logging
import math
import multiprocessing
import os
import resource
import shutil
import signal
import tracemalloc
import wave
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import numpy.typing as npt
import pytest
import soundfile

from emotion.audio.decoding import READ_SAMPLES, decode, decode_blocks
from emotion.audio.extract import extract_features
from emotion.audio.feature_store import Features, FeatureWriter
from emotion.audio.mel import LogMel
from emotion.config import DataConfig, MelConfig
from emotion.data.deam import Dataset, Song
from emotion.data.faults import Fault, read_faults
from emotion.errors import DataError, Interrupted, SpecError

Array = npt.NDArray[np.float32]

MEL = MelConfig()
RATE_HZ = MEL.sample_rate_hz
SMALL = MelConfig(sample_rate_hz=8000, window_samples=256, hop_samples=128, mels=16, fmax_hz=4000.0)


@pytest.fixture(scope="module")
def log_mel() -> LogMel:
    return LogMel(MEL)


def tone(frequency_hz: float, amplitude: float, seconds: float = 1.0, rate_hz: int = RATE_HZ) -> Array:
    time_s = np.arange(int(seconds * rate_hz)) / rate_hz
    return (amplitude * np.sin(2 * np.pi * frequency_hz * time_s)).astype(np.float32)


def noise(samples: int, channels: int = 1, seed: int = 0) -> Array:
    return np.random.default_rng(seed).uniform(-0.3, 0.3, (samples, channels)).astype(np.float32)


def by_librosa(samples: Array, mel: MelConfig) -> Array:
    power = librosa.feature.melspectrogram(
        y=samples,
        sr=mel.sample_rate_hz,
        n_fft=mel.window_samples,
        hop_length=mel.hop_samples,
        n_mels=mel.mels,
        fmin=mel.fmin_hz,
        fmax=mel.fmax_hz,
        pad_mode="constant",
    )
    decibel: Array = librosa.power_to_db(power, ref=1.0, amin=1e-10, top_db=None).T
    return decibel


def assert_same_decibels(found: Array, expected: Array) -> None:
    """The promise: 1e-3 dB down to 80 dB below the maximum, 0.1 dB below that."""
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    difference = np.abs(found - expected)
    assert difference[expected >= expected.max() - 80].max() < 1e-3
    assert difference.max() < 0.1


# decode


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


def test_an_mp3_that_does_not_tell_its_length_is_decoded_to_its_end(tmp_path: Path) -> None:
    """Variable bit rate, nearly silent for the first second and then loud: reckoned from its beginning it is far too long
    or far too short. libsndfile believes that and stops."""
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
    assert soundfile.info(path).duration == pytest.approx(5, abs=0.1), "the header still says so"
    assert len(decode(path, RATE_HZ)) / RATE_HZ == pytest.approx(2.5, abs=0.1)


def test_sound_is_found_whatever_the_file_is_called(tmp_path: Path) -> None:
    path = tmp_path / "a.mp3"
    soundfile.write(path, tone(440, 0.5), RATE_HZ, format="WAV", subtype="FLOAT")
    np.testing.assert_array_equal(decode(path, RATE_HZ), tone(440, 0.5))


def wav_of(content: Array, rate_hz: int = RATE_HZ) -> Callable[[Path], None]:
    return lambda path: soundfile.write(path, content, rate_hz, format="WAV", subtype="FLOAT")


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path: None, "no such audio file"),
        (lambda path: path.write_bytes(b""), "found 0 bytes"),
        (lambda path: path.write_text("<!DOCTYPE html><p>404"), "<!DOCTYPE html>"),
        (wav_of(np.zeros(0, np.float32)), "no samples"),
        (wav_of(np.array([0.1, np.nan], np.float32)), "NaN"),
        (wav_of(np.array([0.1, np.inf], np.float32), 44100), "infinite"),
        (wav_of(np.zeros(10, np.float32), 1), "1 Hz"),
    ],
)
def test_a_file_without_usable_sound_is_refused_by_name(
    tmp_path: Path, write: Callable[[Path], None], said: str
) -> None:
    path = tmp_path / "732.mp3"
    write(path)
    with pytest.raises(DataError) as error:
        decode(path, RATE_HZ)
    assert str(path) in str(error.value)
    assert said in str(error.value)


def test_a_long_song_never_exists_as_a_whole(tmp_path: Path, log_mel: LogMel) -> None:
    path = tmp_path / "long.wav"
    seconds = 300
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
    """16-bit silence at 8 kHz that takes no room on the disk."""
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
def test_of_a_song_that_is_too_long_one_block_too_much_is_decoded(
    tmp_path: Path, decoded: list[int], rate_hz: int, channels: int
) -> None:
    sparse_wav(tmp_path / "2.wav", 3600, channels)
    given: list[int] = []
    with pytest.raises(DataError) as caught:
        given.extend(len(block) for block in decode_blocks(tmp_path / "2.wav", rate_hz, longest_seconds=30))
    assert "2.wav: lasts longer than 30 s. Shorten it, or raise data.longest_seconds" in str(caught.value)
    assert sum(given) <= 30 * rate_hz
    assert 30 * 8000 * channels < sum(decoded) <= 30 * 8000 * channels + READ_SAMPLES


def test_a_song_may_last_as_long_as_is_allowed_and_no_sample_more(tmp_path: Path) -> None:
    for samples in (16000, 16001):
        soundfile.write(tmp_path / f"{samples}.wav", noise(samples), 8000)
    assert sum(map(len, decode_blocks(tmp_path / "16000.wav", 8000, longest_seconds=2))) == 16000
    with pytest.raises(DataError, match=r"16001\.wav: lasts longer than 2 s"):
        list(decode_blocks(tmp_path / "16001.wav", 8000, longest_seconds=2))


def test_a_file_that_would_fill_the_memory_is_refused_whatever_may_be_asked_for(
    tmp_path: Path, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse_wav(tmp_path / "2.wav", 600, channels=8)
    most_bytes = 1 << 22
    monkeypatch.setattr("emotion.audio.features.MOST_DECODED_BYTES", most_bytes)
    with pytest.raises(DataError, match=r"2\.wav: decodes to more than"):
        decode(tmp_path / "2.wav", RATE_HZ)
    assert most_bytes < 4 * sum(decoded) <= most_bytes + 4 * READ_SAMPLES


def test_a_header_that_promises_hours_of_which_a_second_is_there_gives_the_second(tmp_path: Path) -> None:
    sparse_wav(tmp_path / "2.wav", 36000)
    os.truncate(tmp_path / "2.wav", 44 + 2 * 8000)
    tracemalloc.start()
    try:
        assert len(decode(tmp_path / "2.wav", 8000)) == 8000
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


# LogMel


def slaney_hz(mel: float) -> float:
    """Slaney's scale: 200/3 Hz a mel up to 15 mel = 1 kHz, then 27 mels for each factor of 6.4."""
    return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)


@pytest.mark.parametrize("band", [10, 45, 90, 125])
def test_a_tone_peaks_in_the_band_whose_centre_it_has(log_mel: LogMel, band: int) -> None:
    lowest = 20 * 3 / 200
    highest = 15 + 27 * math.log(8) / math.log(6.4)
    centre_hz = slaney_hz(lowest + (highest - lowest) * (band + 1) / (MEL.mels + 1))
    found = log_mel(tone(centre_hz, 0.5))
    assert set(found[5:-5].argmax(axis=1)) == {band}


def test_the_level_is_that_of_the_power_and_of_no_reference_of_the_clip(log_mel: LogMel) -> None:
    loud, louder, quiet = (log_mel(tone(440, amplitude))[5:-5] for amplitude in (0.1, 0.2, 0.001))
    peak = int(loud.mean(axis=0).argmax())
    assert (louder - loud)[:, peak] == pytest.approx(20 * math.log10(2), abs=1e-3)
    assert (quiet - loud)[:, peak] == pytest.approx(-40, abs=1e-2)


def test_silence_is_minus_100_decibels(log_mel: LogMel) -> None:
    np.testing.assert_allclose(log_mel(np.zeros(3000, np.float32)), np.full((6, 128), -100), atol=1e-4)


@pytest.mark.parametrize(
    ("samples", "frames"),
    [(1, 1), (511, 1), (512, 2), (2047, 4), (30 * RATE_HZ, 1292), (127 * 512, 128), (128 * 512, 129)],
)
def test_frames_are_one_more_than_whole_hops(log_mel: LogMel, samples: int, frames: int) -> None:
    assert log_mel(np.zeros(samples, np.float32)).shape == (frames, 128)


def test_made_sounds_have_librosas_log_mel(log_mel: LogMel) -> None:
    rng = np.random.default_rng(0)
    samples = 5 * RATE_HZ + 77
    fading = np.geomspace(1, 1e-5, samples)
    music = np.sin(np.cumsum(rng.choice([0.03, 0.1, 0.3], samples // 1000 + 1).repeat(1000)[:samples]))
    sound = (0.3 * music * fading + 1e-3 * rng.normal(size=samples)).astype(np.float32)
    assert_same_decibels(log_mel(sound), by_librosa(sound, MEL))


def test_other_settings_have_librosas_log_mel_too() -> None:
    mel = MelConfig(sample_rate_hz=16000, window_samples=1024, hop_samples=320, mels=64, fmin_hz=50.0, fmax_hz=8000.0)
    sound = noise(16000).ravel()
    assert_same_decibels(LogMel(mel)(sound), by_librosa(sound, mel))


def test_the_log_mel_is_the_same_bits_however_the_sound_is_cut(log_mel: LogMel) -> None:
    sound = noise(150_000).ravel()
    whole = log_mel(sound)
    for cuts in ([1], [700, 701, 100_000], list(range(0, 150_000, 9973)), [149_999]):
        np.testing.assert_array_equal(log_mel.of_blocks(np.split(sound, cuts)), whole)


def test_a_mel_range_without_a_bin_is_refused() -> None:
    with pytest.warns(UserWarning, match="Empty filters"), pytest.raises(SpecError, match="window_samples"):
        LogMel(MelConfig(sample_rate_hz=96000, window_samples=64, hop_samples=16, fmin_hz=20.0, fmax_hz=100.0))


# real files


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
            wrong.append(
                f"{row['file']}: {row['should']} {row['seconds']} s; found {len(found) / RATE_HZ:.3f} s {said}"
            )
    assert len(rows) == 45
    assert wrong == []


@pytest.mark.parametrize(
    "file",
    [
        "vgmidi48/DEAM_audio/MEMD_audio/1410.mp3",
        "vgmidi48/DEAM_audio/MEMD_audio/1053.mp3",
        "odd_mp3/reference_44k_stereo_cbr128.mp3",
        "odd_mp3/stereo_16k_vbr.mp3",
        "odd_mp3/mono_8k.mp3",
        "odd_mp3/stereo_48k_vbr_q5.mp3",
        "odd_mp3/hard_clipped.mp3",
        "odd_mp3/very_quiet.mp3",
        "odd_mp3/antiphase_stereo.mp3",
        "odd_mp3/digital_silence.mp3",
        "odd_mp3/short_0.1s_44k.mp3",
    ],
)
def test_real_files_have_librosas_log_mel(real_data: Path, log_mel: LogMel, file: str) -> None:
    samples, _ = librosa.load(real_data / file, sr=RATE_HZ)
    found = log_mel.of_blocks(decode_blocks(real_data / file, RATE_HZ))
    assert_same_decibels(found, by_librosa(samples, MEL))


# the folder


def clip_of(frames: int, value: float) -> Array:
    """Every frame tells its number, every band its own."""
    return (value - np.arange(frames)[:, np.newaxis] - np.arange(SMALL.mels) / 16).astype(np.float32)


def write_folder(out: Path) -> None:
    with FeatureWriter(out, SMALL) as writer:
        writer.append(7, 0.5, -0.25, 0.1, 0.2, 'a, "quoted" group', clip_of(10, 0))
        writer.append(3, -1.0, 1.0, 0.0, 0.0, "b", clip_of(4, -50))


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


def test_a_short_song_is_repeated_from_its_beginning(tmp_path: Path) -> None:
    write_folder(tmp_path)
    clip = Features(tmp_path).clip(1, 0, 11)
    assert clip.shape == (11, 16)
    np.testing.assert_allclose(clip[:, 0], [-50, -51, -52, -53, -50, -51, -52, -53, -50, -51, -52], atol=0.03)


def test_a_clip_never_reaches_into_the_next_song(tmp_path: Path) -> None:
    write_folder(tmp_path)
    with pytest.raises(AssertionError):
        Features(tmp_path).clip(0, 6, 5)


def test_a_view_of_some_songs_has_these_in_this_order_and_no_others(tmp_path: Path) -> None:
    with FeatureWriter(tmp_path, SMALL) as writer:
        for song_id, value in ((7, 0.0), (3, -20.0), (5, -40.0)):
            writer.append(song_id, song_id / 10, -0.5, 0.0, 0.0, "a", clip_of(4, value), f"file {song_id}", "sound")
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


@pytest.mark.parametrize(
    ("log_mel", "valence"),
    [
        (clip_of(5, 0).T, 0.0),
        (clip_of(5, 0)[:, :-1], 0.0),
        (clip_of(0, 0), 0.0),
        (clip_of(5, np.nan), 0.0),
        (clip_of(5, 1e6), 0.0),
        (clip_of(5, 0), math.nan),
    ],
)
def test_what_is_no_log_mel_or_no_label_is_not_written(tmp_path: Path, log_mel: Array, valence: float) -> None:
    with pytest.raises(DataError, match="song 12"), FeatureWriter(tmp_path, SMALL) as writer:
        writer.append(12, valence, 0.0, 0.0, 0.0, "a", log_mel)
    assert list(tmp_path.iterdir()) == []


# Going on with a folder

PARTIAL, JOURNAL = ".features.f16.part", ".songs.jsonl"
LEFT_OUT = Fault("copied audio", 8, "8.mp3", 'is the "sound" of song 7')


def write_song(writer: FeatureWriter, number: int) -> None:
    """Of five songs one is left out; labels and group are such as must come back exactly."""
    if number == 2:
        writer.leave_out(LEFT_OUT)
        return
    labels = (number / 7, -1 / 3, 0.1 + 0.2, 1e-17)
    writer.append(number, *labels, f'a, "b" \n{number} é', clip_of(3 + number, -number), is_shorter=number > 2)


def write_songs(out: Path, until: int = 5, mel: MelConfig = SMALL, made_from: object = None) -> int:
    """The five songs, or Interrupted before song `until`. Returns how many were known on entering."""
    with FeatureWriter(out, mel, made_from) as writer:
        known = writer.done
        for number in range(known, 5):
            if number == until:
                raise Interrupted
            write_song(writer, number)
        assert (writer.faults, writer.shorter) == ([LEFT_OUT], [3, 4])
    return known


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    """What an unbroken attempt leaves."""
    write_songs(tmp_path / "whole")
    return files_of(tmp_path / "whole")


def stopped_songs(out: Path, until: int) -> None:
    with pytest.raises(Interrupted):
        write_songs(out, until)
    assert sorted(path.name for path in out.iterdir()) == [PARTIAL, JOURNAL]


def test_a_folder_goes_on_behind_the_songs_of_an_attempt_that_was_stopped(
    tmp_path: Path, whole: dict[str, bytes]
) -> None:
    for until in range(5):
        stopped_songs(tmp_path / "out", until)
    assert write_songs(tmp_path / "out") == 4
    assert files_of(tmp_path / "out") == whole


@pytest.mark.parametrize(
    ("file", "damage", "known"),
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
def test_of_damaged_partial_files_what_is_right_up_to_the_damage_is_used(
    tmp_path: Path, whole: dict[str, bytes], file: str, damage: Callable[[bytes], bytes], known: int
) -> None:
    stopped_songs(tmp_path / "out", 4)
    content = (tmp_path / "out" / file).read_bytes()
    assert damage(content) != content
    (tmp_path / "out" / file).write_bytes(damage(content))
    assert write_songs(tmp_path / "out") == known
    assert files_of(tmp_path / "out") == whole


@pytest.mark.parametrize("file", [PARTIAL, JOURNAL])
def test_no_flipped_bit_of_partial_files_reaches_the_result(
    tmp_path: Path, whole: dict[str, bytes], file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    stopped_songs(tmp_path / "stopped", 4)
    content = (tmp_path / "stopped" / file).read_bytes()
    for place in range(0, len(content), 5):
        shutil.copytree(tmp_path / "stopped", tmp_path / "out")
        flipped = content[place] ^ 1 << place % 8
        (tmp_path / "out" / file).write_bytes(content[:place] + bytes([flipped]) + content[place + 1 :])
        assert write_songs(tmp_path / "out") < 4
        assert files_of(tmp_path / "out") == whole, f"byte {place}"
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("lost", [PARTIAL, JOURNAL])
def test_of_two_partial_files_one_alone_is_nothing(tmp_path: Path, whole: dict[str, bytes], lost: str) -> None:
    stopped_songs(tmp_path / "out", 2)
    (tmp_path / "out" / lost).unlink()
    assert write_songs(tmp_path / "out") == 0
    assert files_of(tmp_path / "out") == whole


def test_what_other_settings_or_another_version_wrote_is_begun_anew(
    tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    stopped_songs(out, 4)
    assert write_songs(out, mel=SMALL.model_copy(update={"fmin_hz": 50.0})) == 0
    assert Features(out).mel.fmin_hz == 50
    assert write_songs(out, made_from={"seed": 1}) == 0
    assert write_songs(out) == 0
    monkeypatch.setattr("emotion.audio.features.JOURNAL_VERSION", 0)
    assert write_songs(out) == 0
    assert {name: files_of(out)[name] for name in OUTPUTS} == {name: whole[name] for name in OUTPUTS}


OUTPUTS = ("features.f16", "songs.csv", "mel.json")


@pytest.mark.parametrize("lost", [*OUTPUTS[1:], None])
def test_a_folder_that_was_finished_is_finished_again_without_its_songs(
    tmp_path: Path, whole: dict[str, bytes], lost: str | None
) -> None:
    """Who is killed before the receipt is written has lost nothing."""
    if lost:
        (tmp_path / "whole" / lost).unlink()
    assert write_songs(tmp_path / "whole") == 5
    assert files_of(tmp_path / "whole") == whole


def test_a_finished_array_without_a_journal_is_not_cut_under_those_who_have_it_mapped(
    tmp_path: Path, whole: dict[str, bytes]
) -> None:
    with (tmp_path / "whole" / "features.f16").open("rb") as mapped:
        (tmp_path / "whole" / JOURNAL).unlink()
        stopped_songs(tmp_path / "whole", 1)
        assert mapped.read() == whole["features.f16"]


def test_after_a_failed_fsync_nobody_is_told_of_the_songs_before_it(
    tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may have thrown away what it could not write, and says so once."""
    monkeypatch.setattr("emotion.audio.features.DURABLE_SECONDS", 0.0)
    fsync, calls = os.fsync, count(1)

    def broken_once(descriptor: int) -> None:
        # One for the folder and two for each of two songs came before.
        if next(calls) == 6:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", broken_once)
    with pytest.raises(OSError, match="Input/output"):
        write_songs(tmp_path / "out")
    assert write_songs(tmp_path / "out") == 2
    assert files_of(tmp_path / "out") == whole


def test_an_attempt_that_fails_leaves_what_it_had_and_no_folder_that_could_be_taken_for_whole(tmp_path: Path) -> None:
    write_folder(tmp_path)

    def fail_midway() -> None:
        with FeatureWriter(tmp_path, SMALL, "other songs") as writer:
            writer.append(1, 0.0, 0.0, 0.0, 0.0, "a", clip_of(3, 0))
            raise KeyError

    with pytest.raises(KeyError):
        fail_midway()
    assert {path.name: path.read_bytes().count(b"\n") for path in tmp_path.glob("*.jsonl")} == {JOURNAL: 1}
    with pytest.raises(DataError):
        Features(tmp_path)


@pytest.mark.parametrize("done", range(6))
def test_a_job_that_slept_while_another_took_its_folder_over_does_no_harm_when_it_wakes(
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
            writer.append(1, 0.0, 0.0, 0.0, 0.0, "a", clip_of(1, 0))
            lines.append((tmp_path / JOURNAL).read_bytes().count(b"\n"))
    assert lines == [0, 0, 3, 3, 3, 6]


def test_known_songs_are_read_one_at_a_time(tmp_path: Path) -> None:
    with FeatureWriter(tmp_path, SMALL) as writer:
        for song_id in range(50):
            writer.append(song_id, 0.0, 0.0, 0.0, 0.0, "a", clip_of(900, 0))
    tracemalloc.start()
    try:
        with FeatureWriter(tmp_path, SMALL) as writer:
            assert writer.done == 50
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 6 * 900 * 16 * 2 < 50 * 900 * 16 * 2 / 8


# the phase


def song_of(song_id: int, audio: str) -> Song:
    return Song(song_id, song_id / 1e4, -song_id / 1e4, 0.1, 0.2, f"group {song_id % 2}", audio)


def made_songs(root: Path, seconds: list[float]) -> list[Song]:
    songs = []
    for number, length in enumerate(seconds):
        song = song_of(100 - number, f"audio/{number}.wav")
        (root / "audio").mkdir(exist_ok=True)
        soundfile.write(root / song.audio, noise(int(length * 16000), 2, seed=number), 16000)
        songs.append(song)
    return songs


def never() -> bool:
    return False


def extract(
    songs: Sequence[Song],
    root: Path,
    told: Sequence[Fault] = (),
    threads: int = 2,
    should_stop: Callable[[], bool] = never,
    out: str = "out",
    **data: Any,
) -> list[Fault]:
    config = DataConfig.model_validate({"source": "made", "shortest_seconds": 0.0, **data})
    dataset = Dataset(list(songs), list(told))
    return extract_features(dataset, root, config, SMALL, root / out, root / "faults.csv", threads, should_stop)


def refusal(songs: Sequence[Song], root: Path, told: Sequence[Fault] = (), **data: Any) -> str:
    """What is said of a dataset that is refused; nothing of it is left but the table."""
    with pytest.raises(DataError) as caught:
        extract(songs, root, told, **data)
    assert list((root / "out").iterdir()) == []
    return str(caught.value)


def test_the_order_is_that_of_the_songs_and_the_bytes_do_not_depend_on_threads(tmp_path: Path) -> None:
    songs = made_songs(tmp_path, [8, 0.1, 3, 0.01, 0.5, 0.2, 1, 0.1, 0.1])
    contents = []
    for threads in (1, 4):
        assert extract(songs, tmp_path, threads=threads, out=str(threads)) == []
        contents.append(files_of(tmp_path / str(threads)))
    assert contents[0] == contents[1]
    assert sorted(contents[0]) == [JOURNAL, "features.f16", "mel.json", "songs.csv"]
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


def test_a_song_is_known_by_the_digests_of_its_file_and_of_its_samples(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).integers(-9000, 9000, 4000, np.int16)
    soundfile.write(tmp_path / "2.wav", samples, 8000)
    extract([song_of(2, "2.wav")], tmp_path)
    (row,) = Features(tmp_path / "out").songs
    assert row.file_sha256 == hashlib.sha256((tmp_path / "2.wav").read_bytes()).hexdigest()
    assert row.sound_sha256 == hashlib.sha256(samples.astype("<i2").tobytes()).hexdigest()


def write_unusable(root: Path) -> tuple[list[Song], list[Fault]]:
    """A second of sound in songs 1 to 4 and 2001, and in the others whatever can be wrong with a file."""
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
    silent = "is silent: RMS {} dB, expected data.silence_db -60 or more"
    sound(wrong(12, silent.format("-100.0")), np.zeros((8000, 2), np.float32))
    sound(wrong(13, silent.format("-100.0")), np.hstack([good, -good]), subtype="FLOAT")
    sound(wrong(14, silent.format("-60.9")), np.full(8000, 9e-4, np.float32), subtype="FLOAT")
    peak = np.where(np.arange(8000) == 99, np.float32(22), good[:, 0])
    sound(wrong(15, "has a peak of 22, expected at most data.largest_peak 4"), peak, subtype="FLOAT")
    sound(
        wrong(16, "infinite or NaN samples after 0.0 s. Replace the file.", "undecodable audio"),
        np.inf * good,
        subtype="FLOAT",
    )
    expected = "cannot be decoded; expected mp3, wav, flac or ogg, found {} bytes that begin with {}. Replace the file."
    (root / wrong(17, expected.format(13, b"<html>404</ht"), "undecodable audio", "mp3")).write_bytes(b"<html>404</ht")
    (root / wrong(18, expected.format(0, b""), "undecodable audio", "m4a")).write_bytes(b"")
    wrong(19, "no such audio file.", "undecodable audio")
    (root / "20.wav").write_bytes((root / "4.wav").read_bytes())
    wrong(20, "is the sound of song 4", "copied audio")
    names = ["1.wav", "2.flac", "3.ogg", "4.wav", *(fault.place for fault in faults), "2001.wav"]
    return [song_of(int(Path(name).stem), name) for name in names], faults


LIMITS: dict[str, Any] = {"shortest_seconds": 0.6, "longest_seconds": 2.0}


def test_whatever_is_wrong_with_audio_is_one_fault_of_its_song(tmp_path: Path) -> None:
    songs, faults = write_unusable(tmp_path)
    assert extract(songs, tmp_path, faults="drop", drop_at_most=0.9, **LIMITS) == faults
    assert [song.song_id for song in Features(tmp_path / "out").songs] == [1, 2, 3, 4, 2001]
    assert read_faults(tmp_path / "faults.csv") == faults


def test_an_excerpt_more_than_a_second_short_is_cut_and_a_full_song_is_not(tmp_path: Path) -> None:
    seconds = {1: 1.5, 2: 1.49, 2000: 1.49, 2001: 1.49, 3: 4.0}
    for song_id, length in seconds.items():
        soundfile.write(tmp_path / f"{song_id}.wav", noise(int(length * 8000), seed=song_id), 8000)
    songs = [song_of(song_id, f"{song_id}.wav") for song_id in seconds]
    assert extract(songs, tmp_path) == [], "not asked for"
    said = "is cut: lasts 1.49 s, expected an excerpt of data.excerpt_seconds 2.5"
    cut = [Fault("unfit audio", song_id, f"{song_id}.wav", said) for song_id in (2, 2000)]
    assert extract(songs, tmp_path, faults="drop", drop_at_most=0.5, excerpt_seconds=2.5) == cut
    assert [song.song_id for song in Features(tmp_path / "out").songs] == [1, 2001, 3]


def test_a_song_may_be_exactly_as_long_loud_and_quiet_as_is_allowed(tmp_path: Path) -> None:
    square = np.where(np.arange(8000) // 40 % 2, np.float32(0.25), np.float32(-0.25))
    soundfile.write(tmp_path / "2.wav", square, 8000, subtype="FLOAT")
    exact: dict[str, Any] = {
        "shortest_seconds": 1.0,
        "longest_seconds": 1.0,
        "largest_peak": 0.25,
        "silence_db": 20 * math.log10(0.25),
    }
    assert extract([song_of(2, "2.wav")], tmp_path, **exact) == []
    for name, value in (
        ("shortest_seconds", 1.001),
        ("longest_seconds", 0.999),
        ("largest_peak", 0.249),
        ("silence_db", -12),
    ):
        refusal([song_of(2, "2.wav")], tmp_path, **{**exact, name: value})


def test_the_same_sound_is_one_song_however_its_file_is_made(tmp_path: Path) -> None:
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


def test_copies_of_what_is_unfit_are_unfit_and_nobodys_copies(tmp_path: Path) -> None:
    for song_id in (2, 3):
        soundfile.write(tmp_path / f"{song_id}.wav", np.zeros(8000, np.float32), 8000)
    said = refusal([song_of(2, "2.wav"), song_of(3, "3.wav")], tmp_path)
    assert said.count("is silent") == 2
    assert "copied" not in said


# Failing or dropping

TOLD = [
    Fault("label", 30, "labels.csv, line 3", "valence_mean is 'nan', expected 1 to 9"),
    Fault("label", None, "labels.csv, line 4", "song_id is 'x', expected a whole number"),
    Fault("audio without label", 31, "31.mp3", "no label file has a row with this id"),
]


def test_to_fail_names_faults_of_labels_and_audio_together_and_leaves_nothing_but_the_table(tmp_path: Path) -> None:
    songs, faults = write_unusable(tmp_path)
    said = refusal(songs, tmp_path, TOLD, **LIMITS)
    head, *lines, advice = said.splitlines()
    assert head == f"data: 13 of 18 songs cannot be used as they are; 14 faults, all in {tmp_path / 'faults.csv'}"
    assert sorted(lines) == sorted(f"  {fault}" for fault in [*TOLD, *faults])
    assert "data.faults" in advice
    assert read_faults(tmp_path / "faults.csv") == [*TOLD, *faults]


def test_of_many_faults_of_a_kind_the_message_shows_ten_and_the_table_all(tmp_path: Path) -> None:
    songs = made_songs(tmp_path, [0.1] * 25)
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


def test_to_drop_within_the_share_gives_the_folder_that_the_others_alone_would_give(tmp_path: Path) -> None:
    songs = made_songs(tmp_path, [0.1] * 9)
    good = [song for number, song in enumerate(songs) if number not in (0, 5)]
    extract(good, tmp_path, out="alone")
    for number in (0, 5):
        (tmp_path / songs[number].audio).write_text("<html>")
    faults = extract(songs, tmp_path, TOLD[:1], faults="drop", drop_at_most=0.3)
    assert [fault.song_id for fault in faults] == [30, songs[0].song_id, songs[5].song_id]
    assert read_faults(tmp_path / "faults.csv") == faults
    for name in ("features.f16", "songs.csv", "mel.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_to_drop_beyond_the_share_fails_and_says_what_is_allowed(tmp_path: Path) -> None:
    songs = made_songs(tmp_path, [0.1] * 9)
    for number in (0, 5):
        (tmp_path / songs[number].audio).write_text("<html>")
    said = refusal(songs, tmp_path, TOLD[:1], faults="drop", drop_at_most=0.29)
    assert "3 of 10 songs" in said
    assert "data.drop_at_most 0.29 allows 2 songs" in said
    assert len(read_faults(tmp_path / "faults.csv")) == 3
    assert "allows 0 songs" in refusal(songs, tmp_path, faults="drop", drop_at_most=0.0)


def test_nothing_may_be_dropped_from_a_dataset_without_faults_and_it_is_fine(tmp_path: Path) -> None:
    (tmp_path / "faults.csv").write_text("of an earlier attempt")
    assert extract(made_songs(tmp_path, [0.1] * 3), tmp_path, faults="drop", drop_at_most=0.0) == []
    assert len(Features(tmp_path / "out").songs) == 3
    assert not (tmp_path / "faults.csv").exists()


def test_a_dataset_of_which_nothing_is_left_is_refused_though_all_may_be_dropped(tmp_path: Path) -> None:
    songs = made_songs(tmp_path, [0.1] * 3)
    for song in songs:
        (tmp_path / song.audio).write_bytes(b"")
    assert "no song to work with" in refusal(songs, tmp_path, faults="drop", drop_at_most=1.0)
    assert "no song to work with" in refusal([], tmp_path, TOLD, faults="drop", drop_at_most=1.0)
    assert "no song to work with" in refusal([], tmp_path)
    assert "2 of 2 songs" in refusal([], tmp_path, TOLD)


# Going on with the phase


@pytest.fixture
def mixed(tmp_path: Path) -> list[Song]:
    """Seven songs, and of these a page, a copy of the first, and one that is shorter than its header announces."""
    songs = made_songs(tmp_path, [0.3, 0.1, 0.2, 0.1, 2.0, 0.1, 0.4])
    audio = tmp_path / "audio"
    (audio / "1.wav").write_text("<html>")
    shutil.copy(audio / "0.wav", audio / "3.wav")
    soundfile.write(audio / "4.wav", noise(32000, seed=4), 16000, format="MP3")
    (audio / "4.wav").write_bytes((audio / "4.wav").read_bytes()[:4000])
    return songs


DROP: dict[str, Any] = {"faults": "drop", "drop_at_most": 0.9}


def unbroken(songs: list[Song], root: Path, caplog: pytest.LogCaptureFixture) -> dict[str, Any]:
    faults = extract(songs, root, TOLD, out="unbroken", **DROP)
    assert [fault.song_id for fault in faults] == [30, None, 31, songs[1].song_id, songs[3].song_id]
    assert f"used as they are: {songs[4].song_id}" in caplog.text
    caplog.clear()
    return {"faults": faults, "table": (root / "faults.csv").read_bytes(), "files": files_of(root / "unbroken")}


def assert_goes_on_to(
    expected: dict[str, Any], songs: list[Song], root: Path, known: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Without the audio of the songs that are known."""
    (root / "faults.csv").unlink()
    for song in songs[:known]:
        (root / song.audio).unlink()
    faults = extract(songs, root, TOLD, **DROP)
    found = {"faults": faults, "table": (root / "faults.csv").read_bytes(), "files": files_of(root / "out")}
    assert found == expected
    assert f"used as they are: {songs[4].song_id}" in caplog.text


def exit_code_of(attempt: Callable[[], object]) -> int | None:
    """Of a process that does this and nothing else."""
    process = multiprocessing.get_context("fork").Process(target=attempt)
    process.start()
    process.join()
    return process.exitcode


def die_at(asked: int, questions: Iterator[int]) -> bool:
    """Killed by a real signal when it is asked for the time number `asked`."""
    if next(questions) == asked:
        os.kill(os.getpid(), signal.SIGKILL)
    return False


@pytest.mark.parametrize("asked", range(1, 8))
def test_killed_after_any_song_the_phase_goes_on_behind_it_to_the_same_bytes(
    tmp_path: Path, mixed: list[Song], asked: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = unbroken(mixed, tmp_path, caplog)
    monkeypatch.setattr("emotion.audio.features.DURABLE_SECONDS", 0.0)
    should_stop = partial(die_at, asked, count(1))
    assert exit_code_of(partial(extract, mixed, tmp_path, TOLD, should_stop=should_stop, **DROP)) == -signal.SIGKILL
    assert_goes_on_to(expected, mixed, tmp_path, asked - 1, caplog)


@pytest.mark.parametrize("asked", [1, 2, 3, 5, 7])
def test_asked_to_stop_the_phase_goes_on_behind_the_last_song_to_the_same_bytes(
    tmp_path: Path, mixed: list[Song], asked: int, caplog: pytest.LogCaptureFixture
) -> None:
    expected = unbroken(mixed, tmp_path, caplog)
    answers = iter([False] * (asked - 1) + [True])
    with pytest.raises(Interrupted, match=f"after {asked - 1} of 7"):
        extract(mixed, tmp_path, TOLD, should_stop=lambda: next(answers), **DROP)
    with pytest.raises(Interrupted, match=f"after {asked - 1} of 7"):
        extract(mixed, tmp_path, TOLD, should_stop=lambda: True, **DROP)
    assert_goes_on_to(expected, mixed, tmp_path, asked - 1, caplog)


def test_killed_before_any_fsync_rename_or_removal_the_phase_goes_on_to_the_same_bytes(
    tmp_path: Path, mixed: list[Song], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    songs = mixed[:3]
    attempt = partial(extract, songs, tmp_path, **DROP)
    attempt(out="unbroken")
    expected = files_of(tmp_path / "unbroken")
    monkeypatch.setattr("emotion.audio.features.DURABLE_SECONDS", 0.0)

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

    for change in count(1):
        exit_code = exit_code_of(partial(killed_before, change))
        if exit_code == 0:
            break
        assert exit_code == -signal.SIGKILL
        attempt()
        assert files_of(tmp_path / "out") == expected
        shutil.rmtree(tmp_path / "out")
    assert change > 20


def test_killed_again_and_again_the_phase_comes_to_its_end(
    tmp_path: Path, mixed: list[Song], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = unbroken(mixed, tmp_path, caplog)
    monkeypatch.setattr("emotion.audio.features.DURABLE_SECONDS", 0.0)
    for _ in range(7):
        should_stop = partial(die_at, 2, count(1))
        exit_code = exit_code_of(partial(extract, mixed, tmp_path, TOLD, should_stop=should_stop, **DROP))
    assert exit_code == 0
    assert_goes_on_to(expected, mixed, tmp_path, 7, caplog)


def test_on_a_full_disk_the_error_surfaces_and_the_phase_goes_on_from_what_was_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    songs = made_songs(tmp_path, [0.6] * 5)
    extract(songs, tmp_path, out="unbroken")
    monkeypatch.setattr("emotion.audio.features.DURABLE_SECONDS", 0.0)

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
    assert files_of(tmp_path / "out") == files_of(tmp_path / "unbroken")


def test_other_songs_or_limits_are_begun_anew(tmp_path: Path) -> None:
    songs = made_songs(tmp_path, [0.1, 0.2, 0.3])
    extract(songs, tmp_path)
    relabelled = [song_of(song.song_id + 1, song.audio) for song in songs]
    extract(relabelled, tmp_path)
    assert [song.song_id for song in Features(tmp_path / "out").songs] == [101, 100, 99]
    assert "lasts 0.10 s" in refusal(relabelled, tmp_path, shortest_seconds=0.15)


def test_away_from_a_terminal_progress_is_a_log_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO):
        extract(made_songs(tmp_path, [0.1, 0.1]), tmp_path)
    assert "phase=features songs=2/2" in caplog.messages
    assert capsys.readouterr().err == ""
