import threading
import time
from collections.abc import Iterator

import pytest

from emotion import threads
from emotion.errors import Interrupted
from emotion.threads import in_threads


def no_stop() -> None:
    return


@pytest.mark.parametrize("count", [1, 3])
def test_results_come_in_the_order_of_the_items_even_if_the_first_takes_longest(count: int) -> None:
    def work(item: int) -> int:
        time.sleep(0.03 if item == 0 else 0)
        return 10 * item

    assert list(in_threads(work, range(9), count, no_stop)) == [10 * item for item in range(9)]


def test_items_are_worked_on_at_the_same_time() -> None:
    both = threading.Barrier(2, timeout=10)
    assert list(in_threads(lambda _: both.wait() >= 0, range(2), 2, no_stop)) == [True, True]


def test_items_are_read_only_a_little_ahead_of_the_results() -> None:
    read = []

    def items() -> Iterator[int]:
        for item in range(100):
            read.append(item)
            yield item

    results = in_threads(lambda item: item, items(), 2, no_stop)
    assert [next(results), next(results)] == [0, 1]
    assert len(read) <= 2 + 4
    results.close()


def test_a_stop_is_asked_for_before_each_result_and_ends_the_work() -> None:
    done: list[int] = []
    asked = 0

    def check_stop() -> None:
        nonlocal asked
        asked += 1
        if asked == 3:
            raise Interrupted("enough")

    with pytest.raises(Interrupted):
        list(in_threads(done.append, range(1000), 1, check_stop))
    assert 2 <= len(done) <= 4


def test_a_stop_is_asked_for_while_a_result_is_awaited_and_nothing_new_is_begun_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "LOOK_SECONDS", 0.01)
    is_over = threading.Event()
    begun: list[int] = []
    asked = 0

    def work(item: int) -> None:
        begun.append(item)
        assert is_over.wait(timeout=10)

    def check_stop() -> None:
        nonlocal asked
        asked += 1
        if asked == 3:
            # The work on the first item ends only after the second question that was asked during it.
            threading.Timer(0.2, is_over.set).start()
            raise Interrupted("enough")

    with pytest.raises(Interrupted):
        list(in_threads(work, range(2), 1, check_stop))
    assert begun == [0]


def test_an_error_of_the_work_comes_through_at_its_place_and_no_more_is_begun() -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 2:
            raise ValueError("item 2")
        return item

    results = in_threads(work, range(1000), 1, no_stop)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="item 2"):
        next(results)
    assert len(begun) <= 5
