"""The training, validation and test songs of one split, as views of one feature store."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType

from emotion.audio.feature_store import Features, SongFeatures
from emotion.data.splits import SplitRow

TrainingSongs = NewType("TrainingSongs", Features)
ValidationSongs = NewType("ValidationSongs", Features)
TestSongs = NewType("TestSongs", Features)


@dataclass(frozen=True)
class Partition:
    """Three types, so that swapping two does not type-check. *_groups: [songs], groups that cross-validation keeps whole."""

    training: TrainingSongs
    validation: ValidationSongs
    test: TestSongs
    training_groups: Sequence[str]
    validation_groups: Sequence[str]
    test_groups: Sequence[str]

    @property
    def held_out(self) -> list[SongFeatures]:
        """The songs that nothing may be trained on."""
        return [*self.validation.songs, *self.test.songs]


def partition_of(features: Features, rows: Sequence[SplitRow]) -> Partition:
    """Divide `features` by `rows`: one per song, in the same order."""
    assert [row.song_id for row in rows] == [song.song_id for song in features.songs], "the split names other songs"

    def chosen(split: str) -> Features:
        return features.only([position for position, row in enumerate(rows) if row.split == split])

    def groups(split: str) -> list[str]:
        return [row.group for row in rows if row.split == split]

    return Partition(
        training=TrainingSongs(chosen("train")),
        validation=ValidationSongs(chosen("validation")),
        test=TestSongs(chosen("test")),
        training_groups=groups("train"),
        validation_groups=groups("validation"),
        test_groups=groups("test"),
    )
