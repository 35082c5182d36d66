"""`plan --probe`: estimates how long a job will take here, by a rehearsal. Every phase really runs, on a few generated songs and
with a few steps of each training. The times are then scaled to the songs, steps and clips of the spec. If the dataset is on this
machine, some of its songs are decoded, too.

Quality, stack and evaluate have a part of constant duration and one that grows with the number of songs. Between 32 and 1,800
songs, the sum of both grew about with the square root of that number.

Trainings are counted with all their epochs: an early stop of the ViT makes the job shorter. Waiting, transfers and publishing are
not counted.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from emotion.config import SplitConfig
from emotion.data.layouts import dataset_files, find_dataset
from emotion.data.unused import Unused
from emotion.errors import counted
from emotion.files import make_folder, read_json_lines
from job.environment import available_threads
from job.pipeline.context import PhaseContext
from job.pipeline.costs import split_sizes
from job.pipeline.estimate import duration
from job.pipeline.fetch_inputs import FetchedInputs
from job.pipeline.phases import PHASES
from job.run_folder.receipts import METRICS, write_receipt
from job.spec.location import Generated, Local
from job.spec.model import JobSpec

SONGS = 32  # generated for the rehearsal
CLIPS = 64
WARM_UP_STEPS, MEASURED_STEPS = 4, 8
"""Steps of each training. Enough steps are measured to include the GAN's gradient penalties, which come every few steps."""
ENOUGH_EPOCHS = 100.0
IMPORTED = (
    "emotion.audio.extract",
    "emotion.data.toy_dataset",
    "emotion.evaluation.evaluate",
    "emotion.evaluation.stack",
    "emotion.gan.quality",
    "emotion.gan.synth",
    "emotion.gan.train",
    "emotion.vit.train",
    "matplotlib.backends.backend_agg",
    "sklearn.ensemble",
    "sklearn.model_selection",
    "sklearn.svm",
)
REAL_SONGS = 4  # of a dataset on this machine, decoded to time the phase features


@dataclass
class _Training:
    """Times of one training in the rehearsal, in seconds since 1970. last: number of its steps; begun: the start of each step;
    asked: each call of should_stop. The last such call before a step starts is the end of the previous step."""

    last: int
    begun: list[float] = field(default_factory=list)
    asked: list[float] = field(default_factory=list)

    def is_used_up(self, step: int) -> bool:
        self.begun.append(time.time())
        return step >= self.last

    def should_stop(self) -> bool:
        self.asked.append(time.time())
        return False

    def step_seconds(self, validated: list[float]) -> float:
        """Seconds per step, excluding validations. validated: the times at which they ended."""
        ends = [max(asked for asked in self.asked if asked <= begun) for begun in self.begun[1:]]
        starts = [
            max([begun, *(moment for moment in validated if begun <= moment <= end)])
            for begun, end in zip(self.begun, ends, strict=False)
        ]
        durations = [end - start for start, end in zip(starts, ends, strict=True)][WARM_UP_STEPS - 1 :]
        return sum(durations) / len(durations)

    def validation_seconds(self, validated: list[float]) -> list[float]:
        return [moment - max(begun for begun in self.begun if begun <= moment) for moment in validated]


@dataclass(frozen=True)
class Expected:
    """The estimate. seconds: phase → seconds; notes: phase → how the seconds were found."""

    seconds: dict[str, float]
    notes: dict[str, str]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def lines(self, price_per_hour: float | None) -> list[str]:
        found = [f"{'expected':14}{'seconds':>10}"]
        found += [f"{phase:14}{seconds:>10.1f}  {self.notes.get(phase, '')}".rstrip() for phase, seconds in self.seconds.items()]
        price = "" if price_per_hour is None else f", price {self.total / 3600 * price_per_hour:.2f}"
        return [
            *found,
            f"in all {duration(self.total)}{price}, from the start; without waits and transfers, less where the ViT stops early",
        ]


def expected_times(spec: JobSpec, songs: int, work: Path) -> Expected:
    """Run the rehearsal. songs: number of usable songs in data.source; work: an empty folder. Raises what the phases raise."""
    began = time.perf_counter()
    for name in IMPORTED:
        import_module(name)
    seconds: dict[str, float] = {"imports": time.perf_counter() - began}
    from emotion.training.schedule import steps_of

    short = rehearsed_spec(spec)
    last = {"gan": WARM_UP_STEPS + max(MEASURED_STEPS, 2 * spec.gan.penalty_every_steps), "vit": WARM_UP_STEPS + MEASURED_STEPS}
    trainings = {phase: _Training(number) for phase, number in last.items()}
    logging.disable(logging.WARNING)  # warnings are not meant for so few songs and steps
    try:
        measured = _rehearse(short, work, trainings)
    finally:
        logging.disable(logging.NOTSET)
    training, validation = split_sizes(spec, songs)
    _, rehearsed_validation = split_sizes(short, SONGS)
    grown = songs / SONGS

    found: dict[str, float] = {}
    notes: dict[str, str] = {}
    is_generated = isinstance(spec.source, Generated)
    found["stage"] = measured["stage"] * grown if is_generated else 0.0
    found["features"] = _features_seconds(spec, songs) or measured["features"] * grown
    found["split"] = measured["split"]
    steps = steps_of(spec.gan.epochs, training, spec.gan.batch_size)
    of_step = trainings["gan"].step_seconds([])
    found["gan"] = measured["gan"] + (steps - last["gan"]) * of_step
    notes["gan"] = f"{counted(steps, 'step')} of {1000 * of_step:.3g} ms"
    clips_seconds = measured["synth clips"]
    found["synth"] = measured["synth"] - clips_seconds + clips_seconds * spec.synth.songs / short.synth.songs
    found["quality"] = measured["quality"] * math.sqrt(grown)
    validated = [record["time"] for record in read_json_lines(work / "vit" / METRICS) if "epoch" in record]
    of_step, validations = trainings["vit"].step_seconds(validated), trainings["vit"].validation_seconds(validated)
    of_validation = min(validations) * validation / rehearsed_validation
    steps = steps_of(spec.vit.epochs, training, spec.vit.batch_size - spec.vit.synthetic_per_batch)
    epochs = math.ceil(spec.vit.epochs) + spec.begins_with_probe if validation else 0
    fixed = measured["vit"] - sum(validations) - last["vit"] * of_step
    times = spec.vit_trainings
    found["vit"] = fixed + times * (steps * of_step + epochs * of_validation)
    steps_text, validations_text = counted(times * steps, "step"), counted(times * epochs, "validation")
    notes["vit"] = f"{steps_text} of {1000 * of_step:.3g} ms, {validations_text} of {1000 * of_validation:.3g} ms"
    if spec.begins_with_probe:
        notes["vit"] += ", without the linear probe"
    for phase in ("stack", "evaluate"):
        found[phase] = measured[phase] * math.sqrt(grown)
        if spec.vit.weights != "random":
            notes[phase] = "without the embeddings by pretrained weights"
    return Expected(seconds | found, notes)


def rehearsed_spec(spec: JobSpec) -> JobSpec:
    """The spec of the rehearsal: few songs and clips, but unchanged settings that affect the cost of a step. Weights are random,
    which costs the same. No training ends before its steps are measured, and all blocks of the ViT learn from the start."""
    data = spec.data.model_copy(
        update={"source": f"generated:{SONGS}", "scale": None, "excerpt_seconds": None, "shortest_seconds": 0.0}
    )
    synth = spec.synth.model_copy(update={"songs": min(CLIPS, spec.synth.songs)})
    gan = spec.gan.model_copy(update={"epochs": ENOUGH_EPOCHS})
    all_learn = {"frozen_epochs": 0.0, "unfreeze_epochs": 0.0, "epochs": ENOUGH_EPOCHS, "patience_epochs": int(ENOUGH_EPOCHS)}
    vit = spec.vit.model_copy(update={"weights": "random", "teacher": None, "synthetic": "always", **all_learn})
    changed = {"data": data, "split": SplitConfig(), "init_from": None, "gan": gan, "synth": synth, "vit": vit}
    return spec.model_copy(update=changed)


def _rehearse(spec: JobSpec, work: Path, trainings: dict[str, _Training]) -> dict[str, float]:
    """Phase → seconds; "synth clips": seconds for the clips of phase synth only."""
    measured: dict[str, float] = {}
    folders: dict[str, Path] = {}
    for phase in PHASES[:-1]:  # publish would need the receipts of a run
        out = folders[phase.name] = work / phase.name
        make_folder(out)
        should_stop: Callable[[], bool] = trainings[phase.name].should_stop if phase.name in trainings else lambda: False
        inputs = {name: folders[name] for name in phase.dependencies}
        context = PhaseContext(spec, FetchedInputs(None, None), inputs, out, work, should_stop)
        if phase.name in trainings:
            context.is_used_up = trainings[phase.name].is_used_up
        began, clock = time.perf_counter(), time.time()
        phase.run(context)
        measured[phase.name] = time.perf_counter() - began
        if phase.name == "synth":
            measured["synth clips"] = max(0.0, (out / "songs.csv").stat().st_mtime - clock)
        write_receipt(out, phase.name, "", {}, {}, context.notes, context.digests)
    return measured


def _features_seconds(spec: JobSpec, songs: int) -> float | None:
    """Seconds for `songs` songs, extrapolated from a sample of the dataset; None if it is not a local folder."""
    if not isinstance(spec.source, Local) or not spec.source.path.is_dir():
        return None
    from emotion.audio.mel import LogMel
    from emotion.audio.song_decoding import decode_song

    root, unused = spec.source.path, Unused()
    found = find_dataset(root, dataset_files(root, unused), unused, spec.data.scale).songs
    chosen = found[:: max(1, len(found) // REAL_SONGS)][:REAL_SONGS]
    log_mel = LogMel(spec.mel)
    began = time.perf_counter()
    for song in chosen:
        decode_song(root / song.audio, log_mel, spec.data.longest_seconds)
    of_song = (time.perf_counter() - began) / len(chosen)
    return of_song * songs / (spec.device.threads or available_threads())
