"""Reading S3 objects: verified, resumed at the byte where a connection broke, never mixed from two versions of an object.

- A download resumes only in the same version of the object (If-Match), as the object may change between two requests.
- The bytes are verified against a digest: the expected SHA-256, else the server's checksum, else the MD5 in a plain ETag.
  boto3 verifies nothing if the server sends no checksum.
"""

import base64
import collections
import contextlib
import fcntl
import gzip
import hashlib
import http.client
import io
import logging
import os
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any, TypeVar

from botocore.exceptions import BotoCoreError, ClientError
from urllib3.exceptions import HTTPError

from emotion.errors import StorageError, system_reason
from emotion.files import written_atomically
from job.spec.location import S3
from job.storage.protocol import BLOCK_BYTES, AbsentError, Entry, Fetched, WrongBytesError
from job.storage.s3_answers import bare_etag
from job.storage.s3_client import Body, is_directory_bucket
from job.storage.s3_errors import ABSENT_CODES, REQUEST_FAILURES, BrokenAnswerError, error_code, http_status, is_unsupported
from job.storage.s3_retry import Retries, S3Requests

log = logging.getLogger(__name__)

T = TypeVar("T")

GET_OBJECT = "s3:GetObject"
SLOWEST_BYTES_PER_SECOND = 1024  # a connection that is slower over `storage.timeout_seconds` is replaced
PROGRESS_BYTES = 64 << 10  # a try that fetched this much counts as progress, and resets the counts of tries and seconds
GZIP_MAGIC = b"\x1f\x8b"
OPTIONAL_HEADERS = ("x-amz-checksum-mode", "If-Match")  # dropped in this order if the server does not support them


@dataclass
class ObjectHeaders:
    """The facts about an object in the headers of an answer. size: bytes of the whole object. checksums: algorithm → checksum of
    the whole object in base64. md5: the ETag if it is an MD5, else empty: the ETag of an upload in parts has a hyphen, and that
    of an encrypted object only looks like an MD5. encoding: Content-Encoding; size and digests are of the encoded bytes."""

    size: int
    etag: str
    checksums: dict[str, str] = field(default_factory=dict)
    md5: str = ""
    encoding: str = ""

    @staticmethod
    def parse(headers: Mapping[str, str]) -> "ObjectHeaders":
        """Parse headers, with names in lower case. Raises BrokenAnswerError if they do not contain the object's size."""
        whole = headers.get("content-range", "").rpartition("/")[2]
        size = whole or headers.get("content-length", "")
        if not size.isdigit():
            raise BrokenAnswerError("the answer does not say how long the object is")
        checksums = {}
        if headers.get("x-amz-checksum-type", "FULL_OBJECT") == "FULL_OBJECT" and not whole:
            found = {algorithm: headers.get(f"x-amz-checksum-{algorithm}", "") for algorithm in ("sha256", "crc32")}
            checksums = {algorithm: text for algorithm, text in found.items() if text and "-" not in text}
        uploaded = headers.get("x-amz-meta-sha256", "")
        if re.fullmatch("[0-9a-f]{64}", uploaded):
            checksums["sha256"] = in_base64(bytes.fromhex(uploaded))  # set by S3Prefix when it uploaded the object
        encodings = [one.strip().lower() for one in headers.get("content-encoding", "").split(",")]
        encoding = ", ".join(one for one in encodings if one not in ("", "identity", "aws-chunked"))
        return ObjectHeaders(int(size), bare_etag(headers), checksums, md5_in(headers), encoding)


class Digests:
    """Digests of the bytes that have arrived so far: always SHA-256, others if requested."""

    def __init__(self, md5: bool, crc32: bool = False) -> None:
        self.sha256 = hashlib.sha256()
        self.md5 = new_md5(b"") if md5 else None
        self.crc32 = 0 if crc32 else None

    def add(self, block: bytes) -> None:
        self.sha256.update(block)
        if self.md5 is not None:
            self.md5.update(block)
        if self.crc32 is not None:
            self.crc32 = zlib.crc32(block, self.crc32)

    def verify(self, url: str, sha256: str | None, headers: ObjectHeaders) -> str:
        """Compare with the strongest known digest, and return its name. Raises WrongBytesError."""
        kind, found, expected, hint = "size", "", "", ""
        if sha256 is not None:
            kind, found, expected = "sha256", self.sha256.hexdigest(), sha256
        elif "sha256" in headers.checksums:
            kind, found, expected = "store sha256", in_base64(self.sha256.digest()), headers.checksums["sha256"]
        elif self.crc32 is not None:
            kind, found, expected = "store crc32", in_base64(self.crc32.to_bytes(4, "big")), headers.checksums["crc32"]
        elif self.md5 is not None and headers.md5:
            kind, found, expected = "etag", self.md5.hexdigest(), headers.md5
            hint = ". If ETags of this server are not MD5 digests, list the right digests in data.manifest"
        if found != expected:
            raise WrongBytesError(f"storage: {url} is damaged: its {kind} is {found}, expected {expected}{hint}")
        return kind


def read_blocks(requests: S3Requests, body: Body) -> Iterator[bytes]:
    """The bytes of an answer as they arrive. Raises BrokenAnswerError if the connection breaks or is too slow, Interrupted."""
    timeout = requests.config.timeout_seconds
    window, arrived = time.monotonic(), 0
    try:
        while True:
            try:
                # read() would wait for a full block, which never comes from a server that sends a byte a second.
                block = body.read1(BLOCK_BYTES)
            except (HTTPError, BotoCoreError, http.client.HTTPException, OSError) as error:
                raise BrokenAnswerError(str(error) or type(error).__name__) from error
            if not block:
                return
            yield block
            requests.raise_if_stopped()
            arrived += len(block)
            seconds = time.monotonic() - window
            if seconds > timeout:
                if arrived < SLOWEST_BYTES_PER_SECOND * seconds:
                    raise BrokenAnswerError(f"{arrived} bytes in {seconds:.0f} s")
                window, arrived = time.monotonic(), 0
    finally:
        body.close()


def read_headers(requests: S3Requests, source: S3) -> Mapping[str, str]:
    """The headers of an object. Raises AbsentError.
    They come from a GET of the first byte, as the answer to a HEAD has no body and so no error code."""

    def attempt(client: Any) -> Mapping[str, str]:
        try:
            headers, body = requests.connection.get(client, source, {"Range": "bytes=0-0"})
        except ClientError as error:
            if http_status(error) != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise
            headers, body = requests.connection.get(client, source, {})  # the object is empty
        if "content-range" in headers:
            # Read to the end, so that the connection can be used again.
            collections.deque(read_blocks(requests, body), 0)
        else:
            body.close()
        ObjectHeaders.parse(headers)
        modified_at(headers)
        return headers

    return requests.send(GET_OBJECT, source, attempt)


def modified_at(headers: Mapping[str, str]) -> datetime:
    """The time when an object was written. headers: with names in lower case. Raises BrokenAnswerError."""
    try:
        return parsedate_to_datetime(headers.get("last-modified", ""))
    except ValueError:
        raise BrokenAnswerError("the answer does not say when the object was written") from None


def is_object(requests: S3Requests, client: Any, source: S3) -> bool:
    """Whether there is such an object; one request. Raises what a request raises."""
    try:
        _, body = requests.connection.get(client, source, {})
    except ClientError as error:
        if error_code(error) not in ABSENT_CODES:
            raise
        return False
    body.close()
    return True


def read_object(requests: S3Requests, source: S3, listed: Callable[[], str | None]) -> bytes | None:
    """The verified content of a small object, None if it is absent. Raises WrongBytesError.
    listed: returns the object's ETag from a listing, None if the listing lacks it. It is called if nothing else distinguishes the
    answer (an object, or that there is none) from a proxy's page."""

    def attempt(client: Any) -> bytes:
        answer, body = requests.connection.get(client, source, {})
        content = b"".join(read_blocks(requests, body))
        headers = ObjectHeaders.parse(answer)
        if len(content) != headers.size:
            raise BrokenAnswerError(f"the answer ended after {len(content)} of {headers.size} bytes")
        digests = Digests(md5="sha256" not in headers.checksums)
        digests.add(content)
        # S3 Express lists only whole folders.
        unproven = digests.verify(str(source), None, headers) == "size" and not is_directory_bucket(source)
        if unproven and listed() != headers.etag:
            raise BrokenAnswerError(f"the answer has the ETag {headers.etag[:80]!a}, which the object has not in the listing")
        with decoded(str(source), io.BytesIO(content), headers.encoding) as plain:
            return plain.read()

    try:
        return _twice_if_wrong(lambda: requests.send(GET_OBJECT, source, attempt))
    except AbsentError as error:
        if isinstance(error.__cause__, ClientError) and error_code(error.__cause__) != "NoSuchKey" and listed() is not None:
            raise StorageError(f"{error} But it is in the listing: is there a proxy between?") from error
        return None


def _twice_if_wrong(fetch: Callable[[], T]) -> T:
    """Fetch, and fetch once more if the bytes were wrong: they may have been damaged in transit."""
    try:
        return fetch()
    except WrongBytesError as error:
        log.warning("%s: fetching it once more", error)
        return fetch()


def download(requests: S3Requests, source: S3, target: Path, sha256: str | None, entry: Entry) -> Fetched:
    """Fetch an object into a file: complete, verified and durable, or not at all.
    sha256: the expected digest, if known. entry: the expected version. After a stop or a failure, the fetched part stays in a
    temporary file, from which the next call resumes. Raises WrongBytesError, AbsentError, StorageError, Interrupted."""

    def fetch() -> Fetched:
        with _partial_file(target, entry, sha256) as file:
            fetched = append_rest(requests, source, file, sha256, entry)
            if fetched.encoding:
                return _write_decoded(str(source), file, target, fetched, sha256)
            file.flush()
            os.fsync(file.fileno())
            os.utime(file.fileno(), ns=(entry.mtime_ns, entry.mtime_ns))
            Path(file.name).replace(target)  # while it is locked, so that no other process resumes it now
        return fetched

    try:
        return _twice_if_wrong(fetch)
    except OSError as error:
        raise StorageError.of(error, f"storage: cannot write {target}: {system_reason(error)}.") from error


def _write_decoded(url: str, file: IO[bytes], target: Path, fetched: Fetched, sha256: str | None) -> Fetched:
    """Decompress a file to `target`, and remove it. sha256: the expected digest of the decompressed content, if known."""
    digest = hashlib.sha256()
    file.seek(0)
    with written_atomically(target) as out, decoded(url, file, fetched.encoding) as plain:
        while block := plain.read(BLOCK_BYTES):
            digest.update(block)
            out.write(block)
        if sha256 not in (None, digest.hexdigest()):
            raise WrongBytesError(f"storage: {url} is damaged: its SHA-256 is {digest.hexdigest()}, expected {sha256}")
    Path(file.name).unlink()
    return Fetched(digest.hexdigest(), "sha256" if sha256 else fetched.verified)


@contextlib.contextmanager
def decoded(url: str, file: IO[bytes], encoding: str) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """The decompressed content of an object. file: its bytes. encoding: its Content-Encoding. Raises WrongBytesError."""
    if encoding not in ("", "gzip", "x-gzip"):
        raise WrongBytesError(
            f"storage: {url} is compressed (Content-Encoding {encoding[:40]!a}), and only gzip is read. Upload it as it is"
        )
    begins = file.read(2)
    file.seek(0)
    if not encoding or begins != GZIP_MAGIC:  # many objects are marked as compressed and are not
        yield file
        return
    try:
        with gzip.open(file) as plain:
            yield plain
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise WrongBytesError(f"storage: {url} is damaged: it cannot be decompressed ({error})") from error


@contextlib.contextmanager
def _partial_file(target: Path, entry: Entry, sha256: str | None) -> Iterator[IO[bytes]]:
    """A temporary file to append to. It holds what an earlier attempt fetched of the same version of the object.
    It starts empty if nothing could verify the result. It gets another name if the usual file is in use: locked by another
    process, or by a thread left behind by an earlier attempt. It is removed if the bytes are wrong, and kept otherwise."""
    version = re.sub("[^0-9a-zA-Z]", "", entry.tag)[:32]
    path = target.with_name(f".{target.name}.{version}.part")
    with contextlib.ExitStack() as stack:
        file: IO[bytes] = stack.enter_context(path.open("a+b"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The process that had it locked may have renamed it to the target.
            in_use = not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno()))
        except BlockingIOError:
            in_use = True
        except OSError:
            in_use = False  # a file system without locks
        if in_use:
            path = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.part")
            file = stack.enter_context(path.open("w+b"))
            stack.callback(path.unlink, missing_ok=True)
        elif sha256 is None and not looks_like_md5(entry.tag):
            file.truncate(0)
        try:
            yield file
        except WrongBytesError:
            path.unlink(missing_ok=True)
            raise


def append_rest(requests: S3Requests, source: S3, file: IO[bytes], sha256: str | None, entry: Entry) -> Fetched:
    """Append the missing part of an object to `file`, and verify the whole. Parameters and errors as in `download`."""
    url, connection = str(source), requests.connection
    retries = Retries(requests, GET_OBJECT, source)
    known, digests = ObjectHeaders(entry.size, entry.tag), Digests(md5=sha256 is None)
    if file.tell():
        file.seek(0)
        while block := file.read(BLOCK_BYTES):
            digests.add(block)
    resumed = offset = file.tell()  # resumed: bytes that an earlier attempt has fetched
    if resumed and looks_like_md5(entry.tag):
        known.md5 = entry.tag
    if resumed and resumed == entry.size:
        known.encoding = ObjectHeaders.parse(read_headers(requests, source)).encoding
    while offset < entry.size:
        began = offset
        conditions = {"Range": f"bytes={offset}-"} if offset else {}
        if "If-Match" not in connection.unsupported:
            conditions["If-Match"] = f'"{entry.tag}"'
        if sha256 is None and "x-amz-checksum-mode" not in connection.unsupported:
            conditions["x-amz-checksum-mode"] = "ENABLED"
        client = connection.client()
        try:
            answer, body = connection.get(client, source, conditions)
            headers = ObjectHeaders.parse(answer)
            if (headers.etag, headers.size) != (entry.tag, entry.size):
                body.close()
                raise _changed(url, f"it has {headers.size} bytes and the ETag {headers.etag}", entry)
            known.md5, known.encoding = headers.md5, headers.encoding
            known.checksums = known.checksums or headers.checksums
            is_partial = "content-range" in answer
            if offset and (not is_partial or (resumed and not (sha256 or headers.md5 or headers.checksums))):
                # From the beginning: the server ignores ranges, or nothing could verify the bytes of the earlier attempt.
                file.truncate(0)
                resumed = offset = began = 0
                if is_partial:
                    body.close()
                    continue
            if not offset:
                by_sha256 = (sha256 and not known.encoding) or "sha256" in headers.checksums
                by_crc32 = "crc32" in headers.checksums
                digests = Digests(md5=not (by_sha256 or by_crc32), crc32=not by_sha256 and by_crc32)
            for block in read_blocks(requests, body):
                file.write(block)
                digests.add(block)
                offset += len(block)
            if offset < entry.size:
                raise BrokenAnswerError(f"the answer ended after {offset} of {entry.size} bytes")
        except REQUEST_FAILURES as error:
            if http_status(error) in (HTTPStatus.PRECONDITION_FAILED, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE):
                raise _changed(url, "its ETag is another", entry) from error
            optional = [header for header in OPTIONAL_HEADERS if header in conditions]
            if optional and is_unsupported(error):
                connection.drop_header(optional[0])
                continue
            if offset - began >= PROGRESS_BYTES:
                retries.reset()
            retries.pause_or_raise(error, client)
    if offset > entry.size:
        raise WrongBytesError(f"storage: {url} is damaged: {offset} bytes, expected {entry.size}")
    # An expected digest is that of the decompressed content.
    kind = digests.verify(url, None if known.encoding else sha256, known)
    requests.budget.record_success()
    return Fetched(digests.sha256.hexdigest(), kind, known.encoding)


def _changed(url: str, found: str, entry: Entry) -> WrongBytesError:
    return WrongBytesError(
        f"storage: {url} changed during download: {found}, expected {entry.size} bytes and the ETag {entry.tag}"
    )


def md5_in(headers: Mapping[str, str]) -> str:
    """The ETag if it is the MD5 of the object, otherwise empty. headers: with names in lower case, or boto3's own."""
    etag = bare_etag(headers)
    encrypted = headers.get("x-amz-server-side-encryption", "AES256") != "AES256"
    encrypted = encrypted or "x-amz-server-side-encryption-customer-algorithm" in headers
    # S3 Express has random ETags.
    is_md5 = looks_like_md5(etag) and not encrypted and headers.get("x-amz-storage-class") != "EXPRESS_ONEZONE"
    return etag if is_md5 else ""


def looks_like_md5(etag: str) -> bool:
    return re.fullmatch("[0-9a-f]{32}", etag) is not None


def new_md5(content: bytes) -> Any:
    return hashlib.md5(content, usedforsecurity=False)


def in_base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()
