"""A sweep: a base spec, times settings, seeds and folds = many specs, each of which is one task of an array."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from emotion.config import Section
from emotion.errors import SpecError
from emotion.files import digest_of
from job.spec.load import load_document, load_spec, spec_of
from job.spec.model import JobSpec, fingerprint, run_name

MOST_TASKS = 10_000
"""More is a mistake in a list. Sites allow fewer."""


class SettingConfig(Section):
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,39}$", description="1 to 40 letters, digits, dots, hyphens"
    )
    set: tuple[str, ...] = Field((), description="KEY=VALUE as after --set, put into the base spec for this one")


class SweepConfig(Section):
    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9-]{0,39}$",
        description="1 to 40 lower-case letters, digits and hyphens, the first not a hyphen",
    )
    spec: str = Field(description="the base spec; a relative path starts at the sweep's folder", min_length=1)
    set: tuple[str, ...] = Field((), description="KEY=VALUE as after --set, put into the base spec for all settings")
    folds: tuple[int, ...] | None = Field(
        None, min_length=1, description="test folds; not given: all that a kfold spec has"
    )
    seeds: tuple[int, ...] | None = Field(None, min_length=1, description="not given: that of the base spec")
    settings: tuple[SettingConfig, ...] = Field(
        (SettingConfig(name="base"),), min_length=1, description="what is compared; not given: the base spec alone"
    )

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        for what, values in (
            ("settings", [setting.name for setting in self.settings]),
            ("folds", self.folds or ()),
            ("seeds", self.seeds or ()),
        ):
            twice = sorted({str(value) for value in values if list(values).count(value) > 1})
            if twice:
                raise ValueError(f"{what}: {', '.join(twice)} stands there twice")
        return self


@dataclass(frozen=True)
class SweepTask:
    """One run of a sweep. fold: None where the split has none."""

    setting: str
    seed: int
    fold: int | None
    spec: JobSpec

    @property
    def label(self) -> str:
        fold = "" if self.fold is None else f" fold={self.fold}"
        return f"{self.setting} seed={self.seed}{fold}"


@dataclass(frozen=True)
class Sweep:
    name: str
    tasks: list[SweepTask]

    @property
    def specs(self) -> dict[int, JobSpec]:
        """By the index of the task."""
        return {index: task.spec for index, task in enumerate(self.tasks)}

    @property
    def folder_name(self) -> str:
        """NAME-KEY12: the same sweep has the same folder, another one another."""
        return f"{self.name}-{digest_of([fingerprint(task.spec) for task in self.tasks])[:12]}"


def load_sweep(path: Path) -> Sweep:
    """Every task of a sweep file, its spec validated as a whole.

    Raises SpecError: for what is wrong with the file or with a spec of it, for two tasks that are the same job, for too many.
    """
    config = load_document(path, SweepConfig, "sweep")
    base = path.absolute().parent / Path(config.spec).expanduser()
    tasks: list[SweepTask] = []
    for setting in config.settings:
        try:
            first = load_spec(base, [*config.set, *setting.set])
        except SpecError as error:
            raise SpecError(f"{path}: setting {setting.name}: {error}") from None
        has_folds = first.split.protocol == "kfold"
        if config.folds is not None and not has_folds:
            raise SpecError(
                f"{path}: folds are listed, but setting {setting.name} has split.protocol {first.split.protocol}; leave them out"
            )
        folds: tuple[int | None, ...] = config.folds or (tuple(range(first.split.folds)) if has_folds else (None,))
        seeds = config.seeds or (first.seed,)
        if len(tasks) + len(folds) * len(seeds) > MOST_TASKS:
            raise SpecError(f"{path}: more than {MOST_TASKS} tasks; list fewer settings, seeds or folds")
        for seed in seeds:
            tasks += [SweepTask(setting.name, seed, fold, _varied(path, first, seed, fold)) for fold in folds]
    _refuse_duplicates(path, tasks)
    return Sweep(config.name, tasks)


def _varied(path: Path, spec: JobSpec, seed: int, fold: int | None) -> JobSpec:
    value = spec.model_dump(mode="json", by_alias=True)
    value["seed"] = seed
    if fold is not None:
        value["split"]["fold"] = fold
    try:
        return spec_of(value)
    except SpecError as error:
        raise SpecError(f"{path}: seed {seed}, fold {fold}: {error}") from None


def _refuse_duplicates(path: Path, tasks: list[SweepTask]) -> None:
    seen: dict[str, SweepTask] = {}
    for task in tasks:
        # Another name alone is another folder, and the same result twice in the tables.
        other = seen.setdefault(digest_of({**task.spec.result_fields(), "name": None}), task)
        if other is not task:
            raise SpecError(
                f"{path}: {other.label} and {task.label} are the same job, {run_name(task.spec)}: their settings differ in "
                f"nothing that changes a result. Leave one of them out."
            )


def distinct_features(specs: Mapping[int, JobSpec]) -> list[int]:
    """Tasks, of these with their specs, whose features serve all others: one for each dataset with each way to hear it."""
    found: dict[str, int] = {}
    for index, spec in specs.items():
        what = spec.result_fields()
        found.setdefault(digest_of([spec.data.source, what["data"], what["mel"]]), index)
    return [*found.values()]
