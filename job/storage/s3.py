"""A prefix of an S3 bucket as a place. The only module that knows boto3, and `job.storage.protocol` the only one that imports it.

boto3 signs, sends and understands; it neither tries again nor checks what arrives, both of which are done here. Its own
retries of a download do not wait, a flipped bit passes unseen where the store sends no checksum, and so does an object that
changes between two parts. What must hold instead:

- An object is requested again with full jitter, within a budget that all threads share and for `storage.patience_seconds`; a
  download goes on at the byte that it came to, and only in the object that it began with (If-Match).
- Bytes are held against a digest: the one asked for, else the store's own checksum, else the MD5 that a plain ETag is.
- What was denied, or will not come however long one waits, is told at once, with action, bucket and key.

Amazon documents the errors at https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html, and full jitter in
"Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
"""

import base64
import collections
import concurrent.futures
import contextlib
import fcntl
import hashlib
import html
import http.client
import ipaddress
import logging
import os
import random
import re
import socket
import threading
import time
import urllib.parse
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any, TypeVar

import boto3
import botocore.exceptions
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest, AWSResponse
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError
from urllib3 import BaseHTTPResponse
from urllib3.exceptions import HTTPError, NameResolutionError

from emotion.errors import AccessError, Interrupted, StorageError
from job.config import StorageConfig
from job.spec.location import S3, S3_SCHEME
from job.storage.protocol import ASKED_SECONDS, STALE_SECONDS, AbsentError, Entry, Fetched, WrongBytesError

log = logging.getLogger(__name__)

T = TypeVar("T")

BLOCK = 1 << 20
PART_BYTES = 16 << 20
MOST_PARTS = 10_000
PARTS_AT_ONCE = 4
"""Of one upload; they are in memory meanwhile."""

FIRST_WAIT_SECONDS = 0.2
LONGEST_WAIT_SECONDS = 20.0
RETRIES_AT_ONCE = 50.0
RETRIES_A_SECOND = 2.0
EARNED_BY_AN_ANSWER = 0.1
"""The budget: so many requests may be repeated in a burst, and more as time goes by and as the store answers."""
PAGE_TIMEOUTS = 3
"""A page of a list may take so many times `storage.timeout_seconds`."""
NAME_LOOKUPS = 3
"""A host whose name is not found is mistyped or in a network that is not there; that is soon known."""
STRIKES = 2
"""So often may the bytes of one object be wrong."""
LOW_BYTES_A_SECOND = 1024
ERROR_BYTES = 1 << 16
"""Of an answer that tells of an error; more is not read."""
PARAMETERS = {"Range": "Range", "If-Match": "IfMatch", "x-amz-checksum-mode": "ChecksumMode"}
"""What boto3 calls headers of a request for an object."""
OPTIONAL = ("x-amz-checksum-mode", "If-Match")
"""Headers without which a store that does not know them can be read, the least missed first."""
PROGRESS_BYTES = 64 << 10
"""So much from one connection, and the next is not one try more."""

AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}
"""HTTP status of what may go well the next time; 409 is a conditional request that met another one."""
AGAIN_CODES = {
    "BadDigest",
    "BandwidthLimitExceeded",
    "InternalError",
    "OperationAborted",
    "RequestLimitExceeded",
    "RequestTimeout",
    "RequestTimeoutException",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequestsException",
}
EXPIRED_CODES = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
NOT_KNOWN_CODES = {"BadRequest", "InvalidArgument", "InvalidRequest", "NotImplemented", "NotSupported", "400"}
BAD_CREDENTIALS_CODES = {"InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch"}
ABSENT_CODES = {"NoSuchKey", "NotFound", "404"}
DIFFERENT = HTTPStatus.PRECONDITION_FAILED
"""If-Match or If-None-Match does not hold."""
NO_SUCH_RANGE = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
NO_CREDENTIALS = (
    botocore.exceptions.NoCredentialsError,
    botocore.exceptions.PartialCredentialsError,
    botocore.exceptions.CredentialRetrievalError,
    botocore.exceptions.TokenRetrievalError,
    botocore.exceptions.ProfileNotFound,
)
UNREACHED = (botocore.exceptions.ConnectionError, botocore.exceptions.HTTPClientError, ResponseParserError)


class _BrokenError(Exception):
    """A body that did not come to its end."""


_FAILURES = (ClientError, BotoCoreError, ResponseParserError, _BrokenError)


class _Connection:
    """One boto3 client for all threads, made anew where its credentials have expired, and the budget of retries."""

    def __init__(self, config: StorageConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._client: Any = None
        self._credentials: Any = None
        self._urls: dict[str, str] = {}
        """Of each bucket, up to the key."""
        self._by_client: set[str] = set()
        """Buckets that a request of ours does not get to."""
        self._tokens, self._filled = RETRIES_AT_ONCE, time.monotonic()
        self.refused: set[str] = set()
        """Names of headers that this store does not know."""

    def client(self) -> Any:
        """Raises StorageError where none can be made."""
        with self._lock:
            if self._client is None:
                try:
                    self._client = self._made()
                except NO_CREDENTIALS as error:
                    raise AccessError(f"storage: {_reason(error)}. See AWS_PROFILE and the files of AWS.") from error
                except (BotoCoreError, ValueError) as error:
                    raise StorageError(
                        f"storage: {_reason(error)}. See storage.endpoint_url, storage.region and AWS's own settings."
                    ) from error
            return self._client

    def _made(self) -> Any:
        timeout = self._config.timeout_seconds
        # The checksums that newer clients add by themselves are what many stores do not know; what is sent has a Content-MD5.
        config = Config(
            retries={"total_max_attempts": 1, "mode": "standard"},
            connect_timeout=timeout,
            read_timeout=timeout,
            max_pool_connections=self._config.connections + PARTS_AT_ONCE,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        session = boto3.session.Session()
        # Other stores take any; Amazon's says which one it is.
        region = self._config.region or session.region_name or "us-east-1"
        _refuse_link_local(self._config.endpoint_url)
        self._credentials = session.get_credentials()
        return session.client("s3", region_name=region, endpoint_url=self._config.endpoint_url, config=config)

    def get(
        self, client: Any, bucket: str, key: str, headers: Mapping[str, str]
    ) -> tuple[Mapping[str, str], BaseHTTPResponse]:
        """Headers (in lower case) and body of an object, or of what is asked for of it. Raises what boto3's get_object would.

        Signed and sent by boto3's own parts, without what its clients do around them: that takes longer than to fetch a song.
        """
        if bucket not in self._by_client:
            credentials = self._credentials.get_frozen_credentials() if self._credentials else None
            if credentials is None:
                raise botocore.exceptions.NoCredentialsError
            url = self._urls.get(bucket)
            if url is None:
                signed = client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "x"})
                url = self._urls[bucket] = signed.partition("?")[0].removesuffix("x")
            request = AWSRequest("GET", url + urllib.parse.quote(key, safe="/~"), headers=dict(headers))
            request.stream_output = True
            S3SigV4Auth(credentials, "s3", client.meta.region_name).add_auth(request)
            # What the client sends with: its proxies, certificates, time limits and connections.
            response = client._endpoint.http_session.send(request.prepare())
            if response.status_code in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
                return {name.lower(): value for name, value in response.headers.items()}, response.raw
            error = _error_of(response, self._config.timeout_seconds)
            if _status(error) >= HTTPStatus.BAD_REQUEST and _code(error) != "AuthorizationHeaderMalformed":
                raise error
            # The bucket may be in another region, which clients find out.
            self._by_client.add(bucket)
        found = client.get_object(
            Bucket=bucket, Key=key, **{PARAMETERS[name]: value for name, value in headers.items()}
        )
        return found["ResponseMetadata"]["HTTPHeaders"], found["Body"]._raw_stream

    def renew(self, client: Any) -> None:
        """Have credentials read anew; `client` is the one whose credentials have expired."""
        with self._lock:
            if self._client is client:
                self._client = None

    def answered(self) -> None:
        with self._lock:
            self._tokens = min(RETRIES_AT_ONCE, self._tokens + EARNED_BY_AN_ANSWER)

    def seconds_until_retry(self) -> float:
        """Take one from the budget; how long to wait until it is there."""
        with self._lock:
            now = time.monotonic()
            self._tokens = min(RETRIES_AT_ONCE, self._tokens + (now - self._filled) * RETRIES_A_SECOND)
            self._filled = now
            self._tokens -= 1
            return max(0.0, -self._tokens / RETRIES_A_SECOND)

    def refuses(self, header: str) -> None:
        if header not in self.refused:
            self.refused.add(header)
            log.warning("storage: this store does not know %s: going on without it", header)


@lru_cache
def _connection(config: StorageConfig) -> _Connection:
    return _Connection(config)


class _Patience:
    """What one request may still be tried: `again` waits, or raises what the request has failed with."""

    def __init__(
        self, connection: _Connection, config: StorageConfig, action: str, what: str, stop: Callable[[], bool]
    ):
        self._connection, self._config, self._stop = connection, config, stop
        self._action, self._what = action, what
        self._since = time.monotonic()
        self._tries = 0
        self._renewed = False
        # Jitter is to differ from task to task, and nothing that is computed depends on it.
        self._random = random.Random()

    def progress(self) -> None:
        self._since, self._tries = time.monotonic(), 0

    def again(self, error: Exception, client: Any) -> None:
        """Wait before the next try. Raises StorageError where there is to be none, Interrupted when asked to stop."""
        self._tries += 1
        if _code(error) in EXPIRED_CODES and not self._renewed:
            self._renewed = True
            log.info("storage: credentials have expired: reading them anew")
            self._connection.renew(client)
            return
        if not _may_pass(error) or (_is_unknown_host(error) and self._tries >= NAME_LOOKUPS):
            raise _explained(error, self._action, self._what) from error
        waited = time.monotonic() - self._since
        if waited > self._config.patience_seconds:
            raise StorageError(
                f"storage: {self._action} {self._what}: {_reason(error)}, for {waited:.0f} s and {self._tries} tries "
                f"(storage.patience_seconds). Run it again when the store answers: nothing is lost."
            ) from error
        log.info("storage: %s %s: %s, trying again", self._action, self._what, _reason(error))
        longest = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** min(self._tries, 10))
        wait = max(self._random.uniform(0, longest), self._connection.seconds_until_retry())
        until = time.monotonic() + wait
        while (left := until - time.monotonic()) > 0:
            if self._stop():
                raise Interrupted(f"storage: stopped while waiting for {self._what}") from error
            time.sleep(min(left, 0.1))


@dataclass
class _Object:
    """What the headers of an answer say of an object. checksums: of all its bytes, in base64, by the kind of checksum."""

    size: int
    etag: str
    checksums: dict[str, str]
    md5: str
    """The ETag where it is one: not of an object in parts, which has a hyphen, nor of an encrypted one, which looks like it."""

    @staticmethod
    def of(headers: Mapping[str, str]) -> "_Object":
        whole = headers.get("content-range", "").rpartition("/")[2]
        etag = headers.get("etag", "").strip('"')
        encrypted = headers.get("x-amz-server-side-encryption", "AES256") != "AES256"
        encrypted = encrypted or "x-amz-server-side-encryption-customer-algorithm" in headers
        checksums = {}
        if headers.get("x-amz-checksum-type", "FULL_OBJECT") == "FULL_OBJECT" and not whole:
            found = {kind: headers.get(f"x-amz-checksum-{kind}", "") for kind in ("sha256", "crc32")}
            checksums = {kind: text for kind, text in found.items() if text and "-" not in text}
        ours = headers.get("x-amz-meta-sha256", "")
        if re.fullmatch("[0-9a-f]{64}", ours):
            # What a job has put there.
            checksums["sha256"] = _base64(bytes.fromhex(ours))
        md5 = etag if _looks_like_md5(etag) and not encrypted else ""
        if not (size := whole or headers.get("content-length", "")).isdigit():
            raise _BrokenError("the answer does not say how long the object is")
        return _Object(int(size), etag, checksums, md5)


class _Sums:
    """Digests of what has arrived so far."""

    def __init__(self, md5: bool, crc32: bool = False) -> None:
        self.sha256 = hashlib.sha256()
        self.md5 = _md5(b"") if md5 else None
        self.crc32 = 0 if crc32 else None

    def add(self, block: bytes) -> None:
        self.sha256.update(block)
        if self.md5 is not None:
            self.md5.update(block)
        if self.crc32 is not None:
            self.crc32 = zlib.crc32(block, self.crc32)

    def compared(self, sha256: str | None, found: _Object) -> tuple[str, str, str]:
        """The strongest that both sides have: its name, what it is, and what it should be."""
        if sha256 is not None:
            return "sha256", self.sha256.hexdigest(), sha256
        if "sha256" in found.checksums:
            return "store sha256", _base64(self.sha256.digest()), found.checksums["sha256"]
        if self.crc32 is not None:
            return "store crc32", _base64(self.crc32.to_bytes(4, "big")), found.checksums["crc32"]
        if self.md5 is not None and found.md5:
            return "etag", self.md5.hexdigest(), found.md5
        return "size", "", ""


@contextlib.contextmanager
def _part_of(target: Path, entry: Entry, sha256: str | None) -> Iterator[IO[bytes]]:
    """A file to append to, which holds what an earlier attempt has left of this very object.

    What cannot be checked at the end begins anew. So does who finds it in use: another process, or a thread of an attempt that
    was left behind, has it locked. Removed where the block fails with anything but a stop or a failing store.
    """
    tag = re.sub("[^0-9a-zA-Z]", "", entry.tag)[:32]
    part = target.with_name(f".{target.name}.{tag}.part")
    with contextlib.ExitStack() as stack:
        file: IO[bytes] = stack.enter_context(part.open("a+b"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who had it locked may have made it the target.
            in_use = not part.exists() or not os.path.samestat(part.stat(), os.fstat(file.fileno()))
        except BlockingIOError:
            in_use = True
        except OSError:
            # A file system without locks.
            in_use = False
        if in_use:
            part = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.part")
            file = stack.enter_context(part.open("w+b"))
            stack.callback(part.unlink, missing_ok=True)
        elif sha256 is None and not _looks_like_md5(entry.tag):
            file.truncate(0)
        try:
            yield file
        except WrongBytesError:
            part.unlink(missing_ok=True)
            raise


class S3Prefix:
    """The objects whose keys begin with a prefix, as files below a folder."""

    def __init__(self, location: S3, config: StorageConfig, should_stop: Callable[[], bool]) -> None:
        self._url, self._config, self._should_stop = str(location), config, should_stop
        self._bucket = location.bucket
        self._prefix = f"{location.key}/" if location.key else ""
        self._connection = _connection(config)
        self._cleared: set[str] = set()

    @property
    def url(self) -> str:
        return self._url

    def problem(self) -> StorageError | None:
        try:
            self._listed("", "", 1)
        except StorageError as error:
            return error
        return None

    def create(self) -> None:
        pass

    # Reading

    def entries(self, folder: str = "") -> Iterator[Entry]:
        after = ""
        while True:
            page = self._listed(folder, after, 1000)
            for found in page.get("Contents", ()):
                name = found["Key"].removeprefix(self._prefix)
                # Consoles make an empty object with a slash at the end for a folder.
                if name and not name.endswith("/"):
                    yield Entry(name, found["Size"], found["ETag"].strip('"'), _nanoseconds(found["LastModified"]))
            if not page.get("IsTruncated"):
                return
            before, after = after, page.get("NextContinuationToken", "")
            if after in ("", before):
                raise StorageError(
                    f"storage: s3:ListBucket {self._what(folder)}: the store ends the list in the middle, as one does that only "
                    f"knows the first version of the request. Use another store."
                )

    def _listed(self, folder: str, after: str, most: int) -> dict[str, Any]:
        more = {"ContinuationToken": after} if after else {}
        asked = {"Bucket": self._bucket, "Prefix": self._folder(folder), "MaxKeys": most, **more}
        return self._tried(
            "s3:ListBucket", folder, lambda client: self._hurried(lambda: client.list_objects_v2(**asked))
        )

    def _hurried(self, request: Callable[[], T]) -> T:
        """What a request gives whose answer boto3 reads as a whole: a store that trickles it is left, and a stop is heard."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run() -> None:
            try:
                future.set_result(request())
            except _FAILURES as error:
                future.set_exception(error)
            finally:
                # Nobody is to wait for what has ended in another way.
                future.cancel()

        threading.Thread(target=run, name="storage", daemon=True).start()
        until = time.monotonic() + PAGE_TIMEOUTS * self._config.timeout_seconds
        while not concurrent.futures.wait([future], ASKED_SECONDS).done:
            if self._should_stop():
                raise Interrupted("storage: stopped")
            if time.monotonic() > until:
                raise _BrokenError(f"no whole answer in {PAGE_TIMEOUTS * self._config.timeout_seconds:g} s")
        return future.result()

    def entry(self, name: str) -> Entry:
        headers = self._headers(name)
        found = _Object.of(headers)
        return Entry(name, found.size, found.etag, _nanoseconds(parsedate_to_datetime(headers["last-modified"])))

    def _headers(self, name: str) -> Mapping[str, str]:
        """What a store says of an object. Asked for with its first byte: an answer to HEAD has no place for what went wrong."""

        def attempt(client: Any) -> Mapping[str, str]:
            try:
                headers, body = self._connection.get(client, self._bucket, self._prefix + name, {"Range": "bytes=0-0"})
            except ClientError as error:
                if _status(error) != NO_SUCH_RANGE:
                    raise
                # It is empty.
                headers, body = self._connection.get(client, self._bucket, self._prefix + name, {})
            if "content-range" in headers:
                collections.deque(self._blocks(body), 0)
            else:
                body.close()
            _Object.of(headers)
            return headers

        return self._tried("s3:GetObject", name, attempt)

    def read(self, name: str) -> bytes | None:
        def attempt(client: Any) -> bytes:
            headers, body = self._connection.get(client, self._bucket, self._prefix + name, {})
            content = b"".join(self._blocks(body))
            found = _Object.of(headers)
            if len(content) != found.size:
                raise _BrokenError(f"the answer ended after {len(content)} of {found.size} bytes")
            sums = _Sums(md5="sha256" not in found.checksums)
            sums.add(content)
            self._require(name, sums, None, found)
            return content

        for strike in range(1, STRIKES + 1):
            try:
                return self._tried("s3:GetObject", name, attempt)
            except AbsentError:
                return None
            except WrongBytesError:
                if strike == STRIKES:
                    raise
        raise AssertionError("each strike returns or raises")

    def digest(self, name: str) -> str:
        with open(os.devnull, "r+b", buffering=0) as nowhere:  # noqa: PTH123  pathlib has no other way to say it either
            return self._download(name, nowhere, None, self.entry(name)).sha256

    def get(self, name: str, target: Path, sha256: str | None = None, entry: Entry | None = None) -> Fetched:
        entry = entry or self.entry(name)
        for strike in range(1, STRIKES + 1):
            try:
                with _part_of(target, entry, sha256) as file:
                    fetched = self._download(name, file, sha256, entry)
                    file.flush()
                    os.fsync(file.fileno())
                    os.utime(file.fileno(), ns=(entry.mtime_ns, entry.mtime_ns))
                    # While it is locked: nobody else may go on with it now.
                    Path(file.name).replace(target)
            except WrongBytesError as error:
                if strike == STRIKES:
                    raise
                log.warning("%s: fetching it once more", error)
            except OSError as error:
                raise StorageError.of(error, f"storage: cannot write {target}: {error.strerror}.") from error
            else:
                return fetched
        raise AssertionError("each strike returns or raises")

    def _download(self, name: str, file: IO[bytes], sha256: str | None, entry: Entry) -> Fetched:
        """Append to `file` what it lacks of an object. Raises WrongBytesError where the bytes are others than they should be."""
        patience = self._patience("s3:GetObject", name)
        found, sums = _Object(entry.size, entry.tag, {}, ""), _Sums(md5=sha256 is None)
        if file.tell():
            file.seek(0)
            while block := file.read(BLOCK):
                sums.add(block)
        earlier = offset = file.tell()
        if earlier and _looks_like_md5(entry.tag):
            found.md5 = entry.tag
        while offset < entry.size:
            began = offset
            conditions = {"Range": f"bytes={offset}-"} if offset else {}
            if "If-Match" not in self._connection.refused:
                conditions["If-Match"] = f'"{entry.tag}"'
            if sha256 is None and "x-amz-checksum-mode" not in self._connection.refused:
                conditions["x-amz-checksum-mode"] = "ENABLED"
            client = self._connection.client()
            try:
                headers, body = self._connection.get(client, self._bucket, self._prefix + name, conditions)
                now = _Object.of(headers)
                if (now.etag, now.size) != (entry.tag, entry.size):
                    body.close()
                    raise self._changed(name, f"it has {now.size} bytes and the ETag {now.etag}", entry)
                found.md5 = now.md5
                found.checksums = found.checksums or now.checksums
                knows_ranges = "content-range" in headers
                if offset and (not knows_ranges or (earlier and not (sha256 or now.md5 or now.checksums))):
                    # From the beginning: nothing would tell whether what an earlier attempt has left is right.
                    file.truncate(0)
                    earlier = offset = began = 0
                    if knows_ranges:
                        body.close()
                        continue
                if not offset:
                    by_sha256, by_crc32 = sha256 or "sha256" in now.checksums, "crc32" in now.checksums
                    sums = _Sums(md5=not (by_sha256 or by_crc32), crc32=not by_sha256 and by_crc32)
                for block in self._blocks(body):
                    file.write(block)
                    sums.add(block)
                    offset += len(block)
                if offset < entry.size:
                    raise _BrokenError(f"the answer ended after {offset} of {entry.size} bytes")
            except _FAILURES as error:
                if _status(error) in (DIFFERENT, NO_SUCH_RANGE):
                    raise self._changed(name, "its ETag is another", entry) from error
                optional = [header for header in OPTIONAL if header in conditions]
                if optional and _is_not_known(error):
                    self._connection.refuses(optional[0])
                    continue
                if offset - began >= PROGRESS_BYTES:
                    patience.progress()
                patience.again(error, client)
        if offset > entry.size:
            raise WrongBytesError(f"storage: {self._what(name)} is damaged: {offset} bytes, expected {entry.size}")
        kind = self._require(name, sums, sha256, found)
        self._connection.answered()
        return Fetched(sums.sha256.hexdigest(), kind)

    def _require(self, name: str, sums: _Sums, sha256: str | None, found: _Object) -> str:
        """By what the bytes are known to be right. Raises WrongBytesError where they are not."""
        kind, digest, expected = sums.compared(sha256, found)
        if digest != expected:
            hint = ". If the ETags of this store are no MD5, data.manifest says what is right" if kind == "etag" else ""
            raise WrongBytesError(
                f"storage: {self._what(name)} is damaged: by {kind}, {digest}, expected {expected}{hint}"
            )
        return kind

    def _changed(self, name: str, what: str, entry: Entry) -> WrongBytesError:
        return WrongBytesError(
            f"storage: {self._what(name)} changed during download: {what}, expected {entry.size} bytes and the ETag {entry.tag}"
        )

    def _blocks(self, body: BaseHTTPResponse) -> Iterator[bytes]:
        """What arrives, as it arrives. Raises _BrokenError where it breaks off or nearly stops, Interrupted."""
        window, arrived = time.monotonic(), 0
        try:
            while True:
                try:
                    # Not until a block is full: a store that sends a byte a second never lets that happen.
                    block: bytes = body.read1(BLOCK)
                except (HTTPError, http.client.HTTPException, OSError) as error:
                    raise _BrokenError(str(error) or type(error).__name__) from error
                if not block:
                    return
                yield block
                if self._should_stop():
                    raise Interrupted("storage: stopped")
                arrived += len(block)
                seconds = time.monotonic() - window
                if seconds > self._config.timeout_seconds:
                    if arrived < LOW_BYTES_A_SECOND * seconds:
                        raise _BrokenError(f"{arrived} bytes in {seconds:.0f} s")
                    window, arrived = time.monotonic(), 0
        finally:
            body.close()

    # Writing

    def write(self, name: str, content: bytes) -> None:
        self._put(name, content, hashlib.sha256(content).hexdigest())

    def write_new(self, name: str, content: bytes) -> bool:
        sha256 = hashlib.sha256(content).hexdigest()
        if "If-None-Match" not in self._connection.refused:
            try:
                self._put(name, content, sha256, IfNoneMatch="*")
            except ClientError as error:
                if _status(error) == DIFFERENT:
                    return False
                self._connection.refuses("If-None-Match")
            else:
                return True
        if self.read(name) is not None:
            return False
        self._put(name, content, sha256)
        return True

    def put(self, source: Path, name: str, sha256: str) -> None:
        try:
            size = source.stat().st_size
            if size > PART_BYTES:
                self._put_in_parts(source, size, name, sha256)
                return
            content = source.read_bytes()
        except OSError as error:
            raise StorageError.of(error, f"storage: cannot read {source}: {error.strerror}.") from error
        _require_digest(source, hashlib.sha256(content).hexdigest(), sha256)
        self._put(name, content, sha256)

    def _put(self, name: str, content: bytes, sha256: str, **conditions: str) -> None:
        self._tried(
            "s3:PutObject",
            name,
            lambda client: client.put_object(
                **self._object(name),
                Body=content,
                ContentMD5=_base64(_md5(content).digest()),
                Metadata={"sha256": sha256},
                **conditions,
            ),
            passed=(lambda error: _status(error) == DIFFERENT or _is_not_known(error)) if conditions else None,
        )

    def _put_in_parts(self, source: Path, size: int, name: str, sha256: str) -> None:
        """Parts are sent again one by one; unless all arrive the upload is aborted, and nothing of it stays."""
        if self._has(name, size, sha256):
            return
        part_bytes = max(PART_BYTES, -(-size // MOST_PARTS))
        upload = self._tried(
            "s3:PutObject",
            name,
            lambda client: client.create_multipart_upload(**self._object(name), Metadata={"sha256": sha256}),
        )["UploadId"]

        def send(number: int, content: bytes) -> dict[str, Any]:
            md5 = _base64(_md5(content).digest())
            sent = self._tried(
                "s3:PutObject",
                name,
                lambda client: client.upload_part(
                    **self._object(name), UploadId=upload, PartNumber=number, Body=content, ContentMD5=md5
                ),
            )
            return {"PartNumber": number, "ETag": sent["ETag"]}

        digest = hashlib.sha256()
        try:
            with source.open("rb") as file, concurrent.futures.ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
                parts: list[dict[str, Any]] = []
                sending: collections.deque[concurrent.futures.Future[dict[str, Any]]] = collections.deque()
                for number in range(1, -(-size // part_bytes) + 1):
                    content = file.read(part_bytes)
                    digest.update(content)
                    sending.append(pool.submit(send, number, content))
                    if len(sending) >= PARTS_AT_ONCE:
                        parts.append(sending.popleft().result())
                parts += [one.result() for one in sending]
            _require_digest(source, digest.hexdigest(), sha256)
            try:
                self._tried(
                    "s3:PutObject",
                    name,
                    lambda client: client.complete_multipart_upload(
                        **self._object(name), UploadId=upload, MultipartUpload={"Parts": parts}
                    ),
                    passed=lambda error: _code(error) == "NoSuchUpload",
                )
            except ClientError as error:
                # It was completed where only the answer to an earlier try was lost.
                if not self._has(name, size, sha256):
                    raise _explained(error, "s3:PutObject", self._what(name)) from error
        except BaseException as error:
            self._abort(name, upload)
            if isinstance(error, OSError):
                raise StorageError.of(error, f"storage: cannot read {source}: {error.strerror}.") from error
            raise

    def _has(self, name: str, size: int, sha256: str) -> bool:
        """Whether a job has put this content there."""
        try:
            headers = self._headers(name)
        except AbsentError:
            return False
        return (_Object.of(headers).size, headers.get("x-amz-meta-sha256")) == (size, sha256)

    def _abort(self, name: str, upload: str) -> None:
        # Once: there may be little time, and what stays is found by the next attempt.
        with contextlib.suppress(*_FAILURES):
            self._connection.client().abort_multipart_upload(**self._object(name), UploadId=upload)

    def remove(self, name: str) -> None:
        self._tried("s3:DeleteObject", name, lambda client: client.delete_object(**self._object(name)))

    def move(self, name: str, to: str) -> None:
        origin = {"Bucket": self._bucket, "Key": self._prefix + name}
        with contextlib.suppress(AbsentError):
            self._tried("s3:PutObject", to, lambda client: client.copy_object(**self._object(to), CopySource=origin))
            self.remove(name)

    def clear(self, folder: str, own: bool) -> None:
        if folder in self._cleared:
            return
        self._cleared.add(folder)
        try:
            found = self._tried(
                "s3:ListBucketMultipartUploads",
                folder,
                lambda client: client.list_multipart_uploads(Bucket=self._bucket, Prefix=self._folder(folder)),
            )
            for upload in found.get("Uploads", ()):
                if own or time.time() - upload["Initiated"].timestamp() > STALE_SECONDS:
                    self._abort(upload["Key"].removeprefix(self._prefix), upload["UploadId"])
        except StorageError as error:
            log.warning("%s: uploads of killed attempts, if any, are left to the bucket's lifecycle rules", error)

    # Asking

    def _object(self, name: str) -> dict[str, Any]:
        return {"Bucket": self._bucket, "Key": self._prefix + name}

    def _folder(self, name: str) -> str:
        return f"{self._prefix}{name}/" if name else self._prefix

    def _what(self, name: str) -> str:
        return f"{S3_SCHEME}{self._bucket}/{self._prefix}{name}"

    def _patience(self, action: str, name: str) -> _Patience:
        return _Patience(self._connection, self._config, action, self._what(name), self._should_stop)

    def _tried(
        self, action: str, name: str, attempt: Callable[[Any], T], passed: Callable[[Exception], bool] | None = None
    ) -> T:
        """What a request gives, which is sent again where that may help. passed: whether a failure is the caller's to see."""
        patience = self._patience(action, name)
        while True:
            if self._should_stop():
                raise Interrupted("storage: stopped")
            client = self._connection.client()
            try:
                found = attempt(client)
            except _FAILURES as error:
                if passed is not None and passed(error):
                    raise
                patience.again(error, client)
            else:
                self._connection.answered()
                return found


# Failures


def _error_of(response: AWSResponse, seconds: float) -> ClientError:
    """The error that a store's answer is, as boto3 has it. Raises _BrokenError where that does not come in so many seconds."""
    content, until = b"", time.monotonic() + seconds
    try:
        while len(content) < ERROR_BYTES and (block := response.raw.read1(ERROR_BYTES)):
            content += block
            if time.monotonic() > until:
                raise _BrokenError(f"HTTP {response.status_code}, and no whole answer in {seconds:g} s")
    except (HTTPError, http.client.HTTPException, OSError) as error:
        raise _BrokenError(f"HTTP {response.status_code}, and {_reason(error)}") from error
    finally:
        response.raw.close()

    def told(name: bytes) -> str:
        found = re.search(b"<%b>([^<]*)</%b>" % (name, name), content)
        return html.unescape(found[1].decode(errors="replace")) if found else ""

    headers = {name.lower(): value for name, value in response.headers.items()}
    return ClientError(
        {
            "Error": {"Code": told(b"Code") or str(response.status_code), "Message": told(b"Message")},
            "ResponseMetadata": {"HTTPStatusCode": response.status_code, "HTTPHeaders": headers},
        },
        "GetObject",
    )


def _code(error: Exception) -> str:
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, ClientError) else ""


def _status(error: Exception) -> int:
    if not isinstance(error, ClientError):
        return 0
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _is_not_known(error: Exception) -> bool:
    """Whether a store may refuse a request for a header that it does not know."""
    return _status(error) == HTTPStatus.NOT_IMPLEMENTED or _code(error) in NOT_KNOWN_CODES


def _may_pass(error: Exception) -> bool:
    if isinstance(error, ClientError):
        return _code(error) in AGAIN_CODES or _status(error) in AGAIN
    if isinstance(error, botocore.exceptions.SSLError):
        # A server that hangs up in the middle is no wrong certificate.
        return "EOF" in str(error)
    return isinstance(error, (_BrokenError, botocore.exceptions.CredentialRetrievalError, *UNREACHED))


def _is_unknown_host(error: Exception) -> bool:
    inner = getattr(error, "kwargs", {}).get("error")
    return isinstance(error, botocore.exceptions.EndpointConnectionError) and isinstance(
        inner, (NameResolutionError, socket.gaierror)
    )


def _reason(error: Exception) -> str:
    """One line on what went wrong, without anything that a request carried."""
    if isinstance(error, ClientError):
        told = error.response.get("Error", {})
        message = " ".join(str(told.get("Message") or "").split())
        return f"HTTP {_status(error)} {_code(error)}" + (f" ({message[:200]})" if message else "")
    if isinstance(error, BotoCoreError) and "endpoint_url" in error.kwargs:
        parts = urllib.parse.urlsplit(str(error.kwargs["endpoint_url"]))
        return f"{type(error).__name__} at {parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}"
    return " ".join(str(error).split())[:200] or type(error).__name__


def _explained(error: Exception, action: str, what: str) -> Exception:
    """What to raise for a failure that another try would repeat."""
    code, status, reason = _code(error), _status(error), _reason(error)
    text = f"storage: {action} {what}: {reason}"
    if code in EXPIRED_CODES:
        return Interrupted(f"{text}. The credentials have expired, also when read anew: renew them and run it again")
    if code == "RequestTimeTooSkewed":
        return StorageError(f"{text}. {_skew(error)} Set this machine's clock and run it again.")
    if code == "NoSuchBucket":
        return StorageError(f"{text}. Correct the bucket's name, or storage.endpoint_url and storage.region.")
    if code in ABSENT_CODES:
        return AbsentError(f"{text}. There is no such object.")
    if code in BAD_CREDENTIALS_CODES:
        return AccessError(
            f"{text}. The store does not accept these credentials: look at access key, secret and token."
        )
    if code == "InvalidObjectState":
        return StorageError(f"{text}. It is archived: have it restored first.")
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return AccessError(
            f"{text}. Have {action} allowed there for these credentials (without s3:ListBucket, it may also be absent)."
        )
    if isinstance(error, NO_CREDENTIALS):
        return AccessError(f"{text}. Give credentials as AWS has them: environment, profile or instance role.")
    if 300 <= status < 400:
        return StorageError(
            f"{text}. It sends elsewhere, which is not followed: set storage.endpoint_url or storage.region."
        )
    if isinstance(error, botocore.exceptions.SSLError) and "WRONG_VERSION" not in str(error):
        return StorageError(
            f"{text}. Its certificate is not trusted, nothing was sent. Mend it, or name your authority's in AWS_CA_BUNDLE."
        )
    if _is_unknown_host(error):
        return StorageError(
            f"{text}. There is no such host, or no name service: see storage.endpoint_url and the network."
        )
    return StorageError(f"{text}. See storage in the spec, and the store's own log.")


def _skew(error: Exception) -> str:
    headers = error.response["ResponseMetadata"].get("HTTPHeaders", {}) if isinstance(error, ClientError) else {}
    try:
        theirs = parsedate_to_datetime(headers["date"])
    except (KeyError, ValueError, TypeError):
        return "The clocks differ too much."
    minutes = (datetime.now(UTC) - theirs).total_seconds() / 60
    return f"This machine's clock is {abs(minutes):.0f} minutes {'ahead of' if minutes > 0 else 'behind'} the store's."


METADATA_IPV6 = ipaddress.ip_address("fd00:ec2::254")


def _refuse_link_local(endpoint_url: str | None) -> None:
    """Raise StorageError for the name of a host that is a metadata service: what it answers and is sent are secrets."""
    host = urllib.parse.urlsplit(endpoint_url or "").hostname
    if host is None:
        return
    with contextlib.suppress(socket.gaierror):
        for *_, address in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM):
            found = ipaddress.ip_address(str(address[0]).partition("%")[0])
            if found.is_link_local or found == METADATA_IPV6:
                raise StorageError(f"storage.endpoint_url: {host} is at the link-local address {address[0]}, no store.")


# Spellings


def _looks_like_md5(etag: str) -> bool:
    return re.fullmatch("[0-9a-f]{32}", etag) is not None


def _md5(content: bytes) -> Any:
    return hashlib.md5(content, usedforsecurity=False)


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


def _nanoseconds(moment: datetime) -> int:
    return int(moment.timestamp()) * 10**9


def _require_digest(source: Path, found: str, expected: str) -> None:
    if found != expected:
        raise WrongBytesError(f"{source} is damaged: its SHA-256 is {found}, expected {expected}")
