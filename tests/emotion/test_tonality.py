import numpy as np
import pytest

from emotion.audio.tonality import A4_CLASS, CLASSES, TONALITY_NUMBERS, ChromaStream, pitch_class_filters, tonality

RATE = 22050
C, D, E, F, G, A, B = 0, 2, 4, 5, 7, 9, 11
MAJOR_CHORDS, MINOR_CHORDS = ((C, E, G), (F, A, C), (G, B, D), (C, E, G)), ((A, C, E), (D, F, A), (E, G, B), (A, C, E))
CADENCE_MINOR = ((A, C, E), (D, F, A), (E, 8, B), (A, C, E))
DIFFERENCE = 2  # best correlation with a major key minus that with a minor key
TURNED = slice(12, 24)


def chroma_of(samples: np.ndarray) -> tuple[np.ndarray, float]:
    stream = ChromaStream(RATE)
    stream.add(samples.astype(np.float32))
    return stream.finish(), stream.frames_per_second


def vector(samples: np.ndarray) -> np.ndarray:
    return tonality(*chroma_of(samples))


def sound(chords: tuple[tuple[int, ...], ...], shift: int = 0, seconds: float = 2.0) -> np.ndarray:
    """Each chord for some seconds, its notes in the octave from C4 on, with two overtones."""
    time = np.arange(int(seconds * RATE)) / RATE
    parts = []
    for chord in chords:
        hz = [440 * 2 ** ((pitch - A4_CLASS + shift) / 12) for pitch in chord]
        parts.append(sum(np.sin(2 * np.pi * f * k * time) / k for f in hz for k in (1, 2, 3)))
    return 0.05 * np.concatenate(parts)


@pytest.mark.parametrize(("hz", "expected"), [(440.0, A), (261.63, C), (1567.98, G), (369.99, 6)])
def test_a_tone_is_in_its_pitch_class(hz: float, expected: int) -> None:
    chroma, _ = chroma_of(np.sin(2 * np.pi * hz * np.arange(RATE) / RATE))
    mean = chroma.mean(axis=0)
    assert mean.argmax() == expected
    assert mean[expected] > 0.5 * mean.sum()


def test_each_frequency_is_shared_among_pitch_classes_and_none_is_lost() -> None:
    filters = pitch_class_filters(RATE, 4096)
    hz = np.fft.rfftfreq(4096, 1 / RATE)
    inside = (hz >= 60) & (hz <= 5000)
    np.testing.assert_allclose(filters[:, inside].sum(axis=0), 1, rtol=1e-6)
    assert not filters[:, ~inside].any()


def test_major_and_minor_chords_are_told_apart() -> None:
    assert vector(sound(MAJOR_CHORDS))[DIFFERENCE] > 0.05
    assert vector(sound(CADENCE_MINOR))[DIFFERENCE] < -0.02


def test_a_transposed_song_has_nearly_the_same_numbers_and_another_mode_has_not() -> None:
    original, transposed, other = vector(sound(MAJOR_CHORDS)), vector(sound(MAJOR_CHORDS, shift=3)), vector(sound(MINOR_CHORDS))
    assert np.abs(original - transposed).max() < 0.06
    assert np.abs(original - other).max() > 0.2
    assert original[TURNED].sum() == pytest.approx(1, abs=1e-5)
    # In C major, C and G are loud, and C sharp is not.
    assert original[TURNED][[C, G]].min() > 3 * original[TURNED][1]


def test_loudness_changes_nothing() -> None:
    song = sound(MAJOR_CHORDS)
    np.testing.assert_allclose(vector(song), vector(0.1 * song), atol=1e-4)


@pytest.mark.parametrize("samples", [0, 1, 4095, 4096, 8191, 131_000, 131_071, 131_072, 131_073, 300_000])
def test_blocks_change_no_bit_and_every_hop_has_a_frame(samples: int) -> None:
    song = np.random.default_rng(0).normal(0, 0.1, samples).astype(np.float32)
    whole, _ = chroma_of(song)
    stream = ChromaStream(RATE)
    for first in range(0, samples, 7001):
        stream.add(song[first : first + 7001])
    assert stream.finish().tobytes() == whole.tobytes()
    assert whole.shape == (1 + samples // 4096, CLASSES)


@pytest.mark.parametrize("seconds", [0.0, 0.01, 1.0, 7.0])
def test_silence_and_short_sounds_have_finite_numbers(seconds: float) -> None:
    numbers = vector(np.zeros(int(seconds * RATE)))
    assert numbers.shape == (TONALITY_NUMBERS,)
    assert numbers.dtype == np.float32
    assert np.isfinite(numbers).all()
    assert np.isfinite(vector(sound(MAJOR_CHORDS, seconds=seconds))).all()


def test_the_window_lasts_as_long_at_any_sample_rate() -> None:
    assert {rate: ChromaStream(rate).window_samples for rate in (11025, 22050, 44100)} == {11025: 2048, 22050: 4096, 44100: 8192}
