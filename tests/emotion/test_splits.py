"""Every song in one split, no group in two, and nothing but the songs and the spec decides."""

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emotion.config import SplitConfig
from emotion.data.deam import dataset_files, find_dataset, join_labels
from emotion.data.splits import Split, assign_splits, make_split, read_split, write_split
from emotion.errors import DataError

# Six to forty songs in at most twelve groups; ids in no order.
SONGS = st.lists(st.integers(0, 11), min_size=6, max_size=40).flatmap(
    lambda numbers: st.tuples(
        st.permutations(range(100, 100 + len(numbers))), st.just([f"artist {number}" for number in numbers])
    )
)
EVENLY = settings(max_examples=60, deadline=None)


def config(**values: Any) -> SplitConfig:
    return SplitConfig.model_validate(values)


def possible(groups: list[str], folds: int = 3) -> bool:
    """Enough groups: outside any of three or more filled folds at least two are left, to train and to validate."""
    return len(set(groups)) >= folds


def dominated(groups: list[str]) -> bool:
    """One group is so large that a holdout may leave it alone beside the test songs: refused, see below."""
    return 3 * max(Counter(groups).values()) > len(groups)


def folds_of(ids: list[int], groups: list[str], **values: Any) -> list[list[Split]]:
    folds = values["folds"]
    return [assign_splits(ids, groups, config(fold=fold, **values)) for fold in range(folds)]


@EVENLY
@given(songs=SONGS, folds=st.integers(3, 5), seed=st.integers(0, 3), grouped=st.booleans())
def test_every_song_is_tested_in_exactly_one_fold(
    songs: tuple[list[int], list[str]], folds: int, seed: int, grouped: bool
) -> None:
    ids, groups = songs
    if possible(groups, folds) or not grouped:
        for splits in zip(*folds_of(ids, groups, folds=folds, seed=seed, grouped=grouped), strict=True):
            assert splits.count("test") == 1


@EVENLY
@given(songs=SONGS, folds=st.integers(3, 5), seed=st.integers(0, 3), holdout=st.booleans())
def test_no_group_is_in_two_splits_and_no_split_is_empty(
    songs: tuple[list[int], list[str]], folds: int, seed: int, holdout: bool
) -> None:
    ids, groups = songs
    if possible(groups, folds) and not dominated(groups):
        protocol = {"protocol": "holdout"} if holdout else {"folds": folds}
        splits = assign_splits(ids, groups, config(seed=seed, **protocol))
        assert len(splits) == len(ids)
        assert len(set(zip(groups, splits, strict=True))) == len(set(groups))
        assert set(splits) == {"train", "validation", "test"}


@EVENLY
@given(songs=SONGS, data=st.data(), protocol=st.sampled_from(["kfold", "holdout"]), grouped=st.booleans())
def test_the_order_of_the_songs_changes_nothing(
    songs: tuple[list[int], list[str]], data: st.DataObject, protocol: str, grouped: bool
) -> None:
    ids, groups = songs
    if (possible(groups) and not dominated(groups)) or not grouped:
        spec = config(protocol=protocol, folds=3, grouped=grouped)
        pairs = data.draw(st.permutations(list(zip(ids, groups, strict=True))))
        again = assign_splits([song for song, _ in pairs], [group for _, group in pairs], spec)
        assert dict(zip(ids, assign_splits(ids, groups, spec), strict=True)) == {
            song: split for (song, _), split in zip(pairs, again, strict=True)
        }


@EVENLY
@given(songs=SONGS, data=st.data(), protocol=st.sampled_from(["kfold", "holdout"]))
def test_groups_do_not_matter_when_songs_are_split_one_by_one(
    songs: tuple[list[int], list[str]], data: st.DataObject, protocol: str
) -> None:
    ids, groups = songs
    spec = config(protocol=protocol, folds=3, grouped=False)
    assert assign_splits(ids, groups, spec) == assign_splits(ids, data.draw(st.permutations(groups)), spec)


@EVENLY
@given(songs=SONGS, folds=st.integers(3, 5))
def test_folds_differ_by_no_more_than_the_largest_group(songs: tuple[list[int], list[str]], folds: int) -> None:
    ids, groups = songs
    if possible(groups, folds):
        sizes = [splits.count("test") for splits in folds_of(ids, groups, folds=folds)]
        assert max(sizes) - min(sizes) <= max(Counter(groups).values())


@EVENLY
@given(songs=SONGS, fraction=st.floats(0.05, 0.5))
def test_validation_is_as_large_as_groups_allow(songs: tuple[list[int], list[str]], fraction: float) -> None:
    ids, groups = songs
    if possible(groups):
        splits = assign_splits(ids, groups, config(folds=3, validation_fraction=fraction))
        others = Counter(group for group, split in zip(groups, splits, strict=True) if split != "test")
        target = fraction * others.total()
        # Within half a group; the smallest group where even that is twice the target or more.
        assert abs(splits.count("validation") - target) <= max(max(others.values()) / 2, min(others.values()) - target)


def test_single_songs_give_exact_shares() -> None:
    ids = list(range(1, 1001))
    groups = ["one artist"] * 1000
    assert Counter(assign_splits(ids, groups, config(grouped=False))) == {"test": 200, "validation": 120, "train": 680}
    assert Counter(assign_splits(ids, groups, config(grouped=False, protocol="holdout", test_fraction=0.1))) == {
        "test": 100,
        "validation": 135,
        "train": 765,
    }


def test_a_worked_case_of_balanced_folds() -> None:
    # Sizes 5, 4, 3, 3, 3 into three folds, largest first into the smallest: 5 | 4+3 | 3+3.
    groups = [*"aaaaabbbbcccdddeee"]
    sizes = sorted(s.count("test") for s in folds_of(list(range(18)), groups, folds=3))
    assert sizes == [5, 6, 7]


def test_known_songs_keep_their_splits() -> None:
    # Published numbers rest on this assignment. A change here changes every fold of every run.
    splits = assign_splits(list(range(2, 14)), [f"song:{song_id}" for song_id in range(2, 14)], config(folds=3, fold=1))
    assert "".join(split[0].upper() if split == "test" else split[0] for split in splits) == "TTttttTtTvtt"


def test_the_seed_and_the_fold_choose_other_songs() -> None:
    ids = list(range(200))
    groups = [str(song_id) for song_id in ids]
    first = assign_splits(ids, groups, config())
    for other in (config(seed=1), config(fold=1)):
        splits = assign_splits(ids, groups, other)
        for split in ("test", "validation"):
            assert [s == split for s in splits] != [s == split for s in first]


def test_a_holdout_does_not_depend_on_the_fold() -> None:
    ids = list(range(50))
    groups = [str(song_id) for song_id in ids]
    assert assign_splits(ids, groups, config(protocol="holdout", fold=0)) == assign_splits(
        ids, groups, config(protocol="holdout", fold=3, folds=7)
    )


@pytest.mark.parametrize("protocol", ["kfold", "holdout"])
def test_splits_of_real_songs_do_not_divide_a_game(real_data: Path, protocol: str) -> None:
    songs = find_dataset(real_data / "vgmidi48").songs
    ids = [song.song_id for song in songs]
    groups = [song.group for song in songs]
    tested: Counter[int] = Counter()
    for fold in range(5):
        splits = assign_splits(ids, groups, config(protocol=protocol, fold=fold))
        assert len(set(zip(groups, splits, strict=True))) == 18
        assert 9 <= splits.count("test") <= 11
        assert 4 <= splits.count("validation") <= 8
        tested.update(song_id for song_id, split in zip(ids, splits, strict=True) if split == "test")
    if protocol == "kfold":
        assert set(tested.values()) == {1}
        assert len(tested) == 50


@pytest.mark.parametrize(
    ("groups", "values", "says"),
    [
        (["a"] * 9 + ["b"], {"folds": 3}, r"2 groups \(10 songs\) cannot fill 3 folds"),
        (["a", "b"], {"folds": 2}, "2 songs in 2 groups give 0 for train, 1 for validation, 1 for test"),
        ([*"abcd", *"e" * 16], {"protocol": "holdout"}, "20 songs in 5 groups give 0 for train, 16 for validation, 4 for test"),
        (["a"] * 5, {"protocol": "holdout"}, "5 songs in 1 group give 0 for train, 0 for validation, 5 for test"),
        ([], {"protocol": "holdout"}, "0 songs in 0 groups"),
    ],
)
def test_too_few_groups_are_refused_with_the_numbers(groups: list[str], values: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        assign_splits(list(range(len(groups))), groups, config(**values))


def test_a_repeated_id_is_refused() -> None:
    with pytest.raises(DataError, match="found twice: 2"):
        assign_splits([1, 2, 2, 3], [*"abcd"], config(folds=2))


# Lists


def write_lists(folder: Path, train: str = "1\n2\n", validation: str = "3\n", test: str = "4\n") -> SplitConfig:
    for name, text in (("train", train), ("validation", validation), ("test", test)):
        (folder / f"{name}.txt").write_bytes(text.encode())
    return config(protocol="lists", lists=str(folder))


def test_lists_alone_decide(tmp_path: Path) -> None:
    spec = write_lists(tmp_path, train="\ufeff 2 \r\n\r\n1\r\n")
    assert assign_splits([4, 1, 3, 2], [*"abcd"], spec) == ["test", "train", "validation", "train"]


@EVENLY
@given(songs=SONGS, data=st.data())
def test_lists_give_every_song_the_split_that_they_name_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, songs: tuple[list[int], list[str]], data: st.DataObject
) -> None:
    ids, groups = songs
    names = ["train", "validation", "test"]
    drawn = st.lists(st.sampled_from(names), min_size=len(ids) - 3, max_size=len(ids) - 3)
    split_of = dict(zip(ids, [*names, *data.draw(drawn)], strict=True))
    listed = data.draw(st.permutations(ids))
    texts = {name: "".join(f"{song}\n" for song in listed if split_of[song] == name) for name in names}
    spec = write_lists(tmp_path_factory.mktemp("lists"), **texts)
    asked = data.draw(st.permutations(ids))
    assert assign_splits(asked, groups, spec) == [split_of[song] for song in asked]


def test_lists_that_divide_a_group_are_used_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="emotion.data.splits"):
        assert assign_splits([1, 2, 3, 4], [*"aabb"], write_lists(tmp_path)) == ["train", "train", "validation", "test"]
    assert "divide 1 of 2 groups" in caplog.text


@pytest.mark.parametrize(
    ("lists", "says"),
    [
        ({"test": "4\n1\n"}, "ids in two lists (1): 1"),
        ({"test": "4\n" + "9" * 5000}, "expected one song id a line, found line 2: '99999"),
        ({"test": "\u200b4\n"}, "found line 1: '\\u200b4' with U+200B (ZERO WIDTH SPACE)"),
        ({"train": "1\n2\n77\n"}, "ids of no song in the dataset (1): 77"),
        ({"train": "1\n"}, "songs in no list (1): 2"),
        (
            {"train": "1\n", "test": "4\n3\n9\n"},
            "two lists (1): 3; ids of no song in the dataset (1): 9; songs in no list (1): 2",
        ),
        ({"train": "1\n2.mp3\n"}, "train.txt: expected one song id a line, found line 2: '2.mp3'"),
        ({"train": "1\n2\n3\n", "validation": "\n"}, "give 3 for train, 0 for validation, 1 for test"),
    ],
)
def test_lists_that_do_not_name_every_song_once_are_refused(tmp_path: Path, lists: dict[str, str], says: str) -> None:
    with pytest.raises(DataError) as caught:
        assign_splits([1, 2, 3, 4], [*"abcd"], write_lists(tmp_path, **lists))
    assert says in str(caught.value)


def test_a_missing_list_is_refused_with_its_name(tmp_path: Path) -> None:
    spec = write_lists(tmp_path)
    (tmp_path / "validation.txt").unlink()
    with pytest.raises(DataError, match=r"validation\.txt: cannot be read"):
        assign_splits([1, 2, 3, 4], [*"abcd"], spec)


def test_lists_may_name_songs_that_were_left_out(tmp_path: Path) -> None:
    spec = write_lists(tmp_path, test="4\n9\n")
    assert assign_splits([1, 2, 3, 4], [*"abcd"], spec, left_out={9})[-1] == "test"
    with pytest.raises(DataError, match=r"ids of no song in the dataset \(1\): 9"):
        assign_splits([1, 2, 3, 4], [*"abcd"], spec, left_out={8})


def test_the_published_lists_fit_the_real_labels(real_data: Path) -> None:
    folder = real_data / "deam_annotations"
    ids = [label.song_id for label in join_labels(folder, dataset_files(folder))[0]]
    spec = config(protocol="lists", lists=str(folder / "music2emo_split"), grouped=False)
    counts = Counter(assign_splits(ids, [""] * len(ids), spec))
    assert counts == {"train": 1261, "validation": 271, "test": 270}


# The column of songs.csv


def test_the_column_alone_decides(caplog: pytest.LogCaptureFixture) -> None:
    ids, given = ["a.mp3", "b.mp3", "c.mp3", "d.mp3"], ["test", "train", "validation", "train"]
    assert assign_splits(ids, [*"wxyz"], config(protocol="column"), given=given) == given
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert assign_splits(ids, [*"aabb"], config(protocol="column"), given=given) == given
    assert "the column divides 2 of 2 groups" in caplog.text


@pytest.mark.parametrize("given", [["test", "train", "validation", ""], []])
def test_a_song_without_a_split_in_the_column_is_named(given: list[str]) -> None:
    with pytest.raises(
        DataError, match=r"split\.protocol is column, but [14] of 4 songs have no split: .*d\.mp3\. Fill the column"
    ):
        assign_splits(["a.mp3", "b.mp3", "c.mp3", "d.mp3"], [*"wxyz"], config(protocol="column"), given=given)


def test_a_column_without_validation_songs_is_refused() -> None:
    with pytest.raises(DataError, match=r"each split needs a song, .* 0 for validation"):
        assign_splits(["a.mp3", "b.mp3"], [*"xy"], config(protocol="column"), given=["train", "test"])


def test_other_protocols_do_not_look_at_the_column() -> None:
    ids = [f"{number}.mp3" for number in range(12)]
    with_column = assign_splits(ids, ids, config(protocol="kfold", folds=3), given=["test"] * 12)
    assert with_column == assign_splits(ids, ids, config(protocol="kfold", folds=3))


# Strata

PLANE = [(valence, arousal) for valence in (-0.7, 0.1, 0.6) for arousal in (-0.5, 0.0, 0.8)]


def test_each_fold_and_share_gets_its_part_of_the_plane() -> None:
    labels = [(v + 0.01 * number, a) for number in range(10) for v, a in PLANE]
    ids = list(range(len(labels)))
    groups = ["one artist"] * len(ids)

    def cells(splits: list[Split], split: Split) -> list[int]:
        counts = Counter(song % 9 for song in ids if splits[song] == split)
        return [counts[cell] for cell in range(9)]

    for fold in range(5):
        spec = config(folds=5, fold=fold, grouped=False, stratified=True, validation_fraction=0.25)
        splits = assign_splits(ids, groups, spec, labels=labels)
        # Ten songs in each ninth of the plane: two in each fold, and a quarter of the other eight.
        assert cells(splits, "test") == cells(splits, "validation") == [2] * 9
        by_chance = assign_splits(ids, groups, spec.model_copy(update={"stratified": False}), labels=labels)
        assert cells(by_chance, "test") != [2] * 9
    holdout = config(protocol="holdout", test_fraction=0.3, grouped=False, stratified=True)
    assert cells(assign_splits(ids, groups, holdout, labels=labels), "test") == [3] * 9
    # Cells too small for a song each: the share is as large as without strata, from as many cells as it has songs.
    few = config(protocol="holdout", test_fraction=0.15, grouped=False, stratified=True)
    tested = cells(assign_splits(ids[:27], groups[:27], few, labels=labels[:27]) + ["train"] * 63, "test")
    assert sorted(tested) == [0] * 5 + [1] * 4


@pytest.mark.parametrize("seed", range(5))
def test_groups_stay_whole_in_strata_of_equal_folds(seed: int) -> None:
    # Three calm and three excited artists.
    groups = [artist for artist in "aabbccddeeff" for _ in range(2)]
    labels = [(0.0, -0.5 if artist in "abc" else 0.5) for artist in groups]
    ids = list(range(len(groups)))
    for fold in range(3):
        splits = assign_splits(ids, groups, config(folds=3, fold=fold, stratified=True, seed=seed), labels=labels)
        tested = {groups[song] for song in ids if splits[song] == "test"}
        assert len(tested & {*"abc"}) == len(tested & {*"def"}) == 1
        assert len(set(zip(groups, splits, strict=True))) == 6


@EVENLY
@given(songs=SONGS, data=st.data(), protocol=st.sampled_from(["kfold", "holdout"]), grouped=st.booleans())
def test_the_order_of_the_songs_changes_nothing_in_strata(
    songs: tuple[list[int], list[str]], data: st.DataObject, protocol: str, grouped: bool
) -> None:
    ids, groups = songs
    if (possible(groups) and not dominated(groups)) or not grouped:
        label_of = {song: PLANE[song * 7 % 9] for song in ids}
        spec = config(protocol=protocol, folds=3, grouped=grouped, stratified=True)
        found = []
        for pairs in (list(zip(ids, groups, strict=True)), data.draw(st.permutations(list(zip(ids, groups, strict=True))))):
            labels = [label_of[song] for song, _ in pairs]
            splits = assign_splits([song for song, _ in pairs], [group for _, group in pairs], spec, labels=labels)
            found.append({song: split for (song, _), split in zip(pairs, splits, strict=True)})
        assert found[0] == found[1]


def test_with_all_every_song_is_for_training() -> None:
    spec = config(protocol="all", out_of_fold="/any")
    assert [row.split for row in make_split([1, 2, 3], [*"abc"], spec, [])] == ["train"] * 3
    with pytest.raises(DataError, match="train has 2 of 2 songs and needs 3"):
        make_split([1, 2], [*"ab"], spec, [])


# Ids that are text


def test_lists_name_songs_by_text_where_ids_are_text(tmp_path: Path) -> None:
    spec = write_lists(tmp_path, train="b, c.mp3\n é/1.mp3 \n", validation="3.mp3\n", test="#4.mp3\n")
    assert assign_splits(["#4.mp3", "é/1.mp3", "3.mp3", "b, c.mp3"], [*"wxyz"], spec) == ["test", "train", "validation", "train"]
    spec = write_lists(tmp_path, train="B.mp3\n7\n", validation="3.mp3\n", test="4.mp3\n")
    with pytest.raises(DataError, match=r"ids of no song in the dataset \(2\): 7, B\.mp3; songs in no list \(1\): b\.mp3"):
        assign_splits(["b.mp3", "3.mp3", "4.mp3"], [*"xyz"], spec)


def test_a_split_of_text_reads_back(tmp_path: Path) -> None:
    ids = [f"é, {number}.mp3" for number in range(12)]
    rows = make_split(ids, ids, config(folds=3, validation_fraction=0.3), [])
    write_split(tmp_path / "split.csv", rows)
    assert read_split(tmp_path / "split.csv") == rows
    assert [row.song_id for row in rows] == ids
