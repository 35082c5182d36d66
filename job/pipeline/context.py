"""The input of a phase function, and what it adds to the receipt of its phase."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emotion.config import Part, Precision
from job.pipeline.fetch_inputs import FetchedInputs, out_of_fold_file
from job.run_folder.conditions import device_conditions, record_conditions
from job.spec.model import JobSpec

if TYPE_CHECKING:
    from emotion.audio.feature_store import Features
    from emotion.audio.partition import Partition
    from emotion.data.out_of_fold import OutOfFold
    from emotion.training.context import TrainingContext, WarmStart
    from emotion.training.device import Device
    from emotion.training.graphed_step import GraphBackend


@dataclass
class PhaseContext:
    """The input of a phase function. inputs: phase → folder of its outputs, for the phases that this one depends on;
    out: folder for the outputs of this phase; run_folder: folder of the run."""

    spec: JobSpec
    fetched: FetchedInputs
    inputs: dict[str, Path]
    out: Path
    run_folder: Path
    should_stop: Callable[[], bool]
    notes: dict[str, Any] = field(default_factory=dict)  # JSON values for the receipt, and so for the manifest
    digests: dict[str, str] = field(default_factory=dict)  # output → SHA-256, of outputs that were hashed while written
    memory: dict[str, Any] | None = None  # of a training: predicted and measured memory by component
    other_processes_bytes: int = 0  # peak memory of processes that the phase started
    uses_graphs: bool = True  # whether training steps on a GPU are CUDA graphs
    is_used_up: Callable[[int], bool] = lambda _: False  # number of steps → whether the budget ends the training

    def add_processes_bytes(self, peak: int) -> None:
        self.other_processes_bytes += peak

    @cached_property
    def device(self) -> "Device":
        return self.device_in(self.spec.precision)

    def device_in(self, precision: Precision) -> "Device":
        """The device for this precision. It is recorded as a condition of this phase."""
        from emotion.training.device import resolve_device

        device = resolve_device(self.spec.device, precision)
        record_conditions(self.out, device_conditions(device.describe()))
        return device

    @property
    def used_device(self) -> dict[str, Any] | None:
        """Properties of the device, for the receipt; None if the phase used none."""
        return self.device.describe() if "device" in self.__dict__ else None

    @property
    def training(self) -> "TrainingContext":
        from emotion.training.context import TrainingContext

        spec = self.spec
        return TrainingContext(spec.seed, self.device, spec.checkpoint, self.out, self.should_stop, self.graphs, self.is_used_up)

    @cached_property
    def graphs(self) -> "GraphBackend | None":
        """The CUDA graph backend; None on a CPU."""
        from emotion.training.graphed_step import CudaGraphs

        return CudaGraphs() if self.uses_graphs and self.device.device.type == "cuda" else None

    @cached_property
    def features(self) -> "Features":
        from emotion.audio.feature_store import Features

        return Features(self.inputs["features"])

    @cached_property
    def synthetic(self) -> "Features":
        from emotion.audio.feature_store import Features

        return Features(self.inputs["synth"])

    @cached_property
    def partition(self) -> "Partition":
        from emotion.audio.partition import partition_of
        from emotion.data.splits import read_split

        return partition_of(self.features, read_split(self.inputs["split"] / "split.csv"))

    def require_teacher(self) -> None:
        """Raise DataError if a training song is missing from the file of vit.teacher. Called before GAN and ViT are trained."""
        if self.fetched.teacher is not None:
            from emotion.vit.teacher import read_teacher, require_songs

            self.fetched.require_unchanged(self.fetched.teacher)
            require_songs(read_teacher(self.fetched.teacher), self.partition.training.songs)

    @cached_property
    def out_of_fold(self) -> "OutOfFold | None":
        """The results of the folds of a final model; None for any other run."""
        from emotion.data.out_of_fold import read_out_of_fold

        path = out_of_fold_file(self.spec)
        if path is None:
            return None
        found = read_out_of_fold(path)
        self.fetched.require_unchanged(path)
        return found

    def warm_start(self, part: Part) -> "WarmStart":
        """The warm start of GAN or ViT. Raises ModelError, before either is trained, if one has seen a song that it must not."""
        from emotion.training.context import read_warm_start, refuse_known_songs

        init = self.fetched.init_config(self.spec)
        name = Path(self.spec.init_from.run).name if self.spec.init_from else ""
        found: dict[Part, WarmStart] = {"gan": read_warm_start("gan", init), "vit": read_warm_start("vit", init)}
        for warm_start in found.values():
            refuse_known_songs(warm_start, self.partition, name)
        return found[part]
