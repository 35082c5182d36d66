"""The whole job on one page: what runs, in which order, from what.

    spec → stage → features → gan → synth → quality → vit → evaluate → publish

Each phase is a plain function (job/pipeline/phase_functions.py) of its inputs' folders, the spec and an output folder. Its key
is made of its name, its version (raise it when its outputs change for the same inputs), the spec sections it uses, its facts,
and the digests of what the phases it needs have left. Besides these only where it runs may change the bytes: device, threads,
the precision that `auto` resolves to, micro-batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from emotion.config import Part
from emotion.data.splits import Split
from emotion.errors import StorageError
from emotion.files import sha256_of
from job.pipeline import phase_functions as work
from job.pipeline.warm_start import initial_digests
from job.spec.model import JobSpec
from job.storage.stage import source_facts

ShouldStop = Callable[[], bool]


@dataclass(frozen=True)
class Phase:
    name: str
    version: int
    run: Callable[[work.Work], None]
    needs: tuple[str, ...] = ()
    sections: tuple[str, ...] = ()
    facts: Callable[[JobSpec, ShouldStop], dict[str, Any]] = field(default=lambda _spec, _should_stop: {})
    check: Callable[[JobSpec, ShouldStop], None] = field(default=lambda _spec, _should_stop: None)
    """Asked before the first phase runs, so that a mistake shows now and not after the phases before this one."""
    still_stands: Callable[[JobSpec, Path, bool, ShouldStop], bool] = field(default=lambda *_: True)
    """Whether what a finished phase left outside its own folder is still there: of the spec, in the run folder, to verify."""
    place: Literal["work", "scratch"] = "work"
    told_by: tuple[str, ...] = ()
    """Phases of which it reads the receipts and nothing else."""
    lies_elsewhere: bool = False
    """What it leaves is at the source or at the destination: a mirror keeps its receipt only."""

    @property
    def after(self) -> tuple[str, ...]:
        """All phases that its key is made from."""
        return (*self.told_by, *self.needs)


def data_facts(spec: JobSpec, _should_stop: ShouldStop) -> dict[str, Any]:
    """What is asked of songs. Where they come from does not count: the same songs elsewhere have the same features."""
    return {name: value for name, value in spec.data.what().items() if name != "source"}


def split_facts(spec: JobSpec, _should_stop: ShouldStop | None = None) -> dict[str, Any]:
    """Lists of song ids are known by their content."""
    folder = spec.split.lists
    return {"lists": {name: digest_of_file(Path(folder) / f"{name}.txt") for name in get_args(Split)}} if folder else {}


def gan_facts(spec: JobSpec, _should_stop: ShouldStop) -> dict[str, Any]:
    return split_facts(spec) | initial_facts(spec, "gan")


def vit_facts(spec: JobSpec, _should_stop: ShouldStop) -> dict[str, Any]:
    """Weights from a file are known by their content, too."""
    weights = spec.vit.weights_path
    return split_facts(spec) | initial_facts(spec, "vit") | ({"weights": digest_of_file(weights)} if weights else {})


def initial_facts(spec: JobSpec, part: Part) -> dict[str, Any]:
    """What is used of an earlier run is known by its content. What uses nothing of one has the key that it has without one."""
    if spec.init_from is None or not (digests := initial_digests(spec.init_from, part)):
        return {}
    return {"init_from": {"normalisation": spec.init_from.normalisation, **digests}}


def named_files(spec: JobSpec) -> dict[str, str]:
    """`KEY/FILE` → SHA-256 of the files that the spec names beside the dataset, KEY being the spec's."""
    found = {f"split.lists/{name}.txt": digest for name, digest in split_facts(spec).get("lists", {}).items()}
    if spec.vit.weights_path:
        found["vit.weights"] = digest_of_file(spec.vit.weights_path)
    if spec.init_from is not None:
        for part in get_args(Part):
            digests = initial_digests(spec.init_from, part)
            found |= {f"init_from.run/{name}": digest for name, digest in digests.items()}
    return found


def digest_of_file(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise StorageError.of(
            error, f"{path}: {error.strerror}, but the spec names it. Correct the spec or put the file there."
        ) from error


PHASES = (
    Phase(
        "stage",
        2,
        work.run_stage,
        facts=lambda spec, should_stop: source_facts(spec.data, spec.storage, should_stop),
        place="scratch",
        lies_elsewhere=True,
    ),
    Phase(
        "features",
        2,
        work.run_features,
        needs=("stage",),
        sections=("mel",),
        facts=data_facts,
        place="scratch",
    ),
    Phase(
        "gan",
        3,
        work.run_gan,
        needs=("features",),
        sections=("seed", "precision", "split", "gan"),
        facts=gan_facts,
        check=work.check_gan,
    ),
    Phase(
        "synth",
        2,
        work.run_synth,
        needs=("features", "gan"),
        sections=("seed", "precision", "split", "synth"),
        facts=split_facts,
    ),
    Phase(
        "quality",
        2,
        work.run_quality,
        needs=("features", "synth"),
        sections=("seed", "split", "quality"),
        facts=split_facts,
    ),
    Phase(
        "vit",
        3,
        work.run_vit,
        needs=("features", "synth"),
        sections=("seed", "precision", "split", "vit"),
        facts=vit_facts,
        check=work.check_vit,
    ),
    Phase(
        "evaluate",
        2,
        work.run_evaluate,
        needs=("features", "vit"),
        sections=("seed", "split", "evaluate"),
        facts=split_facts,
    ),
    Phase(
        "publish",
        2,
        work.run_publish,
        needs=("gan", "synth", "quality", "vit", "evaluate"),
        told_by=("stage", "features"),
        facts=lambda spec, _should_stop: {"spec": spec.what(), "destination": spec.artifacts.destination},
        check=work.check_destination,
        still_stands=work.is_published,
        lies_elsewhere=True,
    ),
)

BY_NAME = {phase.name: phase for phase in PHASES}
