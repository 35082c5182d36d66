"""`init`: writes a commented spec for the songs in a folder: a preset, adapted to their layout, groups, faults and number."""

import importlib.resources
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from emotion.config import DataConfig, Section, SplitConfig
from emotion.data.faults import may_leave_out, refusal
from emotion.data.label_scale import Scale, shown_scale
from emotion.data.layouts import dataset_files, find_dataset, has_label_files, has_songs_table, layout_name
from emotion.data.songs import Dataset, Song
from emotion.data.songs_table import SPLITS, scale_question
from emotion.data.splits import make_split
from emotion.data.unused import Unused
from emotion.errors import DataError, SpecError, StorageError, counted, printable, system_reason
from emotion.proc import has_gpu
from emotion.terminal import size_text
from job.environment import available_threads, prepare_environment, temporary_caches
from job.pipeline.estimate import expected
from job.pipeline.folders import job_folders
from job.pipeline.phases import PHASES
from job.spec.load import load_spec
from job.spec.location import Local, parse_source
from job.spec.model import JobSpec, written

SONGS_FOR_DEAMS_RECIPE = 300
LIBRARIES_BYTES = 550 * 2**20  # a process of the demo takes 600 MiB, of which 35 are tensors
ANY_SCALE: Scale = (-1e6, 1e6)
FEWEST_SONGS = 6  # three for training, two for validation, one for the test


@dataclass(frozen=True)
class Found:
    """The dataset in the folder. songs: usable songs; left_out: number of songs with faults; groups: number of groups of the
    usable songs, None if each song is its own group."""

    root: Path
    layout: str
    scale: Scale
    songs: list[Song]
    left_out: int
    groups: int | None
    unused: list[str]
    warning: str = ""

    def lines(self) -> list[str]:
        groups = counted(self.groups, "group") if self.groups else "no groups: songs of one artist cannot be kept together"
        songs = f"{counted(len(self.songs), 'song')}, {self.layout}, ratings on {shown_scale(self.scale)}, {groups}"
        left_out = f"left out: {counted(self.left_out, 'song')} with faults; `emotion-job check` names them"
        notes = [*filter(None, [self.warning]), *([left_out] if self.left_out else [])]
        return [f"{printable(self.root)}: {songs}", *notes, *self.unused]


def make_spec(source: str, scale: Scale | None, out: Path | None, preset: str | None = None) -> str:
    """Write the spec. preset: its name; by default the number of songs and the GPU decide. Returns a text: the dataset, the
    estimated time and memory, and the next commands. Raises SpecError if the file exists, if source is no folder, or if the scale
    is missing; DataError for songs that cannot be used as they are."""
    try:
        location = parse_source(source)
    except ValueError as error:
        raise SpecError(f"DATA: {error}") from None
    if not isinstance(location, Local):
        raise SpecError(f"DATA: init looks into a folder, and {location} is none. Copy a preset and set data.source in it.")
    root = location.path
    if root.is_file():
        raise SpecError(f"DATA: {root} is a file; name its folder.")
    name = re.sub(r"[^a-z0-9]+", "-", root.name.lower())[:40].strip("-") or "songs"
    path = out or Path(f"{name}.yaml")
    if path.exists() or path.is_symlink():
        raise SpecError(f"--out: {path} exists, and init overwrites nothing. Name another file, or move it away.")
    try:
        found = find_songs(root, scale)
    except DataError as error:
        raise DataError(str(error).replace("correct data.source", "name another folder")) from error
    chosen = preset or ("deam" if has_gpu() and len(found.songs) >= SONGS_FOR_DEAMS_RECIPE else "small")
    split = split_for(found.songs)
    spec = _spec(name, found, chosen, split)
    estimate = expected(spec, job_folders(Path("work"), None), [phase.name for phase in PHASES], {}).text()
    memory = _memory_text(spec)
    folds = spec.split.folds if spec.split.protocol == "kfold" else 1
    expectations = [f"expected{f' for each of {folds} folds' if folds > 1 else ''}: {estimate}", *memory]
    if folds > 1:
        others = f"--set split.fold=1 to --set split.fold={folds - 1}"
        expectations.append(f"folds: without {others} a run computes fold 0 alone; emotion-job collect puts them together")
    comes_from = f"preset {chosen}"
    if preset is None:
        why = f"{SONGS_FOR_DEAMS_RECIPE} songs or more, and a GPU on the machine where init ran"
        comes_from += f" ({why if chosen == 'deam' else f'not {why}'})"
    text = "\n".join(_yaml_lines(path, spec, found, comes_from, expectations)) + "\n"
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise StorageError.of(error, f"--out: {path} cannot be written ({system_reason(error)}). Name another file.") from error
    steps = [f"written: {path}", f"next: emotion-job check {path}, then emotion-job run {path}{_work_option(root)}"]
    return "\n".join([*found.lines(), *expectations, *steps])


def _work_option(root: Path) -> str:
    """The option --work for `run`, if the default folder (in the current one) would be inside the dataset; else an empty text."""
    dataset = root.resolve()
    if not Path("work").resolve().is_relative_to(dataset):
        return ""
    beside = Path(os.path.relpath(dataset.parent)) / ("runs" if dataset.name == "work" else "work")
    return f" --work {beside}"


def find_songs(root: Path, scale: Scale | None) -> Found:
    """Find the songs in a folder. Raises DataError for too few songs, or more faults than may be left out; SpecError for a wrong
    scale."""
    unused = Unused()
    files = dataset_files(root, unused)
    has_table = has_songs_table({path.relative_to(root).as_posix() for path in files})
    if has_table and scale is None:
        raise SpecError(f"--scale: {_range_text(root, files)}. Name the scale that the raters had, such as --scale 1 9.")
    if scale is not None and not has_table and has_label_files(files):
        raise SpecError(f"--scale: the tables in {root} have a scale of their own. Leave --scale out.")
    try:
        config = DataConfig(source=str(root), scale=scale, faults="drop")
    except ValidationError:
        raise SpecError(
            f"--scale: expected the lowest rating and then a higher one, found {shown_scale(scale or ANY_SCALE)}."
        ) from None
    dataset = find_dataset(root, files, unused, scale)
    songs, unusable = dataset.songs, {fault.song_id for fault in dataset.faults} - {None}
    count = len({song.song_id for song in songs} | unusable)
    advice = f"At most {counted(may_leave_out(count, config), 'song')} may be left out. Correct the others, and call init again."
    if scale is not None:
        advice = scale_question(dataset.faults, scale) or advice
    if report := refusal(dataset.faults, count, config, "in labels and names of files", advice):
        raise DataError(report.replace("(data.scale)", "(--scale)"))
    if len(songs) < FEWEST_SONGS:
        usable = counted(len(songs), "song")
        raise DataError(f"{root}: {usable} can be used, and {FEWEST_SONGS} are needed at least. Add songs with labels.")
    groups = len({song.group for song in songs})
    return Found(
        root,
        layout_name(root, files),
        dataset.scale,
        songs,
        len(unusable),
        groups if groups < len(songs) else None,
        list(unused.lines().values()),
        _narrow_range(dataset) if has_table else "",
    )


def _narrow_range(dataset: Dataset) -> str:
    """A warning if the ratings span less than half of the scale: raters with that scale would have used more of it."""
    ratings = _ratings(dataset, dataset.scale)
    low, high = dataset.scale
    if 2 * (max(ratings) - min(ratings)) >= high - low:
        return ""
    return (
        f"warning: the ratings run from {min(ratings):g} to {max(ratings):g}, less than half of --scale {low:g} {high:g}. "
        "Is the scale right?"
    )


def _ratings(dataset: Dataset, scale: Scale) -> list[float]:
    """All ratings of valence and arousal, on `scale`."""
    middle, half = (scale[0] + scale[1]) / 2, (scale[1] - scale[0]) / 2
    return [round(middle + half * label, 6) for song in dataset.songs for label in (song.valence, song.arousal)]


def _range_text(root: Path, files: Sequence[Path]) -> str:
    """A sentence about the range of the numbers in songs.csv."""
    dataset: Dataset = find_dataset(root, files, Unused(), ANY_SCALE)
    ratings = _ratings(dataset, ANY_SCALE)
    if not ratings:
        return f"{root}/songs.csv does not say on which scale its numbers are"
    return f"the numbers in {root}/songs.csv run from {min(ratings):g} to {max(ratings):g}, which does not say on which scale"


def split_for(songs: Sequence[Song]) -> dict[str, Any]:
    """Keys of the section split: the dataset's own split, or as many folds, at most five, as the groups can fill."""
    if all(song.split in SPLITS for song in songs):
        return {"protocol": "column"}
    ids, groups = [song.song_id for song in songs], [song.group for song in songs]
    for settings in ({}, {"validation_fraction": 0.35}, {"grouped": False}, {"validation_fraction": 0.35, "grouped": False}):
        for folds in (5, 4, 3, 2):
            keys = {"folds": folds, "validation_fraction": 0.2, **settings}
            try:
                for fold in range(folds):
                    make_split(ids, groups, SplitConfig.model_validate({**keys, "fold": fold}), [])
            except DataError:
                continue
            return keys
    found = f"{counted(len(ids), 'song')} in {counted(len(set(groups)), 'group')}"
    raise DataError(
        f"{found} are too few for a split into training, validation and test, even where the songs of a group are divided. "
        "Add songs with labels."
    )


def _spec(name: str, found: Found, preset: str, split: dict[str, Any]) -> JobSpec:
    """The preset with name, data and split for these songs; of its keys of data only the length of DEAM's excerpts is kept."""
    with importlib.resources.as_file(importlib.resources.files("job") / "specs" / f"{preset}.yaml") as path:
        spec = load_spec(path)
    data: dict[str, Any] = {"source": str(found.root)}
    if found.layout == "songs.csv":
        data["scale"] = found.scale
    if found.layout.endswith(" DEAM") and spec.data.excerpt_seconds is not None:
        data["excerpt_seconds"] = spec.data.excerpt_seconds
    if found.left_out:
        data["faults"] = "drop"
    sections = {"data": DataConfig.model_validate(data), "split": SplitConfig.model_validate(split)}
    return spec.model_copy(update={"name": name, **sections})


def _memory_text(spec: JobSpec) -> list[str]:
    """A line with the memory that the trainings need, predicted by a step on tensors without memory; no line without torch."""
    if find_spec("torch") is None:
        return []
    prepare_environment(spec.device.threads or available_threads())
    from job.pipeline.phase_functions import predicted_memory

    with temporary_caches():
        peaks = {phase: account["peak"] for phase, account in predicted_memory(spec).items()}
    steps = f"tensors of a step: GAN {size_text(peaks['gan'])}, ViT {size_text(peaks['vit'])}"
    if spec.device.kind != "cpu" and has_gpu():
        return [f"memory: {size_text(max(peaks.values()))} of the GPU ({steps})"]
    return [f"memory: about {size_text(max(peaks.values()) + LIBRARIES_BYTES)} ({steps}; the rest is Python with its libraries)"]


def _yaml_lines(path: Path, spec: JobSpec, found: Found, comes_from: str, expectations: Sequence[str]) -> Iterator[str]:
    """The lines of the file: a comment, then the keys that are set, each with its description."""
    yield f"# Written by emotion-job init, from the {comes_from}. Every key that could be here, with its"
    yield "# default: emotion-job schema, or job/specs/README.md. Check it, then run it:"
    yield "#"
    yield f"#   emotion-job check {printable(path)}"
    yield f"#   emotion-job run {printable(path)}{_work_option(found.root)}"
    yield "#"
    yield from (f"# {line}" for line in (*found.lines(), *expectations))
    yield "#"
    for key, field in JobSpec.model_fields.items():
        value = getattr(spec, key)
        if key not in spec.model_fields_set or value is None:
            continue
        if not isinstance(value, Section):
            yield _line(key, value, field.description)
            continue
        yield f"{key}:"
        for name, inner in type(value).model_fields.items():
            if name in value.model_fields_set:
                yield f"  {_line(inner.alias or name, getattr(value, name), inner.description)}"


def _line(key: str, value: object, description: str | None) -> str:
    return f"{key}: {written(value)}" + (f"  # {description}" if description else "")
