"""Many pieces of work in threads, for code that releases Python's lock: numpy on large arrays, scipy's transforms, libsvm."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

LOOK_SECONDS = 1.0


def in_threads(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int, check_stop: Callable[[], None]
) -> Generator[Result, None, None]:
    """The result of each item, in the order of the items whatever the number of threads.

    At most two items a thread are in progress or wait to be asked for, which bounds memory. `items` is read and check_stop is
    called in the caller's thread: before each result, and every LOOK_SECONDS while one is awaited. Exceptions of all three pass
    through, once the items in progress are done; no further ones are begun.
    """
    waiting = iter(items)
    started: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        while True:
            started.extend(pool.submit(work, item) for item in islice(waiting, 2 * threads - len(started)))
            if not started:
                return
            check_stop()
            yield _awaited(started.popleft(), check_stop)
    finally:
        pool.shutdown(cancel_futures=True)


def _awaited(future: Future[Result], check_stop: Callable[[], None]) -> Result:
    while not wait([future], LOOK_SECONDS).done:
        check_stop()
    return future.result()
