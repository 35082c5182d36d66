"""Estimates how long the phases of a run will take, from earlier runs below the same --work or from the cost model in costs.py.

An earlier run need not have the same spec: the cost model scales its times to this spec. Only phases that ended in the first
attempt of their run are used, because a resumed phase records the seconds of its last attempt alone.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from emotion.data.folder_files import files_below
from emotion.data.songs import AUDIO_FILE
from emotion.data.unused import Unused
from emotion.errors import EmotionError
from emotion.files import read_json
from emotion.proc import has_gpu
from job.pipeline.costs import GENERATED_SECONDS, Songs, seconds_of, seconds_of_sound
from job.pipeline.folders import JobFolders
from job.run_folder.attempts import paired, read_attempts
from job.run_folder.progress import PROGRESS
from job.run_folder.receipts import RECEIPT
from job.spec.load import load_spec
from job.spec.location import Generated, Local
from job.spec.model import JobSpec

EARLIER_RUNS = 5  # how many of the newest runs are read
TRAININGS = ("gan", "vit")


@dataclass
class Estimate:
    """Estimated durations. seconds: phase → remaining seconds. unknown: phases without an estimate; why: the reason for that.
    like: name of the earlier run that the estimate is based on; None if it is based on the cost model alone. modelled: phases
    that no earlier run has, estimated by the cost model."""

    seconds: dict[str, float] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    like: str | None = None
    modelled: list[str] = field(default_factory=list)
    why: str = ""

    @property
    def total(self) -> float | None:
        return None if self.unknown else sum(self.seconds.values())

    def text(self) -> str:
        """The estimate in words, for messages."""
        if self.unknown:
            return f"how long {', '.join(self.unknown)} will take is not known: {self.why}"
        about = f"about {duration(sum(self.seconds.values()))}"
        if self.like is not None:
            rest = f" and, for {', '.join(self.modelled)}, by a cost model" if self.modelled else ""
            return f"{about}, based on the earlier run {self.like}{rest}"
        return f"{about} on two free cores, by a cost model, as there is no earlier run"


def duration(seconds: float) -> str:
    """A duration as text, such as 45 s, 12 min or 3 h 20 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{round(seconds)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def songs_at(spec: JobSpec) -> Songs | None:
    """The audio files at data.source, by name and size alone; None for object storage, and for a folder that is not here."""
    source = spec.source
    if isinstance(source, Generated):
        return Songs(source.songs, source.songs * GENERATED_SECONDS, 0)
    if not isinstance(source, Local) or not source.path.is_dir():
        return None
    sizes = [
        (path.suffix, path.stat().st_size)
        for path in files_below(source.path, lambda name: AUDIO_FILE.fullmatch(name) is not None, Unused())
    ]
    return Songs(len(sizes), sum(seconds_of_sound(suffix, size) for suffix, size in sizes), sum(size for _, size in sizes))


def expected(spec: JobSpec, folders: JobFolders, phases: Sequence[str], started: Mapping[str, Path]) -> Estimate:
    """Estimate the duration of these phases. started: phase → its folder, if an earlier attempt has started it."""
    found = Estimate()
    try:
        songs = songs_at(spec)
    except (EmotionError, OSError):
        songs = None
    if songs is None or not songs.count:
        return Estimate(unknown=list(phases), why="the songs are not on this machine yet")
    on_gpu = spec.device.kind == "cuda" or (spec.device.kind == "auto" and has_gpu())
    speeds, found.like = _speeds(folders, "cuda" if on_gpu else "cpu")
    for phase in phases:
        seconds = seconds_of(phase, spec, songs)
        if seconds is None or (on_gpu and phase in TRAININGS and phase not in speeds):
            why = f"the cost model does not know {spec.vit.model}"
            if seconds is not None:
                why = "no comparable run is in this --work; the progress bar of a training shows its remaining time"
            found.why = why if found.why in ("", why) else f"{found.why}; {why}"
            found.unknown.append(phase)
            continue
        found.modelled += [phase] if phase not in speeds else []
        found.seconds[phase] = seconds * speeds.get(phase, 1.0) * _share_left(started.get(phase))
    return found


def _share_left(folder: Path | None) -> float:
    """The share of a training that is left, by its newest progress report; 1 without a report."""
    if folder is not None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
            progress = read_json(folder / PROGRESS)
            return 1 - float(progress["step"] / progress["steps"])
    return 1.0


def _speeds(folders: JobFolders, device: str) -> tuple[dict[str, float], str | None]:
    """Phase → its measured seconds divided by those of the cost model, from the newest run that has the phase; and the name of
    the newest run that was used."""
    runs = sorted(folders.work.glob("*/split-*/" + RECEIPT), key=lambda path: path.stat().st_mtime, reverse=True)[:EARLIER_RUNS]
    found: dict[str, float] = {}
    like = None
    for receipt in runs:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, EmotionError):
            of_run = _speeds_of(receipt.parents[1], receipt.parent, folders.scratch, device)
            if of_run and like is None:
                like = receipt.parents[1].name
            found = of_run | found
    return found, like


def _speeds_of(run: Path, split: Path, scratch: Path, device: str) -> dict[str, float]:
    spec = load_spec(run / "spec.yaml")
    starts = [start for start, _ in paired(read_attempts(run))]
    begin, end = starts[0]["time"], starts[1]["time"] if len(starts) > 1 else float("inf")
    songs = Songs(len((split / "split.csv").read_text(encoding="utf-8").splitlines()) - 1, 0.0, 0)
    features = scratch / f"features-{read_json(split / RECEIPT)['inputs']['features'][:12]}"
    folders = [*run.glob("*-*/"), features]
    if (features / RECEIPT).exists():
        folders.append(scratch / f"stage-{read_json(features / RECEIPT)['inputs']['stage'][:12]}")
    speeds = {}
    for folder in folders:
        path = folder / RECEIPT
        if not path.exists() or not begin <= path.stat().st_mtime <= end:
            continue
        receipt = read_json(path)
        phase, measured = receipt["phase"], receipt["measured"]
        if phase in TRAININGS and measured["device"]["kind"] != device:
            continue
        of_phase = songs_at(spec) if phase in ("stage", "features") else songs
        by_model = seconds_of(phase, spec, of_phase) if of_phase is not None else None
        if by_model:
            speeds[phase] = measured["seconds"] / by_model
    return speeds
