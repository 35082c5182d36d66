"""A sweep: a base spec × settings × seeds × folds gives many specs, one for each task of an array."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from emotion.config import Section
from emotion.errors import SpecError
from emotion.files import digest_of
from job.spec.load import load_document, load_spec, spec_of
from job.spec.location import refuse_misread
from job.spec.model import JobSpec, fingerprint, run_name

MAX_TASKS = 10_000
"""More tasks than this are treated as a mistake in a list. Sites may allow fewer."""


class SettingConfig(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,39}$", description="1 to 40 letters, digits, dots, hyphens")
    set: tuple[str, ...] = Field((), description="KEY=VALUE as after --set, for this setting")


class SweepConfig(Section):
    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9-]{0,39}$", description="1 to 40 lower-case letters, digits and hyphens, no hyphen first"
    )
    spec: str = Field(description="the base spec; a relative path starts at the folder of the sweep file", min_length=1)
    set: tuple[str, ...] = Field((), description="KEY=VALUE as after --set, for all settings")
    folds: tuple[int, ...] | None = Field(None, min_length=1, description="test folds; default: all of a kfold spec")
    seeds: tuple[int, ...] | None = Field(None, min_length=1, description="default: that of the base spec")
    settings: tuple[SettingConfig, ...] = Field(
        (SettingConfig(name="base"),), min_length=1, description="what is compared; default: the base spec alone"
    )

    @field_validator("spec")
    @classmethod
    def _is_a_path(cls, spec: str) -> str:
        refuse_misread(spec)
        return spec

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [setting.name for setting in self.settings]
        for key, values in (("settings", names), ("folds", self.folds or ()), ("seeds", self.seeds or ())):
            if repeated := sorted({str(value) for value in values if list(values).count(value) > 1}):
                raise ValueError(f"{key}: {', '.join(repeated)} is listed twice")
        return self


@dataclass(frozen=True)
class SweepTask:
    """One run of a sweep. fold: None if the split protocol has no folds."""

    setting: str
    seed: int
    fold: int | None
    spec: JobSpec

    @property
    def label(self) -> str:
        return f"{self.setting} seed={self.seed}" + ("" if self.fold is None else f" fold={self.fold}")


@dataclass(frozen=True)
class Sweep:
    name: str
    tasks: list[SweepTask]

    @property
    def specs(self) -> dict[int, JobSpec]:
        """Task index → spec."""
        return {index: task.spec for index, task in enumerate(self.tasks)}

    @property
    def folder_name(self) -> str:
        """NAME-KEY12. The key is a digest of the fingerprints of all specs: the same sweep has the same folder."""
        return f"{self.name}-{digest_of([fingerprint(task.spec) for task in self.tasks])[:12]}"


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """The tasks of a sweep file. overrides: KEY=VALUE for all settings, applied after those of the file.

    Raises SpecError for mistakes in the file or in a spec, for equal tasks, and for too many tasks.
    """
    config = load_document(path, SweepConfig, "sweep")
    base = path.absolute().parent / Path(config.spec).expanduser()
    tasks: list[SweepTask] = []
    for setting in config.settings:
        try:
            spec = load_spec(base, [*config.set, *setting.set, *overrides])
        except SpecError as error:
            raise SpecError(f"{path}: setting {setting.name}: {error}") from None
        has_folds = spec.split.protocol == "kfold"
        if config.folds is not None and not has_folds:
            raise SpecError(
                f"{path}: folds are listed, but setting {setting.name} has split.protocol {spec.split.protocol}; remove folds"
            )
        folds: tuple[int | None, ...] = config.folds or (tuple(range(spec.split.folds)) if has_folds else (None,))
        seeds = config.seeds or (spec.seed,)
        if len(tasks) + len(folds) * len(seeds) > MAX_TASKS:
            raise SpecError(f"{path}: more than {MAX_TASKS} tasks; list fewer settings, seeds or folds")
        for seed in seeds:
            tasks += [SweepTask(setting.name, seed, fold, _variant(path, spec, seed, fold)) for fold in folds]
    _refuse_duplicates(path, tasks)
    return Sweep(config.name, tasks)


def _variant(path: Path, spec: JobSpec, seed: int, fold: int | None) -> JobSpec:
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
        # Without the name: the same job under a second name would only put its result into the tables twice.
        other = seen.setdefault(digest_of({**task.spec.result_fields(), "name": None}), task)
        if other is not task:
            raise SpecError(
                f"{path}: {other.label} and {task.label} are the same job, {run_name(task.spec)}: their settings differ in "
                f"nothing that changes a result. Remove one of them."
            )


def distinct_features(specs: Mapping[int, JobSpec]) -> list[int]:
    """Index of the first task for each distinct pair of dataset and mel settings. The features of these tasks serve all tasks."""
    found: dict[str, int] = {}
    for index, spec in specs.items():
        fields = spec.result_fields()
        found.setdefault(digest_of([spec.data.source, fields["data"], fields["mel"]]), index)
    return [*found.values()]
