import copy
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from emotion.audio.feature_store import Features, FeatureWriter
from emotion.audio.partition import Partition
from emotion.config import MelConfig, QualityConfig
from emotion.data.leaks import identities, write_seen
from emotion.data.songs import SongLabels
from emotion.errors import DataError, Interrupted, ModelError
from emotion.gan import quality
from emotion.gan.distances import without_each_group
from emotion.gan.quality import measure_quality

Array = npt.NDArray[np.float32]
Rule = Callable[[Array, int, np.random.Generator], Array]

MEL = MelConfig(sample_rate_hz=8000, window_samples=512, hop_samples=256, mels=16, fmax_hz=4000)
CONFIG = QualityConfig(components=6)
CLIP = 40
TRAINING, VALIDATION = range(40), range(40, 60)
MEASURES = ("frechet", "kernel", "copy_rate", "diversity")


def never() -> bool:
    return False


def music(labels: Array, frames: int, rng: np.random.Generator) -> Array:
    """A song with a random spectrum in which arousal is the loudness and valence the tilt of the spectrum."""
    tilt = np.linspace(-1, 1, MEL.mels)
    spectrum = -40 + 10 * labels[1] + 6 * labels[0] * tilt + 2 * rng.standard_normal(MEL.mels)
    return np.asarray(spectrum + 3 * rng.standard_normal((frames, MEL.mels)), np.float32)


def noise(labels: Array, frames: int, rng: np.random.Generator) -> Array:
    return rng.uniform(-90, 0, (frames, MEL.mels)).astype(np.float32)


def write(out: Path, clips: Iterable[tuple[Array, Array]], real: bool = False) -> Features:
    """(labels, log-mel) of each clip or song."""
    with FeatureWriter(out, MEL) as writer:
        for number, (labels, log_mel) in enumerate(clips):
            digests = {"file_sha256": f"file {number}", "sound_sha256": f"sound {number}"} if real else {}
            writer.append(SongLabels(number, *labels.tolist(), 0.3, 0.3, f"artist {number}"), log_mel, **digests)
    write_seen(out, {"file 0"})
    return Features(out)


def generated(out: Path, clips: int, seed: int, rule: Rule = music, frames: int = CLIP, real: bool = False) -> Features:
    rng = np.random.default_rng(seed)
    labels = rng.uniform(-1, 1, (clips, 2)).astype(np.float32)
    return write(out, ((row, rule(row, frames, rng)) for row in labels), real)


def clips_of(songs: Features, positions: Iterable[int], noise_db: float = 0.0) -> list[tuple[Array, Array]]:
    """A clip from within each song, from another frame on than the crops of quality.json."""
    rng = np.random.default_rng(7)
    noise = noise_db * rng.standard_normal((len(songs.songs), CLIP, MEL.mels)).astype(np.float32)
    return [(songs.labels[index], songs.clip(index, 11, CLIP) + noise[index]) for index in positions]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Features:
    return generated(tmp_path_factory.mktemp("real"), 60, 0, frames=2 * CLIP, real=True)


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Features:
    """As good as a generator can be: clips of unknown songs."""
    return generated(tmp_path_factory.mktemp("new"), 40, 1)


def measure(
    out: Path,
    synthetic: Features,
    songs: Features,
    training: Sequence[int] = TRAINING,
    validation: Sequence[int] = VALIDATION,
    groups: Sequence[str] | None = None,
    threads: int = 1,
    should_stop: Callable[[], bool] = never,
) -> Any:
    groups = [f"artist {index}" for index in training] if groups is None else groups
    partition = Partition(songs.only(training), songs.only(validation), songs.only([]), groups, [], [])
    measure_quality(partition, synthetic=synthetic, config=CONFIG, seed=0, out=out, threads=threads, should_stop=should_stop)
    return json.loads((out / "quality.json").read_text())


@pytest.fixture(scope="module")
def of_new(real: Features, new: Features, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return measure(tmp_path_factory.mktemp("of_new"), new, real)


def contains(estimate: Any, value: float) -> bool:
    low, high = estimate["ci"]
    return bool(low < value < high)


def test_unknown_songs_are_as_close_and_as_diverse_as_training_songs_and_no_copies(of_new: Any) -> None:
    for name in ("frechet", "kernel"):
        found = of_new[name]
        assert contains(found["difference"], 0)
        apart = found["synthetic_to_validation"]["value"] - found["training_to_validation"]["value"]
        assert found["difference"]["value"] == pytest.approx(apart)
    assert contains(of_new["diversity"], 1)
    rates = of_new["copy_rate"]
    assert rates["synthetic"]["value"] <= 0.05
    assert rates["validation"]["value"] <= 0.05
    assert rates["training"]["value"] >= 0.95
    assert of_new["not_measured"] == {}


def test_noise_is_farther_from_validation_songs_than_training_songs_are(real: Features, tmp_path: Path) -> None:
    found = measure(tmp_path, generated(tmp_path / "noise", 40, 1, noise), real)
    for name in ("frechet", "kernel"):
        assert found[name]["difference"]["ci"][0] > 10 * abs(found[name]["training_to_validation"]["value"])
    assert found["copy_rate"]["synthetic"]["value"] == 0


@pytest.mark.parametrize("noise_db", [0.0, 0.3])
def test_the_copy_rate_is_the_share_of_planted_copies(real: Features, tmp_path: Path, noise_db: float) -> None:
    clips = clips_of(real, range(30), noise_db) + clips_of(real, range(50, 60))
    rates = measure(tmp_path, write(tmp_path / "copies", clips), real)["copy_rate"]
    assert rates["synthetic"]["value"] == pytest.approx(30 / 40, abs=0.1)
    assert contains(rates["synthetic"], 30 / 40)
    assert rates["validation"]["value"] <= 0.05


def test_repetitions_of_a_few_clips_have_no_diversity(real: Features, tmp_path: Path) -> None:
    few = clips_of(real, [41, 42, 43, 44])
    rng = np.random.default_rng(8)
    clips = [(labels, clip + rng.normal(0, 0.1, clip.shape).astype(np.float32)) for labels, clip in few * 10]
    found = measure(tmp_path, write(tmp_path / "collapsed", clips), real)["diversity"]
    assert 0 < found["value"] < 0.1
    assert found["ci"][1] < 0.2


def test_a_generator_that_gives_one_real_clip_for_every_label_has_no_read_back_and_no_diversity(
    real: Features, tmp_path: Path
) -> None:
    asked = np.linspace(-0.9, 0.9, 20, dtype=np.float32)
    one = real.clip(VALIDATION[0], 0, CLIP)
    found = measure(tmp_path, write(tmp_path / "one", [(np.array([label, label]), one) for label in asked]), real)
    # One clip for every label is a constant prediction, which has a CCC of 0.
    assert found["label_read_back"]["synthetic"]["arousal"]["ccc"] == pytest.approx(0, abs=1e-6)
    assert found["diversity"]["value"] == 0


def test_the_order_of_songs_and_clips_does_not_change_the_measures(
    real: Features, new: Features, of_new: Any, tmp_path: Path
) -> None:
    backward = measure(tmp_path, new.only(range(39, -1, -1)), real, TRAINING[::-1], VALIDATION[::-1])
    for name in MEASURES:
        found = numbers(backward[name])
        assert found == pytest.approx(numbers(of_new[name]), abs=1e-6)
        assert len(found) >= 3


def numbers(value: Any) -> list[float]:
    """Every number below a value, in the order of the keys."""
    if isinstance(value, dict):
        return [number for key in sorted(value) for number in numbers(value[key])]
    if isinstance(value, list):
        return [number for inner in value for number in numbers(inner)]
    return [value] if isinstance(value, float) else []


def test_each_song_counts_once_whatever_its_length(new: Features, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    labels = rng.uniform(-1, 1, (14, 2)).astype(np.float32)
    clips = [(row, music(row, CLIP * (1 + 9 * (number % 2)), rng)) for number, row in enumerate(labels)]
    found = measure(tmp_path, new, write(tmp_path / "songs", clips, real=True), range(9), range(9, 14))
    counts = {"training": 9, "validation": 5, "synthetic": 40, "training_and_synthetic_compared": 9}
    assert found["clips"] == found["clips"] | counts
    # None of five: Wilson's interval of five trials ends at z² / (5 + z²).
    assert found["copy_rate"]["validation"]["ci"] == pytest.approx([0, 3.841459 / 8.841459])


def test_too_few_songs_give_null_and_the_reason(real: Features, new: Features, tmp_path: Path) -> None:
    few = measure(tmp_path, new, real, validation=VALIDATION[:2])
    assert [few[name] is None for name in MEASURES] == [True, True, False, False]
    assert few["notebook_score"] is None
    assert few["not_measured"].keys() == {"frechet", "kernel", "notebook_score"}
    assert "4 clips" in few["not_measured"]["frechet"]
    assert few["label_read_back"]["synthetic"]["arousal"]["ccc"] > 0.8

    fewer = measure(tmp_path, new.only(range(3)), real, training=TRAINING[:3])
    assert [fewer[name] for name in MEASURES] == [None] * 4
    assert fewer["not_measured"].keys() == {*MEASURES, "notebook_score"}


def test_a_band_that_is_silent_in_real_songs_and_almost_silent_in_synthetic_clips_has_little_weight(tmp_path: Path) -> None:
    def silent(*levels_db: float) -> Rule:
        def rule(labels: Array, frames: int, rng: np.random.Generator) -> Array:
            log_mel = music(labels, frames, rng)
            log_mel[:, 0] = rng.choice(levels_db)
            return log_mel

        return rule

    # -99.9375 is the float16 next to -100.
    songs = generated(tmp_path / "songs", 60, 0, silent(-100, -99.9375), 2 * CLIP, real=True)
    found = measure(tmp_path, generated(tmp_path / "generated", 40, 1, silent(-99)), songs)
    assert contains(found["frechet"]["difference"], 0)
    assert contains(found["diversity"], 1)


def test_labels_are_read_back_from_clips_that_follow_the_rule_of_real_songs(of_new: Any) -> None:
    for clips in ("synthetic", "validation"):
        assert of_new["label_read_back"][clips]["valence"]["ccc"] > 0.8
        assert of_new["label_read_back"][clips]["arousal"]["ccc"] > 0.9


def test_labels_are_not_read_back_from_clips_with_the_labels_of_others(real: Features, new: Features, tmp_path: Path) -> None:
    # Shifted by one clip: independent of the sound, as the labels were drawn independently.
    swapped = write(tmp_path / "wrong", [(new.labels[number - 1], new.song(number)) for number in range(40)])
    read_back = measure(tmp_path, swapped, real)["label_read_back"]
    assert abs(read_back["synthetic"]["valence"]["ccc"]) < 0.5
    assert abs(read_back["synthetic"]["arousal"]["ccc"]) < 0.5
    assert read_back["validation"]["arousal"]["ccc"] > 0.9


def test_two_measurements_are_the_same_bytes(real: Features, new: Features, tmp_path: Path) -> None:
    measure(tmp_path, new.only(range(8)), real)
    first = (tmp_path / "quality.json").read_bytes()
    measure(tmp_path, new.only(range(8)), real)
    assert (tmp_path / "quality.json").read_bytes() == first


def test_the_number_of_threads_changes_no_byte(real: Features, new: Features, of_new: Any, tmp_path: Path) -> None:
    assert measure(tmp_path, new, real, threads=3) == of_new


def in_order(work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    return map(work, items)


def test_the_nearest_distances_without_a_group_are_those_of_the_remaining_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "DISTANCES_PER_BLOCK", 100)  # several blocks
    clips = np.random.default_rng(0).normal(size=(43, 5))

    def nearest(rest: Any) -> float:
        apart = np.sqrt(((rest[:, None] - rest[None]) ** 2).sum(axis=2))
        return float((apart + np.where(np.eye(len(rest)), np.inf, 0)).min(axis=1).mean())

    assert quality._nearest_distances(clips, in_order) == pytest.approx(without_each_group(nearest, clips))


def test_of_many_songs_some_are_compared(real: Features, new: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "MOST_CLIPS", 15)
    found = measure(tmp_path, new, real)
    assert found["clips"] == found["clips"] | {"training": 15, "validation": 15, "synthetic": 15}
    # Copies are looked for among all training songs.
    copies = measure(tmp_path, write(tmp_path / "copies", clips_of(real, range(40))), real)
    assert copies["copy_rate"]["synthetic"]["value"] >= 0.9


def test_cross_validation_of_the_read_back_keeps_groups_together(real: Features, new: Features, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least 2 groups"):
        measure(tmp_path, new, real, groups=["one artist"] * len(TRAINING))
    ccc = measure(tmp_path, new, real, groups=[str(index // 20) for index in TRAINING])["label_read_back"]
    assert ccc["synthetic"]["arousal"]["ccc"] > 0.9


def test_a_validation_song_among_the_training_songs_is_refused(real: Features, new: Features, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="leak"):
        measure(tmp_path, new, real, training=range(41))


def test_without_validation_songs_a_part_of_the_training_songs_takes_their_place_and_the_file_says_so(
    real: Features, new: Features, tmp_path: Path
) -> None:
    every = range(len(real.songs))
    groups = [f"artist {index // 2}" for index in every]
    (tmp_path / "new").mkdir()
    write_seen(tmp_path / "new", identities(real.songs))
    seen = copy.copy(new)
    seen.folder = tmp_path / "new"  # its generator has learnt from every song
    found = measure(tmp_path, seen, real, training=every, validation=(), groups=groups)
    assert found["clips"] == found["clips"] | {"training": 48, "validation": 12}
    assert found["not_measured"] == {}
    assert "all songs are for training" in found["validation_songs_are"]
    assert "validation_songs_are" not in measure(tmp_path, new, real)


def test_it_can_be_stopped_anywhere_and_writes_nothing_then(real: Features, new: Features, tmp_path: Path) -> None:
    asked = 0

    def count() -> bool:
        nonlocal asked
        asked += 1
        return False

    measure(tmp_path, new, real, should_stop=count)
    (tmp_path / "quality.json").unlink()
    for questions in (0, asked // 2, asked - 1):
        answers = iter([False] * questions)
        with pytest.raises(Interrupted):
            measure(tmp_path, new, real, should_stop=lambda answers=answers: next(answers, True))  # type: ignore[misc]
        assert not (tmp_path / "quality.json").exists()
