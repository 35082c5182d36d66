"""Many pieces of work in threads, for code that releases Python's lock: numpy on large arrays, scipy's transforms, libsvm."""

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
    """Around questions whether to stop that are asked again and again while another thread, which may hang, is waited for. A
    watchdog takes any other question for progress. Holds for this thread alone."""
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
    """The result of each item, in the order of the items whatever the number of threads.

    At most two items a thread are in progress or wait to be asked for, which bounds memory. `items` is read and check_stop is
    called in the caller's thread: before each result, and every LOOK_SECONDS while one is awaited. Exceptions of all three pass
    through, once the items in progress are done; no further ones are begun.
    """
    pool = ThreadPoolExecutor(threads)
    try:
        for future in started_ahead(lambda item: pool.submit(work, item), items, most=2 * threads):
            check_stop()
            yield _awaited(future, check_stop)
    finally:
        pool.shutdown(cancel_futures=True)


def started_ahead(start: Callable[[Item], Result], items: Iterable[Item], most: int) -> Iterator[Result]:
    """What `start` returns of each item, such as a future, in order; at most `most` are started and not yet asked for."""
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
