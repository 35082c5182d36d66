import numpy as np
import pytest

from emotion.evaluation.listeners import RatingVariances, listener_scores, rating_variances
from emotion.evaluation.metrics import ceiling, concordance

SHARED, LISTENER, SONGS = 0.16, 0.25, 60_000
RATERS = np.where(np.arange(SONGS) % 2, 10, 4)


def simulated(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ratings [songs, 10] of which those beyond a song's raters are NaN, and the true means [songs]."""
    random = np.random.default_rng(seed)
    true = random.normal(0.1, SHARED**0.5, SONGS)
    ratings = true[:, None] + random.normal(0, LISTENER**0.5, (SONGS, 10))
    ratings[np.arange(10) >= RATERS[:, None]] = np.nan
    return ratings, true


def test_variances_are_found_from_means_and_deviations_alone() -> None:
    ratings, _ = simulated()
    found = rating_variances(np.nanmean(ratings, axis=1), np.nanstd(ratings, axis=1), RATERS)
    assert found.shared == pytest.approx(SHARED, rel=0.02)
    assert found.listener == pytest.approx(LISTENER, rel=0.02)
    assert found.label == pytest.approx(LISTENER * (1 / 10 + 1 / 4) / 2, rel=0.02)


def test_one_listener_scores_against_the_others_what_the_simulation_scores() -> None:
    ratings, _ = simulated(1)
    found = rating_variances(np.nanmean(ratings, axis=1), np.nanstd(ratings, axis=1), RATERS)
    measured = concordance(ratings[:, 0], np.nanmean(ratings[:, 1:], axis=1))
    assert found.single_listener_ccc() == pytest.approx(measured, abs=0.01)
    # Not against a mean that has the listener's own rating in it.
    assert concordance(ratings[:, 0], np.nanmean(ratings, axis=1)) > measured + 0.05


@pytest.mark.parametrize("listeners", [1, 3, 12])
def test_the_mean_of_other_listeners_is_worth_their_number(listeners: int) -> None:
    ratings, true = simulated(2)
    labels = np.nanmean(ratings, axis=1)
    panel = true + np.random.default_rng(3).normal(0, (LISTENER / listeners) ** 0.5, SONGS)
    found = rating_variances(labels, np.nanstd(ratings, axis=1), RATERS)
    assert found.listeners_of(concordance(panel, labels)) == pytest.approx(listeners, rel=0.05)


def test_the_number_of_listeners_is_that_worked_out_by_hand() -> None:
    # T = 1, E = 2, E / n = 1/2. ccc(k) = 2 / (2.5 + 2 / k): 4 / 9 for one listener, 4 / 7 for two, 0.8 for all.
    found = RatingVariances(shared=1, listener=2, label=0.5, others=2 / 3)
    assert found.listeners_of(4 / 9) == pytest.approx(1)
    assert found.listeners_of(4 / 7) == pytest.approx(2)
    assert found.listeners_of(0.0) == found.listeners_of(-0.3) == 0
    assert found.listeners_of(0.8 + 1e-9) is found.listeners_of(0.95) is found.listeners_of(None) is None
    assert found.single_listener_ccc() == pytest.approx(2 / (2 + 2 + 2 / 3))


def test_very_many_listeners_score_a_little_less_than_the_ceiling() -> None:
    ratings, _ = simulated(4)
    labels, deviations = (of(ratings, axis=1)[:, None].repeat(2, axis=1) for of in (np.nanmean, np.nanstd))
    reliability = ceiling(labels, deviations, RATERS - 1)["arousal"]["reliability"]
    highest = 2 * reliability / (1 + reliability)
    assert highest < ceiling(labels, deviations, RATERS - 1)["arousal"]["ccc"]
    found = rating_variances(labels[:, 0], deviations[:, 0], RATERS)
    assert found.all_listeners_ccc() == pytest.approx(highest)
    assert found.listeners_of(highest - 1e-5) > 1000  # type: ignore[operator]
    assert found.listeners_of(highest + 1e-5) is None


def test_labels_of_noise_alone_have_no_score_of_a_listener() -> None:
    found = rating_variances(np.array([0.1, -0.1, 0.1, -0.1]), np.full(4, 0.9), np.full(4, 5))
    assert found.shared == found.single_listener_ccc() == 0
    assert found.listeners_of(0.2) is None


def test_the_interval_of_the_ccc_becomes_one_of_listeners() -> None:
    labels = np.array([[0.5, 0.5], [-0.5, -0.5]] * 4)
    scored = {"ccc": 0.5, "ccc_ci": [-0.1, 0.9999]}
    found = listener_scores(labels, np.full((8, 2), 0.6), np.full(8, 10), {"stack": {"valence": scored, "arousal": scored}})
    # E / n = 0.36 / 9 = 0.04, E = 0.4, T = 0.25 - 0.04; k = E / (2 T (1 / 0.5 - 1) - E / n).
    worth = found["valence"]["listener_equivalents"]["stack"]
    assert worth["value"] == pytest.approx(0.4 / (2 * 0.21 - 0.04))
    assert worth["ci"] == [0, None]
    assert found["arousal"]["single_listener_ccc"] == pytest.approx(0.42 / (0.42 + 0.4 + 0.4 / 9))
