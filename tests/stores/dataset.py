"""A dataset on a scripted S3 server, and functions that stage it and check the result."""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emotion.config import DataConfig
from job.config import StorageConfig
from job.spec.location import parse_location
from job.storage.open import open_storage
from job.storage.protocol import Entry, Storage
from job.storage.stage import stage
from tests.stores.scripted import Object, ScriptedS3

SONGS = [f"{number}.mp3" for number in range(2, 14)]
AUDIO = "deam/MEMD_audio"
LABELS = "deam/annotations/static_annotations_averaged_songs_1_2000.csv"
BIG = random.Random(0).randbytes(1_000_000)


def no() -> bool:
    return False


def fill(server: ScriptedS3) -> None:
    rows = "".join(f"{Path(name).stem}, 5, 1, 4, 1\n" for name in SONGS)
    header = "song_id, valence_mean, valence_std, arousal_mean, arousal_std\n"
    server.objects[LABELS] = Object((header + rows).encode())
    for name in SONGS:
        server.objects[f"{AUDIO}/{name}"] = Object(random.Random(name).randbytes(20_000))
    server.objects["deam/big.bin"] = Object(BIG)


def storage_of(server: ScriptedS3, url: str = "s3://bucket/deam", stop: Callable[[], bool] = no, **storage: Any) -> Storage:
    return open_storage(parse_location(url), config_of(server, **storage), stop)


def config_of(server: ScriptedS3, **storage: Any) -> StorageConfig:
    settings = {"timeout_seconds": 5.0, "patience_seconds": 20.0, **storage}
    return StorageConfig(endpoint_url=server.address.endpoint_url, **settings)


def assert_error(caught: pytest.ExceptionInfo[Any], kind: type[Exception], exit_code: int, *words: str) -> None:
    """The error is one line with all these words and no secret."""
    text = str(caught.value)
    assert (type(caught.value), caught.value.exit_code) == (kind, exit_code), text
    assert "\n" not in text
    assert [word for word in words if word not in text] == [], text
    assert not re.search("scripted-|Signature|Credential=", text), text


def staged(server: ScriptedS3, folder: Path, source: str = "s3://bucket/deam", **storage: Any) -> dict[str, Any]:
    """Stage into a folder. Returns the notes."""
    folder.mkdir(exist_ok=True)
    return stage(DataConfig(source=source), config_of(server, **storage), folder.parent / "manifests", folder, no)[1]


def looked_up(server: ScriptedS3) -> Entry:
    """The entry of the large object. Requests for it are not counted."""
    entry = storage_of(server).entry("big.bin")
    server.requests.clear()
    return entry


def assert_all_there(server: ScriptedS3, folder: Path) -> None:
    assert sorted(path.name for path in (folder / "audio").iterdir()) == sorted(SONGS)
    assert_nothing_wrong(server, folder)


def assert_nothing_wrong(server: ScriptedS3, folder: Path) -> None:
    """All files with a final name are complete and right."""
    for path in (folder / "audio").glob("[!.]*"):
        assert path.read_bytes() == server.objects[f"{AUDIO}/{path.name}"].body
