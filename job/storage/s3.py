"""A prefix of an S3 bucket behind the storage protocol.

s3_client    one boto3 client for all threads, credentials
s3_answers   validation of answers
s3_errors    meaning of errors, whether they are transient, messages
s3_retry     the retry policy
s3_download  verified, resumable reading
s3_upload    writing, large files in parts

boto3, botocore and urllib3 are imported in these modules only.
"""

import concurrent.futures
import contextlib
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

from botocore.exceptions import ClientError

from emotion.errors import EmotionError, StorageError
from emotion.threads import waiting
from job.config import StorageConfig
from job.spec.location import S3
from job.storage.protocol import STALE_SECONDS, STOP_CHECK_SECONDS, AbsentError, Entry, Fetched
from job.storage.s3_download import ObjectHeaders, append_rest, download, is_object, modified_at, read_headers, read_object
from job.storage.s3_errors import BrokenAnswerError
from job.storage.s3_retry import S3Requests
from job.storage.s3_upload import PUT_OBJECT, abort_upload, is_condition_failed, list_uploads, put_content, upload

log = logging.getLogger(__name__)

T = TypeVar("T")

PAGES_PER_LINE = 100  # of a listing, between two lines of progress in the log
LIST_TIMEOUTS = 3  # a page of a listing may take this many times `storage.timeout_seconds`


class S3Prefix:
    """The objects whose keys begin with a prefix, shown as files below a folder. Methods as in job.storage.protocol.Storage."""

    def __init__(self, location: S3, config: StorageConfig, should_stop: Callable[[], bool]) -> None:
        self._location = location
        self._requests = S3Requests(config, should_stop)
        self._cleared: set[tuple[str, bool]] = set()

    @property
    def url(self) -> str:
        return str(self._location)

    def object_at(self, name: str) -> S3:
        """The location of a file. An empty name is the prefix itself, with its slash."""
        return S3(self._location.bucket, f"{self._location.key}/{name}" if self._location.key else name)

    def _folder_prefix(self, folder: str) -> str:
        return self.object_at(f"{folder}/" if folder else "").key

    def problem(self) -> EmotionError | None:
        try:
            self._list_page("", "", 1)
        except StorageError as error:
            return error
        return None

    def identity(self) -> str:
        return self._requests.connection.identity()

    def clock_ahead_seconds(self) -> float | None:
        return self._requests.connection.clock_ahead_seconds

    def create(self) -> None:
        """Nothing to create: the bucket has to exist, and folders are parts of keys."""

    def entries(self, folder: str = "") -> Iterator[Entry]:
        prefix, token = self._folder_prefix(""), ""
        # To detect servers that list in circles: they repeat pages, under the same tokens or new ones.
        tokens, firsts = {token}, set[str]()
        while True:
            page = self._list_page(folder, token, 1000)
            contents = page.get("Contents", [])
            for found in contents:
                name = found["Key"].removeprefix(prefix)
                # Consoles create an empty object with a slash at the end for a folder.
                if name and not name.endswith("/"):
                    yield Entry(name, found["Size"], found["ETag"].strip('"'), _nanoseconds(found["LastModified"]))
            if not page["IsTruncated"]:
                return
            token = page.get("NextContinuationToken", "")
            problem = ""
            if not token:
                problem = "ends in the middle, as of a server that only supports the first version of the request"
            elif token in tokens or not contents or contents[0]["Key"] in firsts:
                problem = f"does not end: after {len(tokens)} pages there is nothing new, and the server says that more follows"
            if problem:
                raise StorageError(
                    f"storage: s3:ListBucket {self.object_at(folder)}: the listing {problem}. See the server's own log, or use "
                    f"another object storage."
                )
            tokens.add(token)
            firsts.add(contents[0]["Key"])
            if len(tokens) % PAGES_PER_LINE == 0:
                log.info("storage: listing %s: %d pages so far", self.object_at(folder), len(tokens))

    def _list_page(self, folder: str, token: str, max_keys: int) -> dict[str, Any]:
        request = {"Bucket": self._location.bucket, "Prefix": self._folder_prefix(folder), "MaxKeys": max_keys}
        if token:
            request["ContinuationToken"] = token
        return self._page(request, self.object_at(folder))

    def _page(self, request: dict[str, Any], target: S3) -> dict[str, Any]:
        """The answer to a request for a listing. target: for messages."""

        def attempt(client: Any) -> dict[str, Any]:
            page: dict[str, Any] = self._within_timeout(lambda: client.list_objects_v2(**request))
            for found in page.get("Contents", ()):
                if not found["Key"].startswith(request["Prefix"]):
                    raise BrokenAnswerError(f"the listing is one of another prefix: it has {found['Key'][:80]!a}")
            return page

        return self._requests.send("s3:ListBucket", target, attempt)

    def _within_timeout(self, request: Callable[[], T]) -> T:
        """The result of a request whose answer boto3 reads as a whole, so that neither a timeout nor a stop would be noticed.
        Raises BrokenAnswerError if the answer takes too long, Interrupted."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run() -> None:
            try:
                future.set_result(request())
            except BaseException as error:  # noqa: BLE001  raised below, in the thread that waits
                future.set_exception(error)

        threading.Thread(target=run, name="storage", daemon=True).start()
        timeout = LIST_TIMEOUTS * self._requests.config.timeout_seconds
        deadline = time.monotonic() + timeout
        while not concurrent.futures.wait([future], STOP_CHECK_SECONDS).done:
            with waiting():
                self._requests.raise_if_stopped()
            if time.monotonic() > deadline:
                raise BrokenAnswerError(f"no complete answer in {timeout:g} s")
        return future.result()

    def entry(self, name: str) -> Entry:
        headers = read_headers(self._requests, self.object_at(name))
        found = ObjectHeaders.parse(headers)
        return Entry(name, found.size, found.etag, _nanoseconds(modified_at(headers)))

    def read(self, name: str) -> bytes | None:
        target = self.object_at(name)

        def listed() -> str | None:
            page = self._page({"Bucket": target.bucket, "Prefix": target.key, "MaxKeys": 1}, target)
            return next((found["ETag"].strip('"') for found in page.get("Contents", ()) if found["Key"] == target.key), None)

        return read_object(self._requests, target, listed)

    def digest(self, name: str) -> str:
        with open(os.devnull, "r+b", buffering=0) as null:  # noqa: PTH123  pathlib has no unbuffered mode for it either
            return append_rest(self._requests, self.object_at(name), null, None, self.entry(name)).sha256

    def get(self, name: str, target: Path, sha256: str | None = None, entry: Entry | None = None) -> Fetched:
        return download(self._requests, self.object_at(name), target, sha256, entry or self.entry(name))

    def write(self, name: str, content: bytes) -> None:
        put_content(self._requests, self.object_at(name), content, hashlib.sha256(content).hexdigest())

    def write_new(self, name: str, content: bytes) -> bool:
        target, sha256 = self.object_at(name), hashlib.sha256(content).hexdigest()
        if "If-None-Match" not in self._requests.connection.unsupported:
            try:
                put_content(self._requests, target, content, sha256, only_if_absent=True)
            except ClientError as error:
                if is_condition_failed(error):
                    return False
                self._requests.connection.drop_header("If-None-Match")
            else:
                return True
        # The server has no atomic way: if two writers write at the same moment, both may be told that they succeeded.
        if self.read(name) is not None:
            return False
        put_content(self._requests, target, content, sha256)
        return True

    def put(self, source: Path, name: str, sha256: str) -> None:
        try:
            upload(self._requests, source, self.object_at(name), sha256)
        except StorageError:
            self._cleared.clear()  # an upload may have begun although its answer was lost
            raise

    def remove(self, name: str) -> None:
        target = self.object_at(name)

        def attempt(client: Any) -> None:
            answer = client.delete_object(Bucket=target.bucket, Key=target.key)
            status = answer["ResponseMetadata"]["HTTPStatusCode"]
            if status != HTTPStatus.NO_CONTENT and is_object(self._requests, client, target):
                raise BrokenAnswerError(f"the answer is HTTP {status} without a body, and the object is still there")

        self._requests.send("s3:DeleteObject", target, attempt)

    def move(self, name: str, to: str) -> None:
        source = self.object_at(name)
        origin = {"Bucket": source.bucket, "Key": source.key}
        with contextlib.suppress(AbsentError):
            self._requests.call(PUT_OBJECT, "copy_object", self.object_at(to), CopySource=origin)
            self.remove(name)

    def clear(self, folder: str, own: bool) -> None:
        if (folder, own) in self._cleared:
            return
        self._cleared.add((folder, own))
        bucket, now = self._location.bucket, time.time()
        try:
            for unfinished in list_uploads(self._requests, self.object_at(folder), self._folder_prefix(folder)):
                if own or now - unfinished["Initiated"].timestamp() > STALE_SECONDS:
                    abort_upload(self._requests, S3(bucket, unfinished["Key"]), unfinished["UploadId"])
        except StorageError as error:
            log.warning("%s: unfinished uploads of killed jobs are left to the bucket's lifecycle rules", error)


def _nanoseconds(moment: datetime) -> int:
    return int(moment.timestamp()) * 10**9
