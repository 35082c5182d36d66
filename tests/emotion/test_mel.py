"""Log-mels against librosa and against answers worked out by hand."""

import math
import pickle
from pathlib import Path

import librosa
import numpy as np
import pytest

from emotion.audio.decoding import decode_blocks
from emotion.audio.mel import LogMel, mel_filters
from emotion.config import MelConfig
from emotion.errors import SpecError
from tests.emotion.sounds import MEL, RATE_HZ, Array, noise, tone


@pytest.fixture(scope="module")
def log_mel() -> LogMel:
    return LogMel(MEL)


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


def slaney_hz(mel: float) -> float:
    """Slaney's scale: 200/3 Hz a mel up to 15 mel = 1 kHz, then 27 mels for each factor of 6.4."""
    return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)


@pytest.mark.parametrize("band", [10, 45, 90, 125])
def test_a_tone_peaks_in_the_band_with_its_frequency(log_mel: LogMel, band: int) -> None:
    lowest = 20 * 3 / 200
    highest = 15 + 27 * math.log(8) / math.log(6.4)
    centre_hz = slaney_hz(lowest + (highest - lowest) * (band + 1) / (MEL.mels + 1))
    found = log_mel(tone(centre_hz, 0.5))
    assert set(found[5:-5].argmax(axis=1)) == {band}


def test_the_level_does_not_depend_on_the_rest_of_the_clip(log_mel: LogMel) -> None:
    loud, louder, quiet = (log_mel(tone(440, amplitude))[5:-5] for amplitude in (0.1, 0.2, 0.001))
    peak = int(loud.mean(axis=0).argmax())
    assert (louder - loud)[:, peak] == pytest.approx(20 * math.log10(2), abs=1e-3)
    assert (quiet - loud)[:, peak] == pytest.approx(-40, abs=1e-2)


def test_silence_is_minus_100_decibels(log_mel: LogMel) -> None:
    np.testing.assert_allclose(log_mel(np.zeros(3000, np.float32)), np.full((6, 128), -100), atol=1e-4)


@pytest.mark.parametrize(
    ("samples", "frames"), [(1, 1), (511, 1), (512, 2), (2047, 4), (30 * RATE_HZ, 1292), (127 * 512, 128), (128 * 512, 129)]
)
def test_there_is_one_frame_more_than_whole_hops(log_mel: LogMel, samples: int, frames: int) -> None:
    assert log_mel(np.zeros(samples, np.float32)).shape == (frames, 128)


@pytest.mark.full
def test_synthetic_sounds_have_librosas_log_mel(log_mel: LogMel) -> None:
    rng = np.random.default_rng(0)
    samples = 5 * RATE_HZ + 77
    fading = np.geomspace(1, 1e-5, samples)
    music = np.sin(np.cumsum(rng.choice([0.03, 0.1, 0.3], samples // 1000 + 1).repeat(1000)[:samples]))
    sound = (0.3 * music * fading + 1e-3 * rng.normal(size=samples)).astype(np.float32)
    assert_same_decibels(log_mel(sound), by_librosa(sound, MEL))


@pytest.mark.parametrize(
    "mel",
    [
        MEL,
        MelConfig(sample_rate_hz=16000, window_samples=1024, hop_samples=320, mels=64, fmin_hz=50.0, fmax_hz=8000.0),
        MelConfig(sample_rate_hz=8000, window_samples=256, hop_samples=128, mels=16, fmin_hz=1200.0, fmax_hz=4000.0),
        MelConfig(sample_rate_hz=8000, window_samples=512, hop_samples=128, mels=16, fmin_hz=0.0, fmax_hz=900.0),
    ],
)
def test_the_filters_are_librosas_to_the_bit(mel: MelConfig) -> None:
    """Also with both ends on the logarithmic part of the scale, and with both on the linear one."""
    settings = {"n_mels": mel.mels, "fmin": mel.fmin_hz, "fmax": mel.fmax_hz}
    expected = librosa.filters.mel(sr=mel.sample_rate_hz, n_fft=mel.window_samples, **settings)
    np.testing.assert_array_equal(mel_filters(mel), expected)


def test_filters_without_a_bin_are_counted_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    mel = MelConfig(sample_rate_hz=22050, window_samples=256, hop_samples=128, mels=128)
    empty = (~mel_filters(mel).any(axis=1)).sum()
    LogMel(mel)
    assert 0 < empty < 128
    assert f"{empty} of 128 filters have no frequency bin" in caplog.text


def test_a_pickled_one_is_small_and_gives_the_same_bits(log_mel: LogMel) -> None:
    """Each process that decodes songs gets one."""
    pickled = pickle.dumps(log_mel)
    assert len(pickled) < 50_000
    sound = noise(10_000).ravel()
    np.testing.assert_array_equal(pickle.loads(pickled)(sound), log_mel(sound))


@pytest.mark.full
def test_other_settings_have_librosas_log_mel_too() -> None:
    mel = MelConfig(sample_rate_hz=16000, window_samples=1024, hop_samples=320, mels=64, fmin_hz=50.0, fmax_hz=8000.0)
    sound = noise(16000).ravel()
    assert_same_decibels(LogMel(mel)(sound), by_librosa(sound, mel))


def test_block_boundaries_do_not_change_any_bit(log_mel: LogMel) -> None:
    sound = noise(150_000).ravel()
    whole = log_mel(sound)
    for cuts in ([1], [700, 701, 100_000], list(range(0, 150_000, 9973)), [149_999]):
        np.testing.assert_array_equal(log_mel.of_blocks(np.split(sound, cuts)), whole)


def test_a_sound_may_end_with_a_whole_group_of_frames() -> None:
    """Where frames do not overlap, the last one may need no padding."""
    mel = MelConfig(sample_rate_hz=8000, window_samples=256, hop_samples=256, mels=16, fmax_hz=4000.0)
    sound = noise(16300).ravel()  # the last of 64 frames ends at sample 16256
    assert_same_decibels(LogMel(mel)(sound), by_librosa(sound, mel))


def test_a_mel_range_without_a_bin_is_refused() -> None:
    with pytest.raises(SpecError, match="window_samples"):
        LogMel(MelConfig(sample_rate_hz=96000, window_samples=64, hop_samples=16, fmin_hz=20.0, fmax_hz=100.0))


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
