import json
from dataclasses import replace

import numpy as np
import pytest

from emotion.errors import DataError
from emotion.evaluation.boosting import BoostedTrees
from emotion.evaluation.regressors import KernelRegressor, LinearRegressor, Scaling
from emotion.evaluation.stack import Blend, Prior, Stack, blended, fit_share, fit_slope, read_stack, write_stack
from tests.emotion.trainings import plain_blend

SONGS = 4000
GROUPS = [str(song) for song in range(SONGS)]


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def test_the_share_of_two_equally_noisy_predictors_is_a_half():
    truth = normal(0, SONGS)
    share = fit_share(truth + normal(1, SONGS), truth + normal(2, SONGS), truth, groups=GROUPS, prior=Prior(0.0))
    assert share == pytest.approx(0.5, abs=0.05)


def test_the_share_follows_the_inverse_variances():
    # Independent errors of variances 4 and 1: the best share of the second is 4 / (4 + 1).
    truth = normal(3, SONGS)
    share = fit_share(truth + 2 * normal(4, SONGS), truth + normal(5, SONGS), truth, groups=GROUPS, prior=Prior(0.0))
    assert share == pytest.approx(0.8, abs=0.05)


def test_noise_beside_a_good_predictor_gets_no_share_and_the_good_one_beside_noise_all():
    truth = normal(6, SONGS)
    good, noise = truth + 0.1 * normal(7, SONGS), normal(8, SONGS)
    assert fit_share(good, noise, truth, groups=GROUPS, prior=Prior(0.0)) == pytest.approx(0, abs=0.02)
    assert fit_share(noise, good, truth, groups=GROUPS, prior=Prior(0.0)) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("prior", [0.0, 0.5])
def test_a_share_that_few_songs_suggest_by_chance_stays_near_the_prior(prior):
    distances = []
    for seed in range(200):
        truth = normal(seed, 8)
        equal = truth + normal(seed + 1000, 8), truth + normal(seed + 2000, 8)
        second = equal[1] if prior else normal(seed + 3000, 8)  # nothing but noise where the prior is 0
        first = equal[0] if prior else truth + 0.7 * normal(seed + 4000, 8)
        distances.append(abs(fit_share(first, second, truth, groups=GROUPS[:8], prior=Prior(prior)) - prior))
    assert np.median(distances) == 0
    assert np.mean(distances) < 0.1


@pytest.mark.parametrize("confidence", [0.95, 0.99])
@pytest.mark.parametrize("groups", [3, 5, 30])
def test_with_any_number_of_groups_noise_seldom_gets_a_share(groups, confidence):
    # The second agrees with the first but for noise that knows nothing of the truth, so the best share of it is 0. By a 95 %
    # interval 2.5 % are above it by chance; by two standard errors, whatever the number of groups, 9 % would be with three.
    found = []
    for seed in range(1000):
        truth, first = normal(seed, groups), normal(seed + 5000, groups)
        second = first + normal(seed + 9000, groups)
        found.append(fit_share(first, second, truth, groups=GROUPS[:groups], prior=Prior(0.0, confidence)))
    by_chance = (1 - confidence) / 2
    assert np.mean(np.array(found) > 0) == pytest.approx(by_chance, abs=0.4 * by_chance + 0.01)


def test_songs_of_one_group_count_as_one_observation():
    # Sixteen songs, each 250 times. As single songs they are many and the share is sure; as groups they are 16.
    truth = np.repeat(normal(9, 16), 250)
    first, second = truth + np.repeat(normal(10, 16), 250), truth + np.repeat(normal(11, 16), 250)
    sure = fit_share(first, second, truth, groups=GROUPS, prior=Prior(0.0))
    unsure = fit_share(first, second, truth, groups=[str(song // 250) for song in range(SONGS)], prior=Prior(0.0))
    alone = fit_share(first[::250], second[::250], truth[::250], groups=GROUPS[:16], prior=Prior(0.0))
    assert unsure == pytest.approx(alone)
    assert sure > unsure + 0.05


@pytest.mark.parametrize("prior", [0.0, 0.5])
def test_predictors_that_agree_and_two_groups_give_the_prior(prior):
    truth, first = normal(12, 20), normal(13, 20)
    assert fit_share(first, first, truth, groups=GROUPS[:20], prior=Prior(prior)) == prior
    assert fit_share(first, truth, truth, groups=["a", "b"] * 10, prior=Prior(prior)) == prior


def test_a_perfect_predictor_gets_all_without_a_division_by_zero():
    truth = normal(14, 20)
    assert fit_share(normal(15, 20), truth, truth, groups=GROUPS[:20], prior=Prior(0.5)) == 1.0


def noisy_views(songs: int, predictors: int, seed: int):
    """Labels of variance 1, and the best predictors of them by one noisy view each, with noise of variance 1."""
    truth = normal(seed, songs)
    views = truth + normal(seed + 1, predictors, songs)
    return truth, views / 2  # E[truth | view]: calibrated, of variance 1/2


def test_the_blend_of_calibrated_predictors_is_stretched_to_be_calibrated():
    # Covariance of the truth with the mean of three: 1/2. Its variance: 1/4 + 1/12 = 1/3. So the slope is 3/2.
    truth, members = noisy_views(SONGS, 3, 30)
    assert fit_slope(members, np.full(3, 1 / 3), truth, groups=GROUPS) == pytest.approx(1.5, abs=0.05)
    # A single member is calibrated already.
    assert fit_slope(members, np.array([0.0, 1.0, 0.0]), truth, groups=GROUPS) == pytest.approx(1, abs=0.05)


def test_few_songs_do_not_change_the_slope_by_chance():
    found = []
    for seed in range(100):
        truth, members = noisy_views(12, 3, 3 * seed)
        shares = np.full(3, 1 / 3)
        calibrated = members.var(axis=1).mean() / (shares @ members).var()
        found.append(fit_slope(members, shares, truth, groups=GROUPS[:12]) / calibrated)
    assert np.median(found) == pytest.approx(1)
    assert np.mean(found) == pytest.approx(1, abs=0.05)


def test_the_blend_of_members_that_have_learned_nothing_shrinks_to_its_mean():
    members, truth = normal(40, 3, 60), normal(41, 60)
    assert fit_slope(members, np.full(3, 1 / 3), truth, groups=GROUPS[:60]) < 0.5
    # Opposite members: their blend hardly varies. Stretched, it varies as much as the labels at most.
    opposite = np.stack([members[0], -members[0], 1e-9 * members[1]])
    blend = np.full(3, 1 / 3) @ opposite
    assert fit_slope(opposite, np.full(3, 1 / 3), truth, groups=["a", "b"] * 30) * blend.std() == pytest.approx(truth.std())
    constant = np.full((3, 60), 0.1)
    assert fit_slope(constant, np.full(3, 1 / 3), truth, groups=GROUPS[:60]) == 1


def stack() -> Stack:
    scaling = Scaling(normal(20, 6), np.abs(normal(21, 6)) + 0.5)
    ridge = LinearRegressor(scaling, 0.1 * normal(22, 6, 2), np.array([0.1, -0.2]))
    svr = KernelRegressor(scaling, normal(23, 9, 6), 0.1 * normal(24, 9, 2), np.array([0.3, 0.0]), np.array([0.05, 0.2]))
    centre, slope = np.array([0.1, 0.0]), np.array([1.5, 1.0])
    blend = Blend(np.array([0.25, 1.0]), np.array([0.2, 0.0]), centre, slope, model_share=np.array([0.5, 0.0]))
    return Stack(ridge, svr, one_split(), blend)


def one_split() -> BoostedTrees:
    """One tree per dimension: valence 0.4 where the first feature is 0 or less, else 0.6; arousal 0."""
    nodes = np.tile(np.arange(3, dtype=np.int32), (2, 1, 1))
    left, right = nodes.copy(), nodes.copy()
    left[0, 0, 0], right[0, 0, 0] = 1, 2
    value = np.array([[[0, 0.3, 0.5]], [[0, 0, 0]]])
    return BoostedTrees(np.array([0.1, 0.0]), np.zeros_like(nodes), np.zeros((2, 1, 3)), left, right, value)


def test_a_prediction_is_the_blend_of_its_members():
    pooled, model = normal(25, 3, 6), np.full((3, 2), 0.5)
    ridge, svr, boosting = stack().baselines(pooled).values()
    np.testing.assert_allclose(boosting, [[0.4 if row[0] <= 0 else 0.6, 0] for row in pooled])
    valence = 0.8 * (0.75 * ridge[:, 0] + 0.25 * svr[:, 0]) + 0.2 * boosting[:, 0]
    stretched = 0.1 + 1.5 * (valence - 0.1)
    expected = np.column_stack([0.5 * stretched + 0.25, svr[:, 1]])
    np.testing.assert_allclose(stack().predict(pooled, model), expected.clip(-1, 1), rtol=1e-12)
    np.testing.assert_allclose(blended(model, ridge, np.array([0.0, 1.0])), np.column_stack([model[:, 0], ridge[:, 1]]))


def test_predictions_stay_within_the_scale():
    far = Stack(stack().ridge, stack().svr, one_split(), plain_blend(model_share=1))
    np.testing.assert_array_equal(far.predict(normal(26, 2, 6), np.array([[3.0, -3.0], [0.5, -0.5]])), [[1, -1], [0.5, -0.5]])


def test_a_stack_read_back_predicts_the_same_bytes(tmp_path):
    write_stack(stack(), tmp_path)
    pooled, model = normal(27, 5, 6), normal(28, 5, 2)
    assert read_stack(tmp_path).predict(pooled, model).tobytes() == stack().predict(pooled, model).tobytes()


def test_a_stack_of_an_earlier_version_without_slopes_is_not_stretched(tmp_path):
    write_stack(stack(), tmp_path)
    content = json.loads((tmp_path / "stack.json").read_text())
    for shares in content.values():
        del shares["centre"], shares["slope"]
    (tmp_path / "stack.json").write_text(json.dumps(content))
    pooled, model = normal(27, 5, 6), normal(28, 5, 2)
    plain = Stack(stack().ridge, stack().svr, one_split(), replace(stack().blend, centre=np.zeros(2), slope=np.ones(2)))
    np.testing.assert_array_equal(read_stack(tmp_path).predict(pooled, model), plain.predict(pooled, model))


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1" + 400 * "0", "[1]", '"1"', "null"])
def test_a_number_of_the_blend_that_is_none_is_a_fault_of_the_data(tmp_path, value):
    write_stack(stack(), tmp_path)
    text = (tmp_path / "stack.json").read_text(encoding="utf-8")
    (tmp_path / "stack.json").write_text(text.replace("1.5", value), encoding="utf-8")
    with pytest.raises(DataError, match="expected a stack"):
        read_stack(tmp_path)


def test_a_centre_without_a_slope_is_a_fault_of_the_data(tmp_path):
    write_stack(stack(), tmp_path)
    content = json.loads((tmp_path / "stack.json").read_text())
    del content["valence"]["slope"]
    (tmp_path / "stack.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="expected a stack"):
        read_stack(tmp_path)


@pytest.mark.parametrize("damage", ["no folder", "no weights", "cut weights", "no shares", "other shares"])
def test_a_missing_or_damaged_stack_is_a_fault_of_the_data(tmp_path, damage):
    folder = tmp_path / "stack"
    if damage != "no folder":
        write_stack(stack(), folder)
    if damage == "no weights":
        (folder / "stack.safetensors").unlink()
    if damage == "cut weights":
        content = (folder / "stack.safetensors").read_bytes()
        (folder / "stack.safetensors").write_bytes(content[:-7])
    if damage == "no shares":
        (folder / "stack.json").unlink()
    if damage == "other shares":
        (folder / "stack.json").write_text('{"valence": 1}', encoding="utf-8")
    with pytest.raises(DataError, match="expected a stack"):
        read_stack(folder)
