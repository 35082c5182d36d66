"""The phases of a job, in order, and what each depends on.

    spec → stage → features → split → gan → synth → quality → vit → stack → evaluate → publish

A phase is a plain function (job/pipeline/phase_functions.py). Its key is a digest of its name, its version (raise it when the
outputs change for equal inputs), the spec sections it uses, its `key_parts`, and the outputs of its dependencies. Besides these,
only runtime conditions can change its outputs: device, threads, the precision that `auto` resolves to, micro-batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from job.pipeline import phase_functions as functions
from job.pipeline.context import PhaseContext
from job.pipeline.fetch_inputs import FetchedInputs, key_digests, out_of_fold_digest, split_list_digests
from job.spec.model import JobSpec
from job.storage.stage import source_files

CHECKPOINTS = "checkpoints/step-*.json"
SONGS_SO_FAR = ".songs.jsonl"

ShouldStop = Callable[[], bool]
KeyParts = Callable[[JobSpec, FetchedInputs, ShouldStop], dict[str, Any]]


@dataclass(frozen=True)
class Phase:
    """A phase of a job. outputs_exist: tells whether the external outputs of a finished phase still agree with its receipt; its
    arguments: spec, run folder, notes of the receipt, verify, should_stop."""

    name: str
    version: int
    run: Callable[[PhaseContext], None]
    needs: tuple[str, ...] = ()  # phases whose outputs it reads
    receipt_dependencies: tuple[str, ...] = ()  # phases of which it reads the receipt only
    sections: tuple[str, ...] = ()  # sections of the spec; their result fields are part of the key
    key_parts: KeyParts = field(default=lambda *_: {})  # more parts of the key, as JSON
    check: Callable[[JobSpec, FetchedInputs, ShouldStop], None] = field(default=lambda *_: None)  # before the first phase runs
    kept_in: Literal["work", "scratch"] = "work"
    progress_files: tuple[str, ...] = ()  # globs in its folder: files with which the next attempt resumes; new ones are progress
    external_outputs: bool = False  # they are at source or destination: a mirror has the receipt only, other runs do not use them
    outputs_exist: Callable[[JobSpec, Path, dict[str, Any], bool, ShouldStop], bool] = field(default=lambda *_: True)

    @property
    def dependencies(self) -> tuple[str, ...]:
        """All phases whose outputs are part of its key."""
        return (*self.receipt_dependencies, *self.needs)


PHASES = (
    Phase(
        "stage",
        3,
        functions.run_stage,
        key_parts=lambda spec, _fetched, should_stop: source_files(spec.data, spec.storage, should_stop),
        kept_in="scratch",
        progress_files=("**/*",),
        external_outputs=True,
    ),
    Phase(
        "features",
        5,
        functions.run_features,
        needs=("stage",),
        sections=("mel",),
        # Not the source: equal songs from another source have equal features.
        key_parts=lambda spec, *_: {key: value for key, value in spec.data.result_fields().items() if key != "source"},
        kept_in="scratch",
        progress_files=(SONGS_SO_FAR,),
    ),
    Phase(
        "split",
        1,
        functions.run_split,
        needs=("features",),
        sections=("split",),
        key_parts=lambda spec, fetched, _: split_list_digests(spec, fetched) | out_of_fold_digest(spec, fetched),
    ),
    Phase(
        "gan",
        6,
        functions.run_gan,
        needs=("features", "split"),
        sections=("seed", "precision", "gan"),
        progress_files=(CHECKPOINTS,),
        key_parts=lambda spec, fetched, _: key_digests(spec, fetched, "gan"),
        check=functions.check_gan,
    ),
    Phase(
        "synth",
        4,
        functions.run_synth,
        needs=("features", "split", "gan"),
        sections=("seed", "precision", "synth"),
        progress_files=(SONGS_SO_FAR,),
    ),
    Phase("quality", 6, functions.run_quality, needs=("features", "split", "synth"), sections=("seed", "quality")),
    Phase(
        "vit",
        10,
        functions.run_vit,
        needs=("features", "split", "synth"),
        sections=("seed", "precision", "vit"),
        progress_files=(CHECKPOINTS,),
        key_parts=lambda spec, fetched, _: key_digests(spec, fetched, "vit"),
        check=functions.check_vit,
    ),
    Phase(
        "stack",
        6,
        functions.run_stack,
        needs=("features", "split", "vit"),
        sections=("seed",),
        key_parts=lambda spec, fetched, _: out_of_fold_digest(spec, fetched),
    ),
    Phase(
        "evaluate",
        7,
        functions.run_evaluate,
        needs=("features", "split", "vit", "stack"),
        # The split, because the number of the fold is a column of its tables.
        sections=("seed", "split", "evaluate"),
        key_parts=lambda spec, fetched, _: out_of_fold_digest(spec, fetched),
    ),
    Phase(
        "publish",
        8,
        functions.run_publish,
        needs=("split", "gan", "synth", "quality", "vit", "stack", "evaluate"),
        receipt_dependencies=("stage", "features"),
        key_parts=lambda spec, *_: {"spec": spec.result_fields(), "destination": spec.artifacts.destination},
        check=functions.check_destination,
        external_outputs=True,
        outputs_exist=functions.is_published,
    ),
)

BY_NAME = {phase.name: phase for phase in PHASES}
PROGRESS_FILES = {phase.name: phase.progress_files for phase in PHASES}
