"""What a phase is given."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emotion.config import Part, Precision
from emotion.errors import DataError
from job.run_folder.conditions import device_conditions, note_conditions
from job.run_folder.receipts import notes_of
from job.spec.model import JobSpec

if TYPE_CHECKING:
    from emotion.audio.feature_store import Features
    from emotion.data.splits import Split
    from emotion.training.device import Device
    from emotion.training.warm_start import Initial

FEWEST: dict["Split", int] = {"train": 3, "validation": 2}
"""A density of labels needs three points, and a concordance two."""


@dataclass
class Work:
    """What a phase is given: the spec, the folders of the phases it needs, its own folder, the run's, and whether to stop."""

    spec: JobSpec
    inputs: dict[str, Path]
    out: Path
    run_folder: Path
    should_stop: Callable[[], bool]
    notes: dict[str, Any] = field(default_factory=dict)
    """What a phase wants to have in its receipt, and with it in the manifest, beside its outputs."""
    digests: dict[str, str] = field(default_factory=dict)
    """SHA-256 of outputs that were read or written as a whole, so that the receipt need not read them again."""
    memory: dict[str, Any] | None = None
    """The account of a phase that predicts and measures its memory by component."""

    @cached_property
    def device(self) -> "Device":
        return self.device_in(self.spec.precision)

    def device_in(self, precision: Precision) -> "Device":
        """The device, resolved, and noted as a condition under which this phase was made."""
        from emotion.training.device import resolve_device

        device = resolve_device(self.spec.device, precision)
        note_conditions(self.out, device_conditions(device.describe()))
        return device

    @property
    def used_device(self) -> dict[str, Any] | None:
        """Where the phase computed, for its receipt; None if it needed no device."""
        return self.device.describe() if "device" in self.__dict__ else None

    @cached_property
    def features(self) -> "Features":
        from emotion.audio.feature_store import Features

        return Features(self.inputs["features"])

    @cached_property
    def synthetic(self) -> "Features":
        from emotion.audio.feature_store import Features

        return Features(self.inputs["synth"])

    @cached_property
    def splits(self) -> "list[Split]":
        """The split of each song of the table. Raises DataError where one is too small to work with."""
        from emotion.data.splits import assign_splits

        songs = self.features.songs
        left_out = {fault["song_id"] for fault in notes_of(self.inputs["features"])["left_out"]}
        ids, groups = [song.song_id for song in songs], [song.group for song in songs]
        found = assign_splits(ids, groups, self.spec.split, left_out)
        for name, fewest in FEWEST.items():
            if found.count(name) < fewest:
                raise DataError(
                    f"split: {name} has {found.count(name)} of {len(songs)} songs and needs {fewest}. Use more songs or "
                    f"groups, fewer folds or other fractions."
                )
        return found

    def songs(self, *splits: "Split") -> "Features":
        """The songs of these splits, one after another, and no others."""
        chosen = [index for split in splits for index, name in enumerate(self.splits) if name == split]
        return self.features.only(chosen)

    def initial(self, part: Part) -> "Initial":
        """What GAN or ViT start from. Raises ModelError where either knows a song that it must not, before both are trained."""
        from emotion.training.warm_start import initial_of, refuse_known

        init = self.spec.init_from
        found: dict[Part, Initial] = {"gan": initial_of("gan", init), "vit": initial_of("vit", init)}
        for initial in found.values():
            refuse_known(initial, Path(init.run).name if init else "", self.songs("validation"), self.songs("test"))
        return found[part]

    def units(self, *splits: "Split") -> list[str]:
        """Per song of these splits, what splits and cross-validation never divide."""
        from emotion.data.splits import units_of

        songs = self.songs(*splits).songs
        return units_of([song.song_id for song in songs], [song.group for song in songs], self.spec.split)
