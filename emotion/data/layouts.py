"""The layouts of datasets, and which one a folder has: a `songs.csv` in it, or numbered songs as in DEAM, EmoMusic and PMEmo."""

from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath

from emotion.data import deam, songs_table
from emotion.data.csv_table import parse_table, read_text
from emotion.data.folder_files import files_below
from emotion.data.label_scale import DEAM_SCALE, Scale, shown_scale
from emotion.data.label_tables import PMEMO_DEVIATIONS, form_of
from emotion.data.songs import Dataset
from emotion.data.songs_table import SONGS_TABLE
from emotion.data.unused import Unused
from emotion.errors import DataError, SpecError, counted


def has_songs_table(paths: Iterable[str]) -> bool:
    """paths: of a dataset's files, relative to its folder."""
    return SONGS_TABLE in paths


def has_label_files(files: Sequence[PurePath]) -> bool:
    """Whether there is a table of a dataset whose scale is known."""
    return any(deam.LABEL_FILES.fullmatch(path.name) for path in files)


def is_dataset_file(path: str, with_songs_table: bool) -> bool:
    """Whether a file at this path, relative to the dataset's folder, may belong to it, by its name alone.

    with_songs_table: whether the folder has one; then label files of DEAM belong, too, so that having both is noticed.
    """
    if with_songs_table and songs_table.is_collection_file(path):
        return True
    return deam.is_dataset_file(path) and (not with_songs_table or bool(deam.LABEL_FILES.fullmatch(path.rpartition("/")[2])))


def dataset_files(root: Path, unused: Unused | None = None) -> list[Path]:
    """The files of the dataset in a folder, sorted; see `files_below`. unused: gets everything else."""
    with_songs_table = (root / SONGS_TABLE).exists()
    return files_below(root, lambda path: is_dataset_file(path, with_songs_table), Unused() if unused is None else unused)


def files_needed_to_join(root: Path, files: Sequence[Path]) -> list[Path]:
    """The files that `find_dataset` opens."""
    if root / SONGS_TABLE in files:
        return [root / SONGS_TABLE]
    return deam.files_needed_to_join(files)


def find_dataset(root: Path, files: Sequence[Path], unused: Unused, scale: Scale | None) -> Dataset:
    """The songs of a dataset, sorted by id, and what is wrong with the others.

    files: as `dataset_files` returns them; only those of `files_needed_to_join` must be below `root`. unused: what else there is;
    gets audio without labels. scale: `data.scale`. Raises DataError for no labels or audio at all, and for two layouts in one
    folder; SpecError for a scale that is missing, or given where the dataset fixes it.
    """
    if root / SONGS_TABLE not in files:
        if scale is not None and has_label_files(files):
            raise SpecError(f"data.scale: the tables in {root} have a scale of their own; leave data.scale out.")
        return deam.find_dataset(root, files, unused)
    others = [path for path in files if deam.LABEL_FILES.fullmatch(path.name)]
    if others:
        raise DataError(
            f"{root}: both {SONGS_TABLE} and {others[0].relative_to(root)}, so it is unclear which labels to use. Move one away."
        )
    return songs_table.find_collection(root, files, unused, scale)


def layout_name(root: Path, files: Sequence[Path]) -> str:
    """Such as songs.csv or EmoMusic, of files that `find_dataset` accepts."""
    if root / SONGS_TABLE in files:
        return SONGS_TABLE
    table = next(path for path in files if deam.LABEL_FILES.fullmatch(path.name) and path.name.lower() != PMEMO_DEVIATIONS)
    return f"in the layout of {form_of(parse_table(table.name, read_text(table, table.name))).name}"


def description(dataset: Dataset) -> str | None:
    """What the labels of a dataset are, for `check` and `plan`; None for DEAM's, which are always alike."""
    songs = dataset.songs
    if dataset.scale == DEAM_SCALE and all(isinstance(song.song_id, int) for song in songs):
        return None
    rated = sum(song.valence_sd is not None and song.arousal_sd is not None for song in songs)
    deviations = f"standard deviations of {counted(rated, 'song')}" if rated else "no standard deviations, so no ceiling"
    found = [f"labels on {shown_scale(dataset.scale)}", deviations, counted(len({song.group for song in songs}), "group")]
    for split in songs_table.SPLITS:
        count = sum(song.split == split for song in songs)
        found += [f"{count} for {split}"] if count else []
    return f"data: {', '.join(found)}"
