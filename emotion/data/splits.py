"""Which songs are for training, validation and test. Groups stay whole; only the songs and the spec decide.

Units are what is not divided: groups, or single songs. With split.stratified the valence-arousal plane is cut into nine cells, at
the thirds of each axis, and each split gets its share of every cell, as far as the groups allow.
"""

import hashlib
import logging
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from emotion.characters import quoted
from emotion.config import SplitConfig
from emotion.data.csv_table import read_records, read_text, write_records
from emotion.data.song_ids import SongId, in_order
from emotion.errors import DataError, StorageError, counted, first_of

log = logging.getLogger(__name__)

Split = Literal["train", "validation", "test"]
Label = tuple[float, float]  # (valence, arousal) of a song
FEWEST: dict[Split, int] = {"train": 3, "validation": 2}  # songs: a density needs three points, a concordance two
LARGER: dict[tuple[str, Split], str] = {
    ("kfold", "train"): "Use more songs, lower split.validation_fraction, or raise split.folds",
    ("kfold", "validation"): "Use more songs, or raise split.validation_fraction or split.folds",
    ("kfold", "test"): "Use more songs, or lower split.folds",
    ("holdout", "train"): "Use more songs, or lower split.validation_fraction or split.test_fraction",
    ("holdout", "validation"): "Use more songs, raise split.validation_fraction, or lower split.test_fraction",
    ("holdout", "test"): "Use more songs, or raise split.test_fraction",
}
"""(protocol, split) → what gives the split more songs."""


@dataclass(frozen=True)
class SplitRow:
    """A row of split.csv. group: songs of one group are in one split."""

    song_id: SongId
    group: str
    split: Split


def make_split(
    song_ids: Sequence[SongId],
    groups: Sequence[str],
    config: SplitConfig,
    left_out: Collection[SongId],
    given: Sequence[str] = (),
    labels: Sequence[Label] = (),
) -> list[SplitRow]:
    """The split of every song, in the order of `song_ids`. Raises DataError as `assign_splits`, or if a split is too small."""
    splits = assign_splits(song_ids, groups, config, left_out, given, labels)
    for name, fewest in FEWEST.items():
        is_used = config.protocol != "all" or name == "train"
        if is_used and splits.count(name) < fewest:
            found = f"split: {name} has {splits.count(name)} of {len(song_ids)} songs and needs {fewest}"
            raise DataError(f"{found}. {_larger(config, name)}")
    return [SplitRow(*row) for row in zip(song_ids, units_of(song_ids, groups, config), splits, strict=True)]


def _larger(config: SplitConfig, name: Split) -> str:
    """A sentence: what gives a split more songs."""
    if (config.protocol, name) not in LARGER:
        return {"lists": "Correct the lists.", "column": "Correct the column split."}.get(config.protocol, "Use more songs.")
    grouped = ", or set split.grouped to false to divide groups" if config.grouped else ""
    return f"{LARGER[config.protocol, name]}{grouped}."


def write_split(path: Path, rows: Sequence[SplitRow]) -> None:
    write_records(path, SplitRow, rows)


def read_split(path: Path) -> list[SplitRow]:
    """Raises DataError for anything but what `write_split` wrote."""
    return read_records(path, SplitRow, "the table of a split")


def units_of(song_ids: Sequence[SongId], groups: Sequence[str], config: SplitConfig) -> list[str]:
    """What splits do not divide: a song's group, or the song itself if config.grouped is off."""
    return list(groups) if config.grouped else [f"song:{song_id}" for song_id in song_ids]


def assign_splits(
    song_ids: Sequence[SongId],
    groups: Sequence[str],
    config: SplitConfig,
    left_out: Collection[SongId] = (),
    given: Sequence[str] = (),
    labels: Sequence[Label] = (),
) -> list[Split]:
    """The split of every song, in the order of `song_ids`; the order does not change a song's split.

    left_out: ids of left-out songs, which lists may name too. given: the songs' own splits, for `column`. labels: (valence,
    arousal) of the songs, for config.stratified. No group is in two splits, unless config.grouped is off, or lists or column
    divide it (a warning). Over the folds of `kfold`, of nearly equal size, every song is in the test set once. With `all` every
    song is for training. Raises DataError for repeated ids, too few groups, an empty split, lists that do not name every song
    once, and a column that does not.
    """
    repeated = in_order(song_id for song_id, count in Counter(song_ids).items() if count > 1)
    if repeated:
        raise DataError(f"splits: every song needs its own id, found twice: {first_of(repeated)}.")
    units = units_of(song_ids, groups, config)
    if len(units) != len(song_ids):
        raise ValueError(f"{len(song_ids)} song ids, but {len(units)} groups")
    sizes = Counter(units)
    if config.protocol == "all":
        return ["train"] * len(units)
    if config.protocol in ("lists", "column"):
        if config.protocol == "column":
            splits = splits_in_column(song_ids, given)
        else:
            assert config.lists is not None  # checked by SplitConfig
            splits = _from_lists(song_ids, Path(config.lists), left_out)
        splits_per_unit = Counter(unit for unit, _ in set(zip(units, splits, strict=True)))
        divided = sum(count > 1 for count in splits_per_unit.values())
        if config.grouped and divided:
            named = "lists divide" if config.protocol == "lists" else "column divides"
            log.warning("splits: the %s %d of %d groups; the test is easier than it looks", named, divided, len(sizes))
    else:
        # Without strata there is one cell, which all songs are in.
        cells = cells_of(labels) if config.stratified else [0] * len(units)
        contents = {unit: Counter[int]() for unit in sizes}
        for unit, cell in zip(units, cells, strict=True):
            contents[unit][cell] += 1
        if config.protocol == "kfold":
            test = _fold(contents, config)
            # Another draw for each fold, so that no song is left out of training in nearly all of them.
            purpose = f"validation {config.fold}"
        else:
            test = _share(contents, config.test_fraction, config.seed, "test")
            purpose = "validation"
        others = {unit: content for unit, content in contents.items() if unit not in test}
        validation = _share(others, config.validation_fraction, config.seed, purpose)
        splits = ["test" if unit in test else "validation" if unit in validation else "train" for unit in units]
    counts = {split: splits.count(split) for split in get_args(Split)}
    if not all(counts.values()):
        found = ", ".join(f"{count} for {split}" for split, count in counts.items())
        empty = next(split for split, count in counts.items() if not count)
        raise DataError(
            f"splits: each split needs a song, but {counted(len(units), 'song')} in {counted(len(sizes), 'group')} give {found}. "
            + _larger(config, empty)
        )
    return splits


def cells_of(labels: Sequence[Label]) -> list[int]:
    """The cell of each song on the plane, 0 to 8: by the thirds of the songs' valences and of their arousals."""
    thirds = []
    for values in zip(*labels, strict=True):
        ordered = sorted(values)
        cuts = [ordered[len(ordered) * third // 3] for third in (1, 2)]
        thirds.append([sum(value >= cut for cut in cuts) for value in values])
    return [3 * valence + arousal for valence, arousal in zip(*thirds, strict=True)]


def _fold(contents: Mapping[str, Counter[int]], config: SplitConfig) -> set[str]:
    """The units of one fold. contents: unit → cell → its songs.

    Units go, largest first, equal ones in shuffled order, into the fold that has least of what they bring: the sum over cells of
    songs in the unit × share of the cell that the fold has, and the same for all songs as one cell. With a single cell that is
    the smallest fold. It keeps the sum of squared shares as small as one choice at a time can.
    """
    if len(contents) < config.folds:
        songs = sum(content.total() for content in contents.values())
        raise DataError(
            f"splits: {counted(len(contents), 'group')} ({counted(songs, 'song')}) cannot fill {config.folds} folds. "
            "Lower split.folds, or set split.grouped to false to split single songs."
        )
    totals = _total(contents)
    folds: list[set[str]] = [set() for _ in range(config.folds)]
    found = [Counter[int]() for _ in folds]
    shuffled = _shuffled(contents, config.seed, "folds")
    for unit in sorted(shuffled, key=lambda unit: -contents[unit].total()):
        brought = contents[unit]

        def cost(fold: int, brought: Counter[int] = brought) -> float:
            of_cells = [brought[cell] * found[fold][cell] / totals[cell] for cell in brought]
            return math.fsum([*of_cells, brought.total() * found[fold].total() / totals.total()])

        cheapest = min(range(config.folds), key=cost)
        folds[cheapest].add(unit)
        found[cheapest] += brought
    return folds[config.fold]


def _share(contents: Mapping[str, Counter[int]], fraction: float, seed: int, purpose: str) -> set[str]:
    """Units with about `fraction` of the songs, at least one: in shuffled order, each that brings the number of songs closer.

    With several cells at first only those that also bring the cells closer to their own numbers, by squares relative to the size
    of a cell; then, while the number of songs still comes closer, the unit that disturbs the cells least.
    """
    totals = _total(contents)
    target = fraction * totals.total()
    shuffled = _shuffled(contents, seed, purpose)
    chosen: set[str] = set()
    found = Counter[int]()

    def comes_closer(unit: str) -> bool:
        return abs(found.total() + contents[unit].total() - target) < abs(found.total() - target)

    def disturbs(unit: str) -> float:
        gaps = [(found[cell] - fraction * totals[cell], songs, totals[cell]) for cell, songs in contents[unit].items()]
        return math.fsum(((gap + songs) ** 2 - gap**2) / total for gap, songs, total in gaps)

    for unit in shuffled:
        if comes_closer(unit) and (len(totals) == 1 or disturbs(unit) < 0):
            chosen.add(unit)
            found += contents[unit]
    while len(totals) > 1 and (closer := [unit for unit in shuffled if unit not in chosen and comes_closer(unit)]):
        unit = min(closer, key=disturbs)
        chosen.add(unit)
        found += contents[unit]
    # None is chosen if every unit has twice the target or more.
    return chosen or set(sorted(shuffled, key=lambda unit: contents[unit].total())[:1])


def _total(contents: Mapping[str, Counter[int]]) -> Counter[int]:
    return sum(contents.values(), Counter())


def _shuffled(units: Collection[str], seed: int, purpose: str) -> list[str]:
    """Sorted by hash: independent of the given order, and a new unit does not move the others."""
    return sorted(units, key=lambda unit: hashlib.sha256(f"{seed}/{purpose}/{unit}".encode()).digest())


def splits_in_column(song_ids: Sequence[SongId], given: Sequence[str]) -> list[Split]:
    """The splits that the dataset itself names."""
    by_name: dict[str, Split] = {split: split for split in get_args(Split)}
    missing = [song_id for song_id, split in zip(song_ids, given or [""] * len(song_ids), strict=True) if split not in by_name]
    if missing:
        raise DataError(
            f"splits: split.protocol is column, but {len(missing)} of {len(song_ids)} songs have no split: {first_of(missing)}. "
            f"Fill the column split of songs.csv with {', '.join(by_name)}, or choose another split.protocol."
        )
    return [by_name[split] for split in given]


def _from_lists(song_ids: Sequence[SongId], folder: Path, left_out: Collection[SongId]) -> list[Split]:
    """The splits according to train.txt, validation.txt and test.txt in `folder`: one id a line, blank lines ignored."""
    are_numbers = all(isinstance(song_id, int) for song_id in song_ids)
    ids = {split: set(_read_ids(folder / f"{split}.txt", are_numbers)) for split in get_args(Split)}
    split_of: dict[SongId, Split] = {song_id: split for split, listed in ids.items() for song_id in listed}
    lists_per_id = Counter(song_id for listed in ids.values() for song_id in listed)
    twice = in_order(song_id for song_id, count in lists_per_id.items() if count > 1)
    unknown = in_order(split_of.keys() - set(song_ids) - set(left_out))
    unlisted = in_order(set(song_ids) - split_of.keys())
    found = {"ids in two lists": twice, "ids of no song in the dataset": unknown, "songs in no list": unlisted}
    problems = [f"{kind} ({len(wrong)}): {first_of(wrong)}" for kind, wrong in found.items() if wrong]
    if problems:
        raise DataError(
            f"{folder}: expected every song of the dataset in one of train.txt, validation.txt, test.txt; found "
            f"{'; '.join(problems)}. Correct the lists or split.lists."
        )
    return [split_of[song_id] for song_id in song_ids]


def _read_ids(path: Path, are_numbers: bool) -> list[SongId]:
    try:
        lines = read_text(path, str(path)).splitlines()
    except StorageError as error:
        raise DataError(f"{error} Expected a text file with one song id a line.") from error
    filled = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not are_numbers:
        return [text for _, text in filled]
    wrong = [f"line {number}: {quoted(text)}" for number, text in filled if not re.fullmatch("[0-9]{1,9}", text)]
    if wrong:
        raise DataError(f"{path}: expected one song id a line, found {first_of(wrong)}. Correct the list.")
    return [int(text) for _, text in filled]
