"""The retry policy of S3: which requests are retried, after which pause, how often and for how long.

A failed request is retried if its error is transient (s3_errors.is_transient), after a random pause ("full jitter") that grows up
to LONGEST_PAUSE_SECONDS, for at most `storage.patience_seconds`, and within a budget that all threads share.

Full jitter: "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
"""

import logging
import random
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

from emotion.errors import Interrupted, StorageError
from job.config import StorageConfig
from job.spec.location import S3
from job.storage import s3_errors
from job.storage.protocol import STOP_CHECK_SECONDS
from job.storage.s3_client import S3Connection

log = logging.getLogger(__name__)

T = TypeVar("T")

LONGEST_PAUSE_SECONDS = 20.0  # the longest pause between two tries of one request; only an empty retry budget can make it longer
FIRST_PAUSE_SECONDS = 0.4  # the longest first pause; it doubles from try to try
DNS_TRIES = 3  # a host name that cannot be resolved is probably mistyped or in another network: no more tries
BURST_RETRIES = 50.0  # retries that all threads together may send at once: the size of the retry budget
RETRIES_PER_SECOND = 2.0  # the rate at which the retry budget fills up
RETRIES_PER_SUCCESS = 0.1  # what each successful request adds to the retry budget


class RetryBudget:
    """A token bucket for the retries of all threads, so that they do not flood a server in trouble."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tokens, self._filled = BURST_RETRIES, time.monotonic()

    def record_success(self) -> None:
        with self._lock:
            self._tokens = min(BURST_RETRIES, self._tokens + RETRIES_PER_SUCCESS)

    def take(self) -> float:
        """Take one retry from the budget. Returns the seconds to wait until it is available."""
        with self._lock:
            now = time.monotonic()
            self._tokens = min(BURST_RETRIES, self._tokens + (now - self._filled) * RETRIES_PER_SECOND)
            self._filled = now
            self._tokens -= 1
            return max(0.0, -self._tokens / RETRIES_PER_SECOND)


@lru_cache
def _shared(config: StorageConfig) -> tuple[S3Connection, RetryBudget]:
    return S3Connection(config), RetryBudget()


class S3Requests:
    """Sends requests, and retries them according to the retry policy. All threads share the connection and the budget."""

    def __init__(self, config: StorageConfig, should_stop: Callable[[], bool]) -> None:
        self.config, self.should_stop = config, should_stop
        self.connection, self.budget = _shared(config)

    def raise_if_stopped(self) -> None:
        if self.should_stop():
            raise Interrupted("storage: stopped")

    def call(
        self,
        action: str,
        operation: str,
        target: S3,
        is_expected: Callable[[Exception], bool] = lambda _: False,
        **parameters: Any,
    ) -> Any:
        """The answer to an operation of boto3's client on an object. Other parameters and errors as in `send`."""
        parameters |= {"Bucket": target.bucket, "Key": target.key}
        return self.send(action, target, lambda client: getattr(client, operation)(**parameters), is_expected)

    def send(
        self, action: str, target: S3, attempt: Callable[[Any], T], is_expected: Callable[[Exception], bool] = lambda _: False
    ) -> T:
        """The result of `attempt(client)`, repeated while it fails and a retry may help.
        action: as in an IAM policy. is_expected: tells which errors are raised unchanged. Raises StorageError, Interrupted."""
        retries = Retries(self, action, target)
        while True:
            self.raise_if_stopped()
            client = self.connection.client()
            try:
                result = attempt(client)
            except s3_errors.REQUEST_FAILURES as error:
                if is_expected(error):
                    raise
                retries.pause_or_raise(error, client)
            else:
                self.budget.record_success()
                return result


class Retries:
    """The retries of one request. action, target: for messages."""

    def __init__(self, requests: S3Requests, action: str, target: S3) -> None:
        self._requests, self._action, self._url, self._bucket = requests, action, str(target), target.bucket
        self._since = time.monotonic()
        self._tries = 0
        self._renewed = False
        self._random = random.Random()  # unseeded: jitter has to differ from task to task, and no result depends on it

    def reset(self) -> None:
        """Count tries and seconds from zero: the last try made progress."""
        self._since, self._tries = time.monotonic(), 0

    def pause_or_raise(self, error: Exception, client: Any) -> None:
        """Wait before the next try. Raises StorageError if there is no next try, Interrupted when asked to stop."""
        self._tries += 1
        if s3_errors.error_code(error) in s3_errors.EXPIRED_CODES and not self._renewed:
            self._renewed = True
            log.info("storage: credentials have expired: reading them again")
            self._requests.connection.renew(client)
            return
        if not s3_errors.is_transient(error) or (s3_errors.is_unknown_host(error) and self._tries >= DNS_TRIES):
            final = s3_errors.final_error(error, self._action, self._url)
            raise type(final)(f"{final}{self._requests.connection.hint(client, self._bucket)}") from error
        waited = time.monotonic() - self._since
        if waited > self._requests.config.patience_seconds:
            raise StorageError(
                f"storage: {self._action} {self._url}: {s3_errors.reason_of(error)}, for {waited:.0f} s and {self._tries} tries "
                f"(storage.patience_seconds). Run it again when the server answers: nothing is lost."
                f"{self._requests.connection.hint(client, self._bucket)}"
            ) from error
        log.info("storage: %s %s: %s, trying again", self._action, self._url, s3_errors.reason_of(error))
        longest = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(self._tries - 1, 100))
        deadline = time.monotonic() + max(self._random.uniform(0, longest), self._requests.budget.take())
        while (remaining := deadline - time.monotonic()) > 0:
            if self._requests.should_stop():
                raise Interrupted(f"storage: stopped while waiting for {self._url}") from error
            time.sleep(min(remaining, STOP_CHECK_SECONDS))
