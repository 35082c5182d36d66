"""The results of `check` and `plan`, as lines for people and as JSON for programs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emotion.errors import DataError, EmotionError, SpecError
from emotion.vit.model_names import names_in_sources
from job.machine.disk import refuse_folders
from job.pipeline.estimate import Estimate, duration, expected
from job.pipeline.final_model import check_final_model
from job.pipeline.folders import JobFolders
from job.pipeline.named_inputs import not_checked, require_named_inputs
from job.pipeline.phase_functions import load_named_weights
from job.pipeline.rehearsal import Expected
from job.pipeline.runner import plan_job
from job.spec.load import load_spec
from job.spec.model import JobSpec, run_name
from job.storage.examine import examine_source


@dataclass
class Checked:
    """The result of `check`. run: name of the run; None if the spec is invalid. weights: whether the file of vit.weights fits, in
    words. data: lines about data.source. not_checked: what only `run` checks. error: the first error."""

    spec: Path
    run: str | None = None
    weights: str = ""
    data: list[str] = field(default_factory=list)
    not_checked: str = ""
    error: EmotionError | None = None

    @property
    def lines(self) -> list[str]:
        if self.error is not None:
            return self.data
        valid = f"{self.spec}: valid, run {self.run}"
        return [f"{valid}; {self.weights}" if self.weights else valid, *self.data, *filter(None, [self.not_checked])]

    def as_json(self) -> dict[str, Any]:
        problems = self.error.problems if isinstance(self.error, SpecError) else [str(self.error)] if self.error else []
        return {
            "spec": str(self.spec),
            "valid": self.error is None,
            "run": self.run,
            "weights": self.weights,
            "data": self.data,
            "not_checked": self.not_checked.removeprefix("not checked: "),
            "problems": list(problems),
            "exit_code": self.error.exit_code if self.error else 0,
        }


def checked(spec_path: Path, overrides: Sequence[str]) -> Checked:
    """Check a spec. An EmotionError is not raised: the result holds it, with everything that was found before it."""
    found = Checked(spec_path)
    try:
        spec = load_spec(spec_path, overrides)
        found.run = run_name(spec)
        models = names_in_sources()
        found.not_checked = not_checked(spec, models)
        require_named_inputs(spec, models)
        found.weights = load_named_weights(spec)
        check_final_model(spec, None)
        examined = examine_source(spec.data, spec.storage, split=spec.split, remote=False)
        found.data = examined.lines
        if examined.refusal:
            raise DataError(examined.refusal)
    except EmotionError as error:
        found.error = error
    return found


@dataclass
class Planned:
    """The result of `plan`. phases: (phase, state), in order. songs: number of usable songs in data.source, if known. measured,
    memory (training phase → component → bytes): None unless --probe is given."""

    run: str
    phases: list[tuple[str, str]]
    data: list[str]
    estimate: Estimate
    songs: int | None = None
    measured: Expected | None = None
    memory: dict[str, dict[str, int]] | None = None

    def lines(self, price_per_hour: float | None = None) -> list[str]:
        lines = [f"run {self.run}"]
        estimated = self.estimate.seconds if self.measured is None else {}
        for name, state in self.phases:
            seconds = estimated.get(name)
            lines.append(f"{name:10}{state}" + ("" if seconds is None else f", about {duration(seconds)}"))
        if self.measured is not None:
            return [*lines, *self.data, "", *self.measured.lines(price_per_hour)]
        if self.estimate.seconds or self.estimate.unknown:
            lines.append(f"expected: {self.estimate.text()}")
        return [*lines, *self.data]

    def as_json(self) -> dict[str, Any]:
        seconds = self.estimate.seconds
        return {
            "run": self.run,
            "phases": [
                {"phase": name, "state": state, "expected_seconds": round(seconds[name], 1) if name in seconds else None}
                for name, state in self.phases
            ],
            "expected_seconds": None if self.estimate.total is None else round(self.estimate.total, 1),
            "judged_by": self.estimate.like or "cost model",
            "data": self.data,
            "measured_seconds": None if self.measured is None else self.measured.seconds,
            "memory": self.memory,
        }


def planned(spec: JobSpec, folders: JobFolders) -> Planned:
    """Plan a run. Raises SpecError as refuse_folders does."""
    refuse_folders(spec, folders.work, folders.scratch)
    phases = plan_job(spec, folders)
    to_do = [name for name, state in phases if not state.startswith("done") and name != "mirror"]
    started = {name: Path(state.removeprefix("started in ")) for name, state in phases if state.startswith("started in /")}
    estimate = expected(spec, folders, to_do, started) if to_do else Estimate()
    examined = examine_source(spec.data, spec.storage, split=spec.split)
    data = [*examined.lines, *(examined.refusal or "").splitlines()]
    return Planned(run_name(spec), phases, data, estimate, examined.songs)


def memory_table(memory: dict[str, dict[str, int]]) -> str:
    lines = [f"{'MiB':14}" + "".join(f"{phase:>10}" for phase in memory)]
    for component in memory["gan"]:
        numbers = [account[component] for account in memory.values()]
        cells = [str(number) if component == "micro_batch" else f"{number / 2**20:.1f}" for number in numbers]
        lines.append(f"{component:14}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)
