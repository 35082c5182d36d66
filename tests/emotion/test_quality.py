import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from emotion.config import MelConfig, QualityConfig
from emotion.errors import DataError, Interrupted
from emotion.features import Features, FeatureWriter
from emotion.quality import measure_quality

Array = npt.NDArray[np.float32]
Rule = Callable[[Array, int, np.random.Generator], Array]

MEL = MelConfig(sample_rate_hz=8000, window_samples=512, hop_samples=256, mels=16, fmax_hz=4000)
CONFIG = QualityConfig(components=6, kernel_subsets=5)
CLIP = 40
TRAINING, VALIDATION, TEST = range(40), range(40, 60), range(60, 65)


def never() -> bool:
    return False


def music(labels: Array, frames: int, rng: np.random.Generator) -> Array:
    """A rule that can be heard: arousal is loudness, valence is the tilt of the spectrum."""
    tilt = np.linspace(-1, 1, MEL.mels)
    log_mel = -40 + 10 * labels[1] + 6 * labels[0] * tilt + 3 * rng.standard_normal((frames, MEL.mels))
    return np.asarray(log_mel, np.float32)


def noise(labels: Array, frames: int, rng: np.random.Generator) -> Array:
    return rng.uniform(-90, 0, (frames, MEL.mels)).astype(np.float32)


def write(out: Path, clips: Iterable[tuple[Array, Array]]) -> Features:
    """(labels, log-mel) of each clip."""
    with FeatureWriter(out, MEL) as writer:
        for number, (labels, log_mel) in enumerate(clips):
            writer.append(number, float(labels[0]), float(labels[1]), 0.3, 0.3, f"artist {number}", log_mel)
    return Features(out)


def made(out: Path, clips: int, seed: int, rule: Rule = music, frames: int = CLIP) -> Features:
    rng = np.random.default_rng(seed)
    labels = rng.uniform(-1, 1, (clips, 2)).astype(np.float32)
    return write(out, ((row, rule(row, frames, rng)) for row in labels))


@pytest.fixture(scope="module")
def real_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    made(folder, 65, 0, frames=2 * CLIP)
    return folder


@pytest.fixture(scope="module")
def real(real_folder: Path) -> Features:
    return Features(real_folder)


@pytest.fixture
def measured(real: Features, tmp_path: Path) -> Callable[..., Any]:
    def measure(
        synthetic: Features,
        features: Features = real,
        validation: Iterable[int] = VALIDATION,
        units: Sequence[str] | None = None,
        should_stop: Callable[[], bool] = never,
    ) -> Any:
        measure_quality(
            real=features,
            training=TRAINING,
            validation=list(validation),
            units=[song.group for song in features.songs] if units is None else units,
            synthetic=synthetic,
            config=CONFIG,
            seed=0,
            out=tmp_path,
            should_stop=should_stop,
        )
        return json.loads((tmp_path / "quality.json").read_text())

    return measure


def test_clips_of_the_validation_songs_are_nearest_new_songs_near_the_anchor_and_noise_far_away(
    real: Features, measured: Callable[..., Any], tmp_path: Path
) -> None:
    # Songs of two clips' length are heard as these two clips.
    halves = [(real.labels[index], real.clip(index, start, CLIP)) for index in VALIDATION for start in (0, CLIP)]
    same = measured(write(tmp_path / "same", halves))
    new = measured(made(tmp_path / "new", 40, 1))
    noisy = measured(made(tmp_path / "noise", 40, 1, noise))
    assert same["clips"] == {"training": 80, "validation": 40, "synthetic": 40}
    assert same["frechet"]["synthetic_to_validation"] == pytest.approx(0, abs=1e-9)
    assert same["notebook_score"]["overall"] == pytest.approx(100)

    anchor = same["frechet"]["training_to_validation"]
    assert new["frechet"]["training_to_validation"] == noisy["frechet"]["training_to_validation"] == anchor
    assert new["frechet"]["synthetic_to_validation"] < 3 * anchor
    assert noisy["frechet"]["synthetic_to_validation"] > 100 * anchor
    same_kernel, new_kernel, noisy_kernel = (
        result["kernel"]["synthetic_to_validation"]["mean"] for result in (same, new, noisy)
    )
    assert same_kernel < new_kernel < noisy_kernel / 100


def test_labels_are_read_back_from_clips_that_follow_the_rule_of_real_ones(
    measured: Callable[..., Any], tmp_path: Path
) -> None:
    read_back = measured(made(tmp_path / "made", 30, 1))["label_read_back"]
    for clips in ("synthetic", "validation"):
        assert read_back[clips]["valence"]["ccc"] > 0.9
        assert read_back[clips]["arousal"]["ccc"] > 0.9


def test_labels_are_not_read_back_from_clips_with_other_clips_labels(
    measured: Callable[..., Any], tmp_path: Path
) -> None:
    right = made(tmp_path / "right", 30, 1)
    # Moved by one place: independent of what is heard, as the labels were drawn independently.
    swapped = write(tmp_path / "wrong", [(right.labels[number - 1], right.song(number)) for number in range(30)])
    read_back = measured(swapped)["label_read_back"]
    assert abs(read_back["synthetic"]["valence"]["ccc"]) < 0.5
    assert abs(read_back["synthetic"]["arousal"]["ccc"]) < 0.5
    assert read_back["validation"]["arousal"]["ccc"] > 0.9


def test_a_generator_that_ignores_the_label_is_caught_though_its_clips_are_real(
    real: Features, measured: Callable[..., Any], tmp_path: Path
) -> None:
    asked = np.linspace(-0.9, 0.9, 20, dtype=np.float32)
    one = real.clip(VALIDATION[0], 0, CLIP)
    read_back = measured(write(tmp_path / "one", [(np.array([label, label]), one) for label in asked]))
    # One clip for every label is a constant prediction, which has a CCC of 0.
    assert read_back["label_read_back"]["synthetic"]["arousal"]["ccc"] == pytest.approx(0, abs=1e-6)


def test_songs_of_the_test_set_are_never_opened(
    real_folder: Path, measured: Callable[..., Any], tmp_path: Path
) -> None:
    asked: set[int] = set()

    class Watched(Features):
        def clip(self, index: int, start: int, frames: int) -> Array:
            asked.add(index)
            return super().clip(index, start, frames)

        def song(self, index: int) -> Array:
            asked.add(index)
            return super().song(index)

    measured(made(tmp_path / "made", 8, 1), features=Watched(real_folder))
    assert asked == {*TRAINING, *VALIDATION}


def test_too_few_clips_for_a_kernel_distance_give_null(measured: Callable[..., Any], tmp_path: Path) -> None:
    kernel = measured(made(tmp_path / "made", 3, 1))["kernel"]
    assert kernel["synthetic_to_validation"] is None
    assert kernel["training_to_validation"] is not None
    kernel = measured(made(tmp_path / "more", 8, 1), validation=VALIDATION[:1])["kernel"]
    assert kernel == {"synthetic_to_validation": None, "training_to_validation": None}


def test_two_measurements_are_the_same_bytes(measured: Callable[..., Any], tmp_path: Path) -> None:
    synthetic = made(tmp_path / "made", 8, 1)
    measured(synthetic)
    first = (tmp_path / "quality.json").read_bytes()
    measured(synthetic)
    assert (tmp_path / "quality.json").read_bytes() == first


def test_the_read_back_is_tuned_across_units_and_not_across_groups(
    real: Features, measured: Callable[..., Any], tmp_path: Path
) -> None:
    synthetic = made(tmp_path / "made", 8, 1)
    with pytest.raises(DataError, match="at least 2 groups"):
        measured(synthetic, units=["one artist"] * len(real.songs))
    ccc = measured(synthetic, units=[str(index // 20) for index in range(len(real.songs))])["label_read_back"]
    assert ccc["synthetic"]["arousal"]["ccc"] > 0.9


def test_asked_to_stop_it_stops_and_writes_nothing(measured: Callable[..., Any], tmp_path: Path) -> None:
    synthetic = made(tmp_path / "made", 3, 1)
    # It asks at each of 40 training, 20 validation and 3 synthetic songs.
    answers = iter([False] * 62)
    with pytest.raises(Interrupted):
        measured(synthetic, should_stop=lambda: next(answers, True))
    assert not (tmp_path / "quality.json").exists()
