"""The inverse of the log-mel, tested by a round trip: sound → log-mel → sound → log-mel."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from emotion.audio.griffin_lim import griffin_lim, invert_bank, synthesize_sound, write_wav
from emotion.audio.mel import LogMel
from emotion.config import MelConfig
from emotion.errors import DataError, Interrupted
from tests.emotion.sounds import MEL, Array, decode, tone

ROUNDS = 32


@pytest.fixture(scope="module")
def log_mel() -> LogMel:
    return LogMel(MEL)


def sound_of(log_mel: Array, mel: MelConfig = MEL, rounds: int = ROUNDS, seed: int = 0) -> Array:
    return synthesize_sound(log_mel, mel, rounds, np.random.default_rng(seed))


@pytest.mark.parametrize("amplitude", [0.5, 0.01])
def test_a_tone_comes_back_with_its_pitch_and_level(log_mel: LogMel, amplitude: float) -> None:
    before = log_mel(tone(440, amplitude, 1.5))[8:-8]
    sound = sound_of(log_mel(tone(440, amplitude, 1.5)))
    after = log_mel(sound)[8:-8]

    peak = int(before.mean(axis=0).argmax())
    assert int(after.mean(axis=0).argmax()) == peak
    assert after[:, peak].mean() == pytest.approx(before[:, peak].mean(), abs=1)
    strongest_hz = np.abs(np.fft.rfft(sound)).argmax() * MEL.sample_rate_hz / len(sound)
    assert strongest_hz == pytest.approx(440, abs=MEL.sample_rate_hz / MEL.window_samples)


def test_a_tone_rising_over_noise_comes_back_where_it_was_in_time(log_mel: LogMel) -> None:
    noise = 1e-4 * np.random.default_rng(0).normal(size=MEL.sample_rate_hz)
    sound = np.concatenate([noise, tone(1000, 0.3, 1.0) + noise]).astype(np.float32)
    back = sound_of(log_mel(sound))
    silent, loud = back[: MEL.sample_rate_hz - 2048], back[MEL.sample_rate_hz + 2048 :]
    assert np.sqrt(np.mean(loud**2)) == pytest.approx(0.3 / np.sqrt(2), rel=0.12)
    assert np.sqrt(np.mean(silent**2)) < 1e-3


def test_music_comes_back_within_a_decibel(log_mel: LogMel, real_data: Path) -> None:
    song = real_data / "vgmidi48" / "DEAM_audio" / "MEMD_audio" / "1410.mp3"
    start = 5 * MEL.sample_rate_hz
    given = log_mel(decode(song, MEL.sample_rate_hz)[start : start + 5 * MEL.sample_rate_hz])
    back = log_mel(sound_of(given))
    audible = given > given.max() - 40
    difference = (back - given)[audible]
    assert np.abs(difference).mean() < 0.8
    assert abs(difference.mean()) < 0.3, "loudness is kept"


def test_the_fitted_bins_have_the_mel_power_they_were_fitted_to_in_loud_and_quiet_bands_alike(log_mel: LogMel) -> None:
    bins = log_mel.bank.shape[1]
    linear = np.random.default_rng(0).gamma(0.5, size=(20, bins)).astype(np.float32) * np.logspace(0, -8, bins, dtype="f4")
    power = linear @ log_mel.bank.T
    fitted = invert_bank(power, log_mel.bank)
    assert (fitted >= 0).all()
    decibel = 10 * np.log10(fitted @ log_mel.bank.T / power)
    assert np.abs(decibel).max() < 0.1


def test_more_rounds_bring_the_magnitudes_closer() -> None:
    window = np.hanning(257)[:-1].astype(np.float32)
    sound = np.random.default_rng(0).normal(size=64 * 40).astype(np.float32)

    def magnitude_of(samples: Array) -> Array:
        padded = np.pad(samples, 128)
        return np.abs(np.fft.rfft([padded[k * 64 : k * 64 + 256] * window for k in range(41)], axis=1)).astype(np.float32)

    wanted = magnitude_of(sound)
    errors = []
    for rounds in (0, 4, 64):
        made = griffin_lim(wanted, window, 64, rounds, np.random.default_rng(1))
        assert made.shape == sound.shape
        errors.append(np.linalg.norm(magnitude_of(made) - wanted) / np.linalg.norm(wanted))
    assert errors[0] > 2 * errors[1] > 2.5 * errors[2]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_ones(log_mel: LogMel) -> None:
    given = log_mel(tone(300, 0.2, 0.5))
    first, again, other = (sound_of(given, rounds=4, seed=seed) for seed in (3, 3, 4))
    assert first.dtype == np.float32
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


def test_a_stop_is_asked_for_before_each_iteration() -> None:
    asked = 0

    def check_stop() -> None:
        nonlocal asked
        asked += 1
        if asked == 3:
            raise Interrupted("enough")

    given = np.full((5, MEL.mels), -30, np.float32)
    with pytest.raises(Interrupted):
        synthesize_sound(given, MEL, 3, np.random.default_rng(0), check_stop)
    assert asked == 3


def test_the_sound_has_a_hop_per_frame_after_the_first(log_mel: LogMel) -> None:
    given = np.full((37, MEL.mels), -30, np.float32)
    sound = sound_of(given, rounds=1)
    assert sound.shape == (36 * MEL.hop_samples,)
    assert log_mel(sound).shape == given.shape


def test_only_a_sound_with_a_peak_above_full_scale_is_scaled() -> None:
    loud, quiet = (np.full((20, MEL.mels), level, np.float32) for level in (30, -60))
    assert np.abs(sound_of(loud, rounds=2)).max() == pytest.approx(0.99, abs=1e-6)
    assert 0 < np.abs(sound_of(quiet, rounds=2)).max() < 0.05


def test_silence_comes_back_as_silence() -> None:
    assert np.abs(sound_of(np.full((9, MEL.mels), -100, np.float32), rounds=4)).max() < 1e-4


@pytest.mark.parametrize("window_samples", [500, 501])
def test_windows_that_are_no_multiple_of_the_hop_are_inverted_too(window_samples: int) -> None:
    mel = MelConfig(sample_rate_hz=8000, window_samples=window_samples, hop_samples=120, mels=40, fmax_hz=4000.0)
    analysis = LogMel(mel)
    given = analysis((0.3 * np.sin(np.arange(8000) * 2 * np.pi * 440 / 8000)).astype(np.float32))
    back = analysis(sound_of(given, mel))
    peak = int(given.mean(axis=0).argmax())
    assert back[8:-8, peak].mean() == pytest.approx(given[8:-8, peak].mean(), abs=1)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (np.zeros((MEL.mels, 20), np.float32), "[128, 20]"),
        (np.zeros((1, MEL.mels), np.float32), "[1, 128]"),
        (np.full((5, MEL.mels), np.nan, np.float32), "NaN"),
    ],
)
def test_a_wrong_log_mel_is_refused(given: Array, found: str) -> None:
    with pytest.raises(DataError) as error:
        sound_of(given, rounds=1)
    assert found in str(error.value)


def test_a_wav_has_the_samples_in_16_bits_and_no_other_file_is_left(tmp_path: Path) -> None:
    samples = tone(440, 0.5, 0.1)
    write_wav(tmp_path / "a.wav", samples, 22050)
    read, rate = soundfile.read(tmp_path / "a.wav", dtype="float32")
    assert rate == 22050
    assert soundfile.info(tmp_path / "a.wav").subtype == "PCM_16"
    np.testing.assert_allclose(read, samples, atol=1 / 32768)
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]
