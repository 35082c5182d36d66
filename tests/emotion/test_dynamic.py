from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from emotion.audio.feature_store import Features
from emotion.data.dynamic import DynamicPoint, dynamic_points, read_dynamic, write_dynamic
from emotion.data.layouts import dataset_files
from emotion.errors import DataError
from emotion.evaluation.dynamic import dynamic_scores
from emotion.evaluation.metrics import concordance
from tests.emotion.trainings import SMALL_MEL, write_songs

FOLDER = Path("DEAM_Annotations/annotations/annotations averaged per song/dynamic (per second annotations)")
VALENCE = "song_id,sample_14500ms,sample_15000ms,sample_15500ms,sample_16000ms\n2,0.9,0.1,-0.2,\n3,0.9,0.3,NaN,0.5\n10,,1,1,1\n"
AROUSAL = "song_id, sample_15000ms, sample_15500ms, sample_16000ms\r\n3.0, -0.4, 0.25, -1\r\n2, 0.5, 0.6, 0.7\r\n"


def write_tables(root: Path, valence: str = VALENCE, arousal: str = AROUSAL) -> list[Path]:
    (root / FOLDER).mkdir(parents=True, exist_ok=True)
    (root / FOLDER / "valence.csv").write_text(valence, encoding="utf-8")
    (root / FOLDER / "arousal.csv").write_text(arousal, encoding="utf-8")
    # As DEAM has them beside: a file per song with a column per rater.
    other = root / FOLDER.parent.parent / "annotations per each rater" / FOLDER.name / "valence"
    other.mkdir(parents=True, exist_ok=True)
    (other / "2.csv").write_text("sample_15000ms\n0.5\n", encoding="utf-8")
    return dataset_files(root)


def test_points_are_where_both_dimensions_have_a_number_from_15_seconds_on(tmp_path: Path) -> None:
    files = write_tables(tmp_path)
    assert [path.name for path in files] == ["arousal.csv", "valence.csv"]
    expected = [
        DynamicPoint(2, 15.0, 0.1, 0.5),
        DynamicPoint(2, 15.5, -0.2, 0.6),
        DynamicPoint(3, 15.0, 0.3, -0.4),
        DynamicPoint(3, 16.0, 0.5, -1.0),
    ]
    assert dynamic_points(tmp_path, files, {2, 3, 10}) == expected
    # Of the songs that are used alone.
    assert dynamic_points(tmp_path, files, {3}) == expected[2:]
    assert dynamic_points(tmp_path, files[:1], {2, 3}) == []


def test_points_read_back_are_the_same_and_a_folder_may_have_none(tmp_path: Path) -> None:
    points = dynamic_points(tmp_path, write_tables(tmp_path), {2, 3})
    assert read_dynamic(tmp_path) == {}
    write_dynamic(tmp_path, points)
    assert read_dynamic(tmp_path) == {2: points[:2], 3: points[2:]}


@pytest.mark.parametrize(
    ("valence", "says"),
    [
        ("song_id,time\n2,1\n", "expected the columns song_id, sample_15000ms"),
        ("song_id,sample_15000ms\nx,1\n", "line 2: expected the number of a song"),
        ("song_id,sample_15000ms\n2,high\n", "line 2: expected a number from -1 to 1 in sample_15000ms, found high"),
        ("song_id,sample_15000ms\n2,5.5\n", "line 2: expected a number from -1 to 1 in sample_15000ms, found 5.5"),
    ],
)
def test_other_tables_are_refused_by_name_and_line(tmp_path: Path, valence: str, says: str) -> None:
    with pytest.raises(DataError, match=r"dynamic \(per second annotations\)/valence\.csv.*" + says):
        dynamic_points(tmp_path, write_tables(tmp_path, valence), {2})


# Scores


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Features:
    return write_songs(tmp_path_factory.mktemp("songs"), SMALL_MEL, 4, frames=20)


TIMES = np.arange(12.0, 20, 0.5)
SAID = {song: np.random.default_rng(song).uniform(-0.5, 0.5, (6, 2)) + 0.2 * song - 0.3 for song in range(3)}
"""At 15, 15.5, … 17.5 s, of three of four songs."""
POINTS = {
    song: [DynamicPoint(song, 15 + 0.5 * place, *pair) for place, pair in enumerate(said.tolist())] for song, said in SAID.items()
}
FLAT = np.array([[0.1, -0.1], [0.2, 0.0], [0.3, 0.1], [0.4, 0.2]])


def curves(songs: Features, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Of each song what its raters said, changed; before and after that 0.9."""

    def curve(stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        (song,) = [index for index in range(4) if np.array_equal(songs.stored(index), stored)]
        values = np.full((len(TIMES), 2), 0.9)
        values[6:12] = change(SAID[song])
        return TIMES, values

    return curve


def test_curves_that_say_what_the_raters_said_are_perfect(songs: Features) -> None:
    found = dynamic_scores(POINTS, songs, curves(songs, lambda said: said), FLAT, groups=[*"abcd"], samples=50, seed=0)
    assert found is not None
    assert (found["songs"], found["points"], found["from_seconds"]) == (3, 18, 15)
    for axis in ("valence", "arousal"):
        assert found["curve"][axis]["ccc"] == found["curve"][axis]["song_ccc"] == pytest.approx(1)
        assert found["curve"][axis]["rmse"] == found["curve"][axis]["song_rmse"] == pytest.approx(0, abs=1e-7)


def test_scores_are_those_of_all_points_and_means_over_songs(songs: Features) -> None:
    noise = np.random.default_rng(9).normal(0, 0.3, (6, 2))
    found = dynamic_scores(
        POINTS, songs, curves(songs, lambda said: 0.5 * said + noise + 0.1), FLAT, groups=[*"abcd"], samples=400, seed=0
    )
    assert found is not None
    said = np.array([*SAID.values()])
    predicted = 0.5 * said + noise + 0.1
    for column, axis in enumerate(("valence", "arousal")):
        curve, flat = found["curve"][axis], found["flat"][axis]
        p, a = predicted[:, :, column], said[:, :, column]
        assert curve["ccc"] == pytest.approx(concordance(p.ravel(), a.ravel()))
        assert curve["rmse"] == pytest.approx(np.sqrt(((p - a) ** 2).mean()))
        assert curve["song_ccc"] == pytest.approx(np.mean([concordance(*pair) for pair in zip(p, a, strict=True)]))
        assert curve["song_rmse"] == pytest.approx(np.mean(np.sqrt(((p - a) ** 2).mean(axis=1))))
        # A line follows nothing within a song, and can only tell songs apart.
        constant = np.repeat(FLAT[:3, column], 6)
        assert flat["song_ccc"] == pytest.approx(0, abs=1e-9)
        assert flat["ccc"] == pytest.approx(concordance(constant, a.ravel()))
        for name in ("ccc", "rmse", "song_ccc", "song_rmse"):
            low, high = curve[f"{name}_ci"]
            assert low <= curve[name] <= high
            assert low < high


def test_songs_without_common_times_are_not_scored(songs: Features) -> None:
    def late(_: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.array([15.25, 30.0]), np.zeros((2, 2))

    assert dynamic_scores(POINTS, songs, late, FLAT, groups=[*"abcd"], samples=50, seed=0) is None
    assert dynamic_scores({}, songs, late, FLAT, groups=[*"abcd"], samples=50, seed=0) is None


def test_a_single_song_has_no_intervals(songs: Features) -> None:
    found = dynamic_scores({1: POINTS[1]}, songs, curves(songs, lambda said: -said), FLAT, groups=[*"abcd"], samples=50, seed=0)
    assert found is not None
    assert found["curve"]["valence"]["ccc"] < 0
    assert found["curve"]["valence"]["ccc_ci"] is found["curve"]["arousal"]["song_rmse_ci"] is None
