"""Run work items in threads, for code that releases the GIL: numpy on large arrays, scipy's transforms, libsvm."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

LOOK_SECONDS = 1.0

_is_waiting = ContextVar("is_waiting", default=False)


@contextmanager
def waiting() -> Iterator[None]:
    """Mark stop checks as polling while this thread waits for another thread, which may hang.

    A watchdog counts every unmarked stop check as progress. Applies to this thread only.
    """
    before = _is_waiting.set(True)
    try:
        yield
    finally:
        _is_waiting.reset(before)


def is_waiting() -> bool:
    return _is_waiting.get()


def in_threads(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int, check_stop: Callable[[], None]
) -> Generator[Result, None, None]:
    """Yield the result of each item, in the order of the items.

    At most two items per thread are in progress or finished and not yet consumed, which bounds memory. The caller's thread reads
    `items` and calls check_stop: before each result, and every LOOK_SECONDS while waiting for one. Exceptions of `work`, `items`
    and check_stop propagate after the items in progress have finished; no further items are started.
    """
    pool = ThreadPoolExecutor(threads)
    try:
        for future in started_ahead(lambda item: pool.submit(work, item), items, most=2 * threads):
            check_stop()
            yield _awaited(future, check_stop)
    finally:
        pool.shutdown(cancel_futures=True)


def started_ahead(start: Callable[[Item], Result], items: Iterable[Item], most: int) -> Iterator[Result]:
    """Yield start(item), such as a future, in order. At most `most` items are started and not yet consumed."""
    waiting = iter(items)
    started: deque[Result] = deque()
    while True:
        started.extend(start(item) for item in islice(waiting, most - len(started)))
        if not started:
            return
        yield started.popleft()


def _awaited(future: Future[Result], check_stop: Callable[[], None]) -> Result:
    while not wait([future], LOOK_SECONDS).done:
        with waiting():
            check_stop()
    return future.result()
