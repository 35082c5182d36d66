"""The retry policy of S3, against a scripted server that is overloaded for a while or for ever."""

import logging
import math
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from emotion.errors import Interrupted, StorageError
from tests.stores.dataset import AUDIO, SONGS, assert_all_there, assert_error, assert_nothing_wrong, staged, storage_of
from tests.stores.scripted import Answer, Request, ScriptedS3, error


def test_a_burst_of_slow_down_errors_is_waited_out(store: ScriptedS3, tmp_path: Path) -> None:
    store.on("GetObject", "*", error(503, "SlowDown"), passed=2, times=20)
    store.on("ListObjectsV2", "*", error(503, "SlowDown"), times=2)
    staged(store, tmp_path / "out")
    assert_all_there(store, tmp_path / "out")
    # dataset.json, which is absent, labels and songs; and one more for each error.
    assert len(store.asked("GetObject")) == 2 + len(SONGS) + 20


def test_a_staging_survives_ten_percent_errors_and_logs_each(
    store: ScriptedS3, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    drawn = random.Random(1)

    def sometimes(request: Request, honest: Callable[[], Answer]) -> Answer:
        return error(500, "InternalError")(request, honest) if drawn.random() < 0.1 else honest()

    store.on("*", "*", sometimes, times=math.inf)
    with caplog.at_level(logging.INFO):
        for attempt in range(5):
            staged(store, tmp_path / str(attempt))
            assert_all_there(store, tmp_path / str(attempt))
    failed = len([one for one in store.requests if one.status == 500])
    assert failed >= 3
    assert len([line for line in caplog.messages if "HTTP 500 InternalError" in line and "trying again" in line]) == failed


def test_a_permanent_error_ends_after_few_requests_and_the_next_attempt_resumes(store: ScriptedS3, tmp_path: Path) -> None:
    store.on("GetObject", f"{AUDIO}/*", error(503, "SlowDown"), passed=5, times=math.inf)
    with pytest.raises(StorageError) as caught:
        staged(store, tmp_path / "out", connections=4, patience_seconds=1.0)
    assert_error(caught, StorageError, 69, "s3:GetObject", f"s3://bucket/{AUDIO}/", "503 SlowDown", "patience_seconds")
    refused = len([one for one in store.requests if one.status == 503])
    # Without pauses and a budget there would be thousands.
    assert refused < 100
    assert_nothing_wrong(store, tmp_path / "out")

    # The other threads give up a little later; a process would have ended by then.
    for thread in threading.enumerate():
        if thread.name.startswith("storage"):
            thread.join()
    store.stop_failing()
    before = len(store.asked("GetObject", f"{AUDIO}/*"))
    staged(store, tmp_path / "out")
    assert_all_there(store, tmp_path / "out")
    assert len(store.asked("GetObject", f"{AUDIO}/*")) - before == len(SONGS) - 5


def test_a_stop_ends_the_wait_between_two_tries(store: ScriptedS3, tmp_path: Path) -> None:
    store.on("GetObject", "*", error(503, "SlowDown"), times=math.inf)
    stop = storage_of(store, stop=lambda: len(store.asked("GetObject")) > 3, patience_seconds=1e6)
    with pytest.raises(Interrupted):
        stop.get("big.bin", tmp_path / "x", None, stop.entry("big.bin"))
    assert list(tmp_path.glob("[!.]*")) == []
