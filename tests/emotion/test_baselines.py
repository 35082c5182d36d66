import csv
import warnings
from pathlib import Path

import numpy as np
import pytest

from emotion.errors import DataError, Interrupted
from emotion.evaluation import boosting, regressors
from emotion.evaluation.boosting import fit_boosting
from emotion.evaluation.evaluate import mean_label
from emotion.evaluation.metrics import concordance, metric
from emotion.evaluation.regressors import fit_ridge, fit_svr, grouped_folds

NAMES = ["constant", "ridge", "svr", "boosting"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """With more threads the trees take minutes on a busy machine, as the threads wait for each other at every node."""
    import sklearn.ensemble  # noqa: F401  only what is loaded can be limited
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    with threadpool_limits(1, user_api="openmp"):
        yield


@pytest.fixture
def few_trees(monkeypatch):
    """For what does not depend on their number: all of them take a second."""
    monkeypatch.setattr(boosting, "TREES", 20)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def no_stop():
    pass


IN_ONE_THREAD = {"threads": 1, "check_stop": no_stop}


def fitted(x, labels, groups, new, seed=0, threads=1, check_stop=no_stop, names=NAMES):
    """Predictions for `new` by each of these baselines, fitted to x and labels."""
    folds = grouped_folds(groups, seed)
    fit = {
        "constant": lambda: mean_label(labels, len(new)),
        "ridge": lambda: fit_ridge(x, labels, folds)[0].predict(new),
        "svr": lambda: fit_svr(x, labels, folds, seed=seed, threads=threads, check_stop=check_stop)[0].predict(new),
        "boosting": lambda: fit_boosting(x, labels, folds, seed=seed, threads=threads, check_stop=check_stop)[0].predict(new),
    }
    return {name: fit[name]() for name in names}


def boosted(x, labels, seed=0):
    """Trees fitted to all songs; no song is held out."""
    return fit_boosting(x, labels, [], seed=seed, **IN_ONE_THREAD)[0]


def groups_of(songs: int) -> list[str]:
    return [f"artist {song // 2}" for song in range(songs)]


def test_the_constant_is_the_mean_training_label():
    labels = normal(0, 30, 2)
    predicted = fitted(normal(1, 30, 4), labels, groups_of(30), normal(2, 7, 4), names=["constant"])["constant"]
    np.testing.assert_allclose(predicted, [labels.mean(axis=0)] * 7)


def test_ridge_finds_a_plane_for_features_in_any_unit():
    units = np.array([1e-6, 1.0, 1e5])
    x, new = np.random.default_rng(3).uniform(-1, 1, (80, 3)), np.random.default_rng(4).uniform(-1, 1, (9, 3))
    plane = np.array([[0.2, -0.1], [0.1, 0.3], [0.0, 0.2]])
    predicted = fitted(x * units, x @ plane + 0.1, groups_of(80), new * units, names=["ridge"])["ridge"]
    np.testing.assert_allclose(predicted, new @ plane + 0.1, atol=0.003)


def test_svr_fits_a_curve_that_ridge_cannot():
    x, new = normal(8, 200, 2), normal(9, 100, 2)

    def curve(z):
        return np.column_stack([np.abs(z[:, 0]), z[:, 0] * z[:, 1]]) * 0.3

    predicted = fitted(x, curve(x), groups_of(200), new, names=["ridge", "svr"])
    for column in range(2):
        actual = curve(new)[:, column]
        assert concordance(predicted["svr"][:, column], actual) > 0.6
        assert concordance(predicted["ridge"][:, column], actual) < 0.3


def test_boosting_fits_steps_and_interactions_that_ridge_cannot():
    rng = np.random.default_rng(42)
    x, new = rng.uniform(-1, 1, (300, 3)), rng.choice([-0.8, -0.2, 0.2, 0.8], (60, 3))

    def steps(z):
        return np.column_stack([np.where(np.abs(z[:, 0]) < 0.5, 0.4, -0.2), 0.3 * np.sign(z[:, 1] * z[:, 2])])

    predicted = fitted(x, steps(x), groups_of(300), new, names=["ridge", "boosting"])
    for column in range(2):
        actual = steps(new)[:, column]
        assert concordance(predicted["boosting"][:, column], actual) > 0.9
        assert abs(concordance(predicted["ridge"][:, column], actual)) < 0.1


def test_boosting_predicts_the_mean_for_identical_features_and_for_fewer_than_ten_songs():
    labels, new = normal(43, 40, 2), normal(44, 6, 30)
    alike = boosted(np.full((40, 30), 0.1), labels).predict(new)
    np.testing.assert_allclose(alike, np.tile(labels.mean(axis=0), (6, 1)))
    few = boosted(normal(45, 5, 30), labels[:5]).predict(new)
    np.testing.assert_allclose(few, np.tile(labels[:5].mean(axis=0), (6, 1)))


@pytest.mark.usefixtures("few_trees")
def test_the_number_of_threads_changes_no_byte():
    x, labels, new = normal(46, 60, 12), normal(47, 60, 2), normal(48, 9, 12)
    one, three = (fitted(x, labels, groups_of(60), new, seed=3, threads=threads) for threads in (1, 3))
    assert {name: predicted.tobytes() for name, predicted in one.items()} == {
        name: predicted.tobytes() for name, predicted in three.items()
    }


@pytest.mark.usefixtures("few_trees")
def test_a_stop_is_asked_for_within_each_baseline_that_takes_long():
    stages = []

    def fit_until(question: int) -> int:
        """How many questions were asked."""
        asked = 0

        def check_stop() -> None:
            nonlocal asked
            asked += 1
            if asked == question:
                raise Interrupted("enough")

        try:
            fitted(normal(61, 30, 4), normal(62, 30, 2), groups_of(30), normal(63, 3, 4), check_stop=check_stop)
        except Interrupted:
            stages.append(asked)
        return asked

    # 5 folds, 2 dimensions, 3 gammas and 4 penalties of SVR; 5 folds and all, 2 dimensions of boosting.
    questions = fit_until(-1)
    assert questions >= 5 * 2 * 3 * 4 + 6 * 2
    assert fit_until(questions // 2) == questions // 2
    assert fit_until(questions) == questions
    assert stages == [questions // 2, questions]


def test_svr_of_many_songs_is_fitted_to_some_of_them_in_the_folds_of_all(monkeypatch):
    x, labels, new = normal(64, 90, 3), normal(65, 90, 2), normal(66, 5, 3)
    groups = groups_of(90)
    monkeypatch.setattr(regressors, "MOST_SVR_ROWS", 40)
    fitted_to_some, held_out_predictions = fit_svr(x, labels, grouped_folds(groups, seed=1), seed=1, **IN_ONE_THREAD)
    found = fitted_to_some.predict(new)
    chosen = np.sort(np.random.Generator(np.random.PCG64(1)).permutation(90)[:40])
    folds = []
    for _, held_out in grouped_folds(groups, seed=1):
        inside = np.isin(chosen, held_out)
        folds.append((np.flatnonzero(~inside), np.flatnonzero(inside)))
    monkeypatch.undo()
    expected, of_chosen = fit_svr(x[chosen], labels[chosen], folds, seed=1, **IN_ONE_THREAD)
    np.testing.assert_array_equal(found, expected.predict(new))
    np.testing.assert_array_equal(held_out_predictions[chosen], of_chosen)
    assert np.isnan(np.delete(held_out_predictions, chosen, axis=0)).all()
    assert not np.array_equal(fitted(x, labels, groups, new, seed=1, names=["svr"])["svr"], found)


def test_boosting_depends_on_the_seed_which_may_exceed_32_bits():
    x, labels, new = normal(49, 20, 20), normal(50, 20, 2), normal(51, 6, 20)
    first, again, other = (boosted(x, labels, seed).predict(new) for seed in (2**40, 2**40, 7))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.usefixtures("few_trees")
def test_the_arrays_of_boosting_predict_as_scikit_learn_does_and_songs_are_held_out_by_fold():
    from sklearn.ensemble import HistGradientBoostingRegressor

    x, labels, new = normal(67, 70, 5), normal(68, 70, 2), np.round(normal(69, 40, 5), 1)
    folds = grouped_folds(groups_of(70), seed=0)
    trees, held_out = fit_boosting(x, labels, folds, seed=3, **IN_ONE_THREAD)

    def expected(fitting, asked):
        settings = {"max_iter": 20, "learning_rate": 0.05, "max_depth": 4, "min_samples_leaf": 5, "max_features": 0.2}
        return np.column_stack(
            [
                HistGradientBoostingRegressor(
                    **settings, max_bins=64, early_stopping=False, random_state=np.random.RandomState(np.random.MT19937(3))
                )
                .fit(x[fitting], labels[fitting, column])
                .predict(asked)
                for column in range(2)
            ]
        )

    np.testing.assert_allclose(trees.predict(new), expected(np.arange(70), new), rtol=0, atol=1e-12)
    fitting, others = folds[2]
    np.testing.assert_allclose(held_out[others], expected(fitting, x[others]), rtol=0, atol=1e-12)
    np.testing.assert_array_equal(trees.predict(new)[7:9], trees.predict(new[7:9]))


def bounded(seed: int, songs: int) -> np.ndarray:
    """Features of mean 0 and deviation 1 within -3..3, which standardising and clipping do not change."""
    x = np.random.default_rng(seed).uniform(-1, 1, (songs, 6))
    return (x - x.mean(axis=0)) / x.std(axis=0)


def test_ridge_equals_scikit_learns_ridge_with_the_best_penalty_over_the_folds():
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV, cross_val_predict

    x, new = bounded(32, 60), bounded(33, 10)
    labels = np.column_stack([x[:, 0] + 2 * normal(34, 60), x.sum(axis=1) + 0.1 * normal(35, 60)])
    folds = grouped_folds(groups_of(60), seed=0)
    regressor, held_out_predictions = fit_ridge(x, labels, folds)
    predicted = regressor.predict(new)
    chosen = []
    for column in range(2):
        grid = {"alpha": np.logspace(-1, 5, 13)}
        search = GridSearchCV(Ridge(), grid, cv=folds, scoring="neg_mean_squared_error").fit(x, labels[:, column])
        np.testing.assert_allclose(predicted[:, column], search.predict(new), rtol=1e-8)
        of_folds = cross_val_predict(search.best_estimator_, x, labels[:, column], cv=folds)
        np.testing.assert_allclose(held_out_predictions[:, column], of_folds, rtol=1e-8)
        chosen.append(search.best_params_["alpha"])
    assert chosen[0] > chosen[1]


def test_svr_equals_scikit_learns_svr_with_the_best_settings_over_the_folds():
    from sklearn.model_selection import GridSearchCV, cross_val_predict
    from sklearn.svm import SVR

    x, new = bounded(36, 60), bounded(37, 10)
    labels = np.column_stack([0.3 * x[:, 0] + 0.2 * normal(38, 60), np.cos(2 * x[:, 1])])
    folds = grouped_folds(groups_of(60), seed=0)
    regressor, held_out_predictions = fit_svr(x, labels, folds, seed=0, **IN_ONE_THREAD)
    predicted = regressor.predict(new)
    chosen = []
    for column in range(2):
        machine = SVR(epsilon=labels[:, column].std() / 3)
        grid = {"gamma": [0.1 / 6, 0.3 / 6, 1 / 6], "C": [0.1, 0.3, 1.0, 3.0]}
        search = GridSearchCV(machine, grid, cv=folds, scoring="neg_mean_squared_error").fit(x, labels[:, column])
        np.testing.assert_allclose(predicted[:, column], search.predict(new), rtol=1e-8)
        of_folds = cross_val_predict(search.best_estimator_, x, labels[:, column], cv=folds)
        np.testing.assert_allclose(held_out_predictions[:, column], of_folds, atol=1e-3)  # the tolerance of libsvm
        chosen.append(search.best_params_["gamma"])
    assert chosen[0] < 1 / 6  # the last one tried is not the one kept


def test_the_penalty_is_not_chosen_by_copies_in_the_same_group():
    # Every song twice, and labels of pure noise: where the copy is in another fold, overfitting looks like skill.
    x, labels = np.repeat(normal(39, 30, 60), 2, axis=0), np.repeat(normal(40, 30, 2), 2, axis=0)
    grouped, _ = fit_ridge(x, labels, grouped_folds(groups_of(60), seed=0))
    alone, _ = fit_ridge(x, labels, grouped_folds([str(song) for song in range(60)], seed=0))
    new = normal(41, 20, 60)
    assert grouped.predict(new).std() < 0.2 * alone.predict(new).std()


@pytest.mark.usefixtures("few_trees")
def test_valence_is_fitted_without_arousal():
    x, new, labels = normal(10, 40, 3), normal(11, 6, 3), normal(12, 40, 2)
    both = fitted(x, labels, groups_of(40), new)
    changed = fitted(x, np.column_stack([labels[:, 0], normal(13, 40)]), groups_of(40), new)
    for name in NAMES:
        np.testing.assert_array_equal(both[name][:, 0], changed[name][:, 0])


@pytest.mark.usefixtures("few_trees")
def test_a_prediction_does_not_depend_on_the_other_test_songs():
    x, labels, new = normal(14, 60, 5), normal(15, 60, 2) * 0.3, normal(16, 8, 5)
    beside = new.copy()
    beside[4:] = 1000 * normal(17, 4, 5)
    first = fitted(x, labels, groups_of(60), new)
    second = fitted(x, labels, groups_of(60), beside)
    for name in NAMES:
        np.testing.assert_array_equal(first[name][:4], second[name][:4])


@pytest.mark.usefixtures("few_trees")
def test_an_outlier_is_predicted_within_the_range_of_the_other_songs():
    x, labels = normal(18, 60, 5), normal(19, 60, 2) * 0.3
    predicted = fitted(x, labels, groups_of(60), np.full((1, 5), 1e6))
    for name in NAMES:
        assert np.abs(predicted[name]).max() < 1


@pytest.mark.usefixtures("few_trees")
def test_the_same_seed_gives_the_same_predictions():
    x, labels, new = normal(20, 50, 5), normal(21, 50, 2), normal(22, 6, 5)
    first = fitted(x, labels, groups_of(50), new, seed=4)
    second = fitted(x, labels, groups_of(50), new, seed=4)
    assert list(first) == NAMES
    for name, predicted in first.items():
        assert predicted.dtype == np.float64
        np.testing.assert_array_equal(predicted, second[name])


@pytest.mark.parametrize("case", ["two songs", "more features than songs", "features alike", "labels alike"])
def test_degenerate_training_sets_give_finite_predictions_and_no_warning(case):
    x = normal(23, 2 if case == "two songs" else 12, 30)
    labels = normal(24, len(x), 2)
    if case == "features alike":
        x[:] = 0.1
    if case == "labels alike":
        labels[:] = 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predicted = fitted(x, labels, [str(song) for song in range(len(x))], normal(25, 3, 30))
    for name in NAMES:
        assert np.isfinite(predicted[name]).all()
        if case == "labels alike":
            np.testing.assert_allclose(predicted[name], 0.1)


def test_every_song_is_held_out_once_and_no_group_is_split():
    groups = [f"artist {min(song, 20) % 11}" for song in range(40)]
    folds = grouped_folds(groups, seed=0)
    assert len(folds) == 5
    assert sorted(song for _, held_out in folds for song in held_out) == list(range(40))
    for fitting, held_out in folds:
        assert not {groups[song] for song in fitting} & {groups[song] for song in held_out}
        assert sorted([*fitting, *held_out]) == list(range(40))


def test_few_groups_give_a_fold_each_and_the_seed_shuffles_them():
    assert len(grouped_folds(["a", "b", "a", "c"], seed=0)) == 3
    names = [str(song) for song in range(30)]
    dealt = [[tuple(held_out) for _, held_out in grouped_folds(names, seed)] for seed in (0, 0, 1)]
    assert dealt[0] == dealt[1] != dealt[2]


def test_a_single_group_is_refused():
    with pytest.raises(DataError, match="2 groups"):
        fitted(normal(26, 6, 3), normal(27, 6, 2), ["one"] * 6, normal(28, 2, 3))


def real_songs(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids [songs], openSMILE means [songs, 130] and labels [songs, 2] on -1..1 of DEAM."""
    folder = folder / "deam_annotations"
    labels = {}
    for name in ("1_2000", "2000_2058"):
        with (folder / f"static_annotations_averaged_songs_{name}.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, skipinitialspace=True):
                labels[row["song_id"]] = [float(row["valence_mean"]), float(row["arousal_mean"])]
    with (folder / "spectral_data_bbaltaxe.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    features = np.array([[float(value) for value in row[1:]] for row in rows])
    return np.array([int(row[0]) for row in rows]), features, (np.array([labels[row[0]] for row in rows]) - 5) / 4


def test_the_constant_on_deam_has_the_known_error(real_data):
    ids, _, labels = real_songs(real_data)
    excerpts = labels[ids <= 2000]
    assert len(excerpts) == 1744
    for column, known in enumerate((0.241, 0.271)):
        constant = np.full(len(excerpts), excerpts[:, column].mean())
        assert metric("mae", constant, excerpts[:, column]) == pytest.approx(known, abs=0.0005)


def test_ridge_on_deam_reaches_the_known_concordance(real_data):
    ids, features, labels = real_songs(real_data)
    predicted = np.empty_like(labels)
    for train, test in grouped_folds([str(song) for song in ids], seed=0):
        folds = grouped_folds([str(song) for song in ids[train]], seed=0)
        predicted[test] = fit_ridge(features[train], labels[train], folds)[0].predict(features[test])
    assert concordance(predicted[:, 0], labels[:, 0]) == pytest.approx(0.59, abs=0.03)
    assert concordance(predicted[:, 1], labels[:, 1]) == pytest.approx(0.64, abs=0.03)


def test_boosting_on_deam_beats_ridge(real_data):
    ids, features, labels = real_songs(real_data)
    train, test = grouped_folds([str(song) for song in ids], seed=0)[0]
    trees = boosted(features[train], labels[train]).predict(features[test])
    folds = grouped_folds([str(song) for song in ids[train]], seed=0)
    plane = fit_ridge(features[train], labels[train], folds)[0].predict(features[test])
    for column in range(2):
        better, worse = (metric("rmse", found[:, column], labels[test, column]) for found in (trees, plane))
        assert better < worse
