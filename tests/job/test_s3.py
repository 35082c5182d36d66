"""Listings of S3: keys that are no safe file names, many keys, listings that end too early."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from emotion.errors import DataError, Interrupted, StorageError
from job.preemption import StopRequest
from tests.stores.dataset import AUDIO, LABELS, SONGS, assert_all_there, assert_error, staged, storage_of
from tests.stores.scripted import Answer, Object, ScriptedS3, never


@pytest.mark.parametrize(
    "name",
    ["../../99.mp3", "../99.mp3", "a/./99.mp3", "a\\b/99.mp3", "nul\0/99.mp3", "x" * 300 + "/99.mp3", "MEMD_audio/3.MP3"],
    ids=["up twice", "up", "dot", "backslash", "nul", "300 bytes", "by case"],
)
def test_keys_that_lead_out_of_the_folder_or_collide_are_refused_before_any_download(
    store: ScriptedS3, tmp_path: Path, name: str
) -> None:
    store.objects[f"deam/{name}"] = Object(b"x")
    with pytest.raises(DataError) as caught:
        staged(store, tmp_path / "out")
    assert_error(caught, DataError, 65, "s3://bucket/deam", repr(name)[1:60])
    assert store.sent("GetObject", f"{AUDIO}/*") == 0
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["out"]


def test_keys_with_empty_names_between_slashes_are_read(store: ScriptedS3, tmp_path: Path) -> None:
    for before, after in [
        (f"{AUDIO}/2.mp3", "deam//MEMD_audio/2.mp3"),
        (f"{AUDIO}/3.mp3", "deam/MEMD_audio//3.mp3"),
        (LABELS, LABELS.replace("deam/", "deam//")),
    ]:
        store.objects[after] = store.objects.pop(before)
    staged(store, tmp_path / "out")
    songs = {path.name: path.read_bytes() for path in (tmp_path / "out" / "audio").iterdir()}
    assert sorted(songs) == sorted(SONGS)
    assert songs["2.mp3"] == store.objects["deam//MEMD_audio/2.mp3"].body
    assert songs["3.mp3"] == store.objects["deam/MEMD_audio//3.mp3"].body
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifests", "out"]


def test_keys_that_differ_by_slashes_alone_are_refused(store: ScriptedS3, tmp_path: Path) -> None:
    store.objects["deam/MEMD_audio//2.mp3"] = Object(b"x")
    with pytest.raises(DataError) as caught:
        staged(store, tmp_path / "out")
    assert_error(caught, DataError, 65, "'MEMD_audio//2.mp3'", "'MEMD_audio/2.mp3'")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "there is nothing below s3://bucket/own. Name the prefix"),
        (["one song.wav", "b/two.mp3"], "a row for each song, or name the prefix that the dataset was copied to."),
        (["1.mp3", "2.mp3"], "no label table of DEAM, EmoMusic or PMEmo. Copy a songs.csv there, with the columns file,"),
        (["one.wav", "sub/songs.csv"], "tables in another place or spelling than songs.csv"),
        (["one.wav", "labels.xlsx"], "spreadsheets; save labels and metadata as CSV (1: labels.xlsx)"),
    ],
)
def test_a_prefix_without_labels_is_told_to_get_some_and_not_to_rename_its_songs(
    store: ScriptedS3, tmp_path: Path, names: list[str], said: str
) -> None:
    """Song ids are the names of files only beside a label table that has them."""
    store.objects.update({f"own/{name}": Object(b"x") for name in names})
    with pytest.raises(DataError) as caught:
        staged(store, tmp_path / "out", "s3://bucket/own")
    assert_error(caught, DataError, 65, said)
    assert ("there is no s3://bucket/own/songs.csv" in str(caught.value)) == bool(names)
    assert "rename" not in str(caught.value)
    assert store.sent("GetObject") == 0


@pytest.mark.parametrize("prefix", ["a//b", "#1 songs", "what?", "50%", "a&b=c+d", "x/*"])
def test_any_letter_is_legal_in_a_prefix(store: ScriptedS3, tmp_path: Path, prefix: str) -> None:
    for key in list(store.objects):
        store.objects[f"{prefix}/{key}"] = store.objects.pop(key)
    staged(store, tmp_path / "out", f"s3://bucket/{prefix}/deam")
    assert sorted(path.name for path in (tmp_path / "out" / "audio").iterdir()) == sorted(SONGS)
    storage = storage_of(store, f"s3://bucket/{prefix}")
    storage.write("one", b"1")
    storage.move("one", "two")
    assert storage.read("two") == b"1"


LISTING = """
import resource, sys
from job.config import StorageConfig
from job.spec.location import parse_location
from job.storage.stage import dataset_entries
from job.storage.open import open_storage
config = StorageConfig(endpoint_url=sys.argv[1])
for url in ("s3://bucket/few", "s3://bucket/deam"):
    entries = dataset_entries(open_storage(parse_location(url), config, lambda: False), url)
    print(len(entries), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.full
def test_a_hundred_thousand_other_keys_are_skipped_in_little_memory(store: ScriptedS3, tmp_path: Path) -> None:
    decoys = [f"deam/{kind}/{number:06}.txt" for kind in ("a", "z") for number in range(50_000)]
    store.decoys = sorted([*decoys, *(f"few/{number:06}.txt" for number in range(2000)), "few/static_annots.csv"])
    command = [sys.executable, "-c", LISTING, store.address.endpoint_url]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    few, kib_of_few, found, kib = map(int, output)
    assert (few, found) == (1, 1 + len(SONGS))
    # All entries at once would take tens of MB.
    assert kib - kib_of_few < 6000
    assert len(store.asked("ListObjectsV2")) == 3 + 101
    staged(store, tmp_path / "out")
    assert_all_there(store, tmp_path / "out")
    assert len(store.asked("GetObject")) == 2 + len(SONGS)


def test_a_listing_that_ends_in_the_middle_is_an_error(store: ScriptedS3, tmp_path: Path) -> None:
    """As of a server that only supports the first version of the request."""
    page = b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>"
    store.on("ListObjectsV2", "*", lambda _request, _answer: Answer(200, page), times=math.inf)
    with pytest.raises(StorageError, match="the listing ends in the middle"):
        staged(store, tmp_path / "out")


def test_waiting_for_a_page_is_no_sign_of_life_and_can_be_stopped(store: ScriptedS3) -> None:
    """The watchdog counts from the last sign of life, so that it ends a job that hangs in a listing."""
    store.on("ListObjectsV2", "*", never)
    request, alive_at = StopRequest(), list[float]()

    def should_stop() -> bool:
        request()
        alive_at.append(request.asked_at)
        return len(alive_at) == 4

    with pytest.raises(Interrupted):
        list(storage_of(store, stop=should_stop).entries())
    assert alive_at == alive_at[:1] * 4
