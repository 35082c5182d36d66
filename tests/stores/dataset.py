"""A dataset in a scripted store, the place that a job sees it as, and what it has to say of what goes wrong there."""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.config import StorageConfig
from job.spec.location import parse_location
from job.storage.open import open_storage
from job.storage.protocol import Storage
from tests.stores.scripted import Object, ScriptedS3

SONGS = [f"{number}.mp3" for number in range(2, 14)]
AUDIO = "deam/MEMD_audio"
LABELS = "deam/annotations/static_annotations_averaged_songs_1_2000.csv"
BIG = random.Random(0).randbytes(1_000_000)


def no() -> bool:
    return False


def fill(store: ScriptedS3) -> None:
    rows = "".join(f"{Path(name).stem}, 5, 1, 4, 1\n" for name in SONGS)
    header = "song_id, valence_mean, valence_std, arousal_mean, arousal_std\n"
    store.objects[LABELS] = Object((header + rows).encode())
    for name in SONGS:
        store.objects[f"{AUDIO}/{name}"] = Object(random.Random(name).randbytes(20_000))
    store.objects["deam/big.bin"] = Object(BIG)


def storage_of(
    store: ScriptedS3, url: str = "s3://bucket/deam", stop: Callable[[], bool] = no, **storage: Any
) -> Storage:
    return open_storage(parse_location(url), config_of(store, **storage), stop)


def config_of(store: ScriptedS3, **storage: Any) -> StorageConfig:
    settings = {"timeout_seconds": 5.0, "patience_seconds": 20.0, **storage}
    return StorageConfig(endpoint_url=store.address.endpoint_url, **settings)


def assert_error(caught: pytest.ExceptionInfo[Any], kind: type[Exception], exit_code: int, *words: str) -> None:
    """One line that says all this and no secret."""
    text = str(caught.value)
    assert (type(caught.value), caught.value.exit_code) == (kind, exit_code), text
    assert "\n" not in text
    assert [word for word in words if word not in text] == [], text
    assert not re.search("scripted-|Signature|Credential=", text), text
