"""The file of the folds' predictions: what it says, and which songs it fits."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from emotion.data.out_of_fold import (
    MEMBERS,
    FoldRun,
    OutOfFold,
    SongPredictions,
    read_out_of_fold,
    refuse_other_songs,
    write_out_of_fold,
)
from emotion.data.song_ids import SongId
from emotion.errors import DataError
from tests.emotion.trainings import SMALL_MEL, write_songs

LABELS: dict[SongId, tuple[float, float]] = {3: (0.5, -0.25), 12: (0.1, 1 / 3), "é/1.mp3": (-1.0, 0.0)}


def found(best_epochs: tuple[int, ...] = (4, 9, 5)) -> OutOfFold:
    return OutOfFold(
        setting={"vit.epochs": 20.0},
        inputs={},
        files=frozenset({"file 0", "file 1", "file 2"}),
        runs=[FoldRun(f"x-{n}", 0, 0, n, "0", {"best_epoch": best}) for n, best in enumerate(best_epochs)],
        songs=[SongPredictions(song, 0, pair, dict.fromkeys(MEMBERS, pair)) for song, pair in LABELS.items()],
        over_seeds={},
    )


@pytest.mark.parametrize(("best", "stop"), [((4, 9, 5), 5), ((4, 9), 7), ((4, 5), 5), ((0,), 0), ((8, 8, 1, 30), 8)])
def test_training_stops_at_the_median_of_the_best_epochs_a_half_rounded_up(best: tuple[int, ...], stop: int) -> None:
    assert found(best).stop_epoch == stop


@pytest.mark.parametrize(("kept", "keeps", "stop"), [((True, True, False), True, 30), ((True, False, False), False, 9)])
def test_of_two_trainings_in_each_fold_the_epochs_are_those_of_the_kind_that_most_have_kept(
    kept: tuple[bool, ...], keeps: bool, stop: int
) -> None:
    runs = [
        replace(
            run,
            training={
                "best_epoch": with_clips if is_kept else without,
                "synthetic_clips": {"kept": is_kept, "best_epoch_with": with_clips, "best_epoch_without": without},
            },
        )
        for run, is_kept, with_clips, without in zip(found().runs, kept, (30, 28, 40), (10, 9, 8), strict=True)
    ]
    assert replace(found(), runs=runs).keeps_synthetic is keeps
    assert replace(found(), runs=runs).stop_epoch == stop
    assert found().keeps_synthetic is None


def test_it_reads_back_and_equal_content_is_equal_bytes(tmp_path: Path) -> None:
    write_out_of_fold(tmp_path / "one.json", found())
    assert read_out_of_fold(tmp_path / "one.json") == found()
    write_out_of_fold(tmp_path / "two.json", read_out_of_fold(tmp_path / "one.json"))
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()


def damaged(record: dict[str, Any], damage: str) -> dict[str, Any]:
    if damage == "other format":
        return {**record, "format": 99}
    if damage == "no setting":
        return {key: value for key, value in record.items() if key != "setting"}
    if damage == "no runs":
        return {**record, "runs": []}
    if damage == "other epoch":
        return {**record, "stop_epoch": 11}
    if damage == "no stack":
        return {**record, "songs": [{**song, "predicted": {"model": [0, 0]}} for song in record["songs"]]}
    return {**record, "songs": [{**record["songs"][0], "actual": [0.5, float("nan")]}]}


@pytest.mark.parametrize("damage", ["other format", "no setting", "no runs", "other epoch", "no stack", "not finite", "no json"])
def test_anything_else_is_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "out_of_fold.json"
    write_out_of_fold(path, found())
    record = damaged(json.loads(path.read_text()), damage)
    path.write_text("{" if damage == "no json" else json.dumps(record))
    with pytest.raises(
        DataError, match=r"^split\.out_of_fold: .* is not what `emotion-job collect` writes .*Collect the folds again\.$"
    ):
        read_out_of_fold(path)


def test_a_missing_file_and_one_that_is_a_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no .*none"):
        read_out_of_fold(tmp_path / "none")
    with pytest.raises(DataError, match="is a folder; name the file out_of_fold"):
        read_out_of_fold(tmp_path)


def test_other_songs_labels_and_files_are_named(tmp_path: Path) -> None:
    songs = write_songs(tmp_path, SMALL_MEL, 3).songs  # 0, 1 and 2
    labels = [(0.5, 0.25), (0.0, 0.0), (-0.5, 1.0)]

    def folds(**changed: Any) -> OutOfFold:
        own = [SongPredictions(song.song_id, 0, pair, {}) for song, pair in zip(songs, labels, strict=True)]
        return replace(found(), songs=own, **changed)

    refuse_other_songs(folds(), songs, labels)
    with pytest.raises(DataError, match=r"another dataset: songs with other labels \(1\): 1\. "):
        refuse_other_songs(folds(), songs, [labels[0], (0.0, 1e-7), labels[2]])
    with pytest.raises(DataError, match=r"another dataset: songs with other audio \(1\): 2\. "):
        refuse_other_songs(folds(files=frozenset({"file 0", "file 1"})), songs, labels)
    with pytest.raises(DataError, match=r"another dataset: predicted songs that are not here \(1\): 0\. "):
        refuse_other_songs(folds(), songs[1:], labels[1:])
    fewer = folds()
    with pytest.raises(DataError, match=r"another dataset: songs that no fold has predicted \(1\): 2\. "):
        refuse_other_songs(replace(fewer, songs=fewer.songs[:2]), songs, labels)
