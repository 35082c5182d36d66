"""Writing S3 objects: small ones in one request, large ones in parts.
Requests carry the MD5 of their content, which the server verifies. Objects carry their SHA-256 as metadata."""

import collections
import concurrent.futures
import contextlib
import hashlib
import logging
import time
import zlib
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError

from emotion.errors import StorageError, system_reason
from job.spec.location import S3
from job.storage.protocol import AbsentError, WrongBytesError
from job.storage.s3_client import CONCURRENT_PARTS, is_directory_bucket
from job.storage.s3_download import ObjectHeaders, in_base64, md5_in, new_md5, read_headers
from job.storage.s3_errors import REQUEST_FAILURES, BrokenAnswerError, error_code, final_error, http_status, is_unsupported
from job.storage.s3_retry import S3Requests

log = logging.getLogger(__name__)

PUT_OBJECT = "s3:PutObject"
PART_BYTES = 16 << 20  # larger files are uploaded in parts of this size
MAX_PARTS = 10_000  # S3's own limit; the parts of very large files are larger


def put_content(requests: S3Requests, target: S3, content: bytes, sha256: str, only_if_absent: bool = False) -> None:
    """Write an object in one request. sha256: hex digest of the content.
    only_if_absent: raise ClientError 412 if an object exists, another one if the server does not support If-None-Match."""
    parameters = {"Metadata": {"sha256": sha256}, **({"IfNoneMatch": "*"} if only_if_absent else {})}
    _send_content(
        requests,
        "put_object",
        target,
        content,
        lambda error: only_if_absent and (is_condition_failed(error) or is_unsupported(error)),
        **parameters,
    )


def _send_content(
    requests: S3Requests,
    operation: str,
    target: S3,
    content: bytes,
    is_expected: Callable[[Exception], bool] = lambda _: False,
    **parameters: Any,
) -> str:
    """Send an object or a part, with retries. Returns the ETag; if the ETag is an MD5, it must be that of the content."""
    md5 = new_md5(content)
    parameters |= {"Bucket": target.bucket, "Key": target.key, "Body": content}
    if not is_directory_bucket(target):
        parameters["ContentMD5"] = in_base64(md5.digest())
    elif operation == "put_object":  # S3 Express has no MD5, and a part may only have its upload's kind of checksum
        parameters["ChecksumCRC32"] = in_base64(zlib.crc32(content).to_bytes(4, "big"))

    def attempt(client: Any) -> str:
        answer = getattr(client, operation)(**parameters)
        headers = answer["ResponseMetadata"]["HTTPHeaders"]
        if not is_directory_bucket(target) and md5_in(headers) not in ("", md5.hexdigest()):
            raise BrokenAnswerError(f"the answer has the ETag of other content, {md5_in(headers)} for {md5.hexdigest()}")
        return str(answer["ETag"])

    return requests.send(PUT_OBJECT, target, attempt, is_expected)


def is_condition_failed(error: Exception) -> bool:
    return http_status(error) == HTTPStatus.PRECONDITION_FAILED


def upload(requests: S3Requests, source: Path, target: S3, sha256: str) -> None:
    """Copy a file to an object. Raises WrongBytesError if the file does not have this digest, StorageError, Interrupted."""
    try:
        size = source.stat().st_size
        if size > PART_BYTES:
            if not _exists(requests, target, size, sha256):
                _upload_in_parts(requests, source, size, target, sha256)
            return
        content = source.read_bytes()
    except OSError as error:
        raise StorageError.of(error, f"storage: cannot read {source}: {system_reason(error)}.") from error
    _require_digest(source, hashlib.sha256(content).hexdigest(), sha256)
    put_content(requests, target, content, sha256)


def _upload_in_parts(requests: S3Requests, source: Path, size: int, target: S3, sha256: str) -> None:
    """Upload a large file. Each part is retried by itself. If a part fails, the upload is aborted and nothing remains. Raises
    OSError, too."""
    tries: list[float] = []

    def create(client: Any) -> str:
        tries.append(time.monotonic())
        metadata = {"sha256": sha256}
        return str(client.create_multipart_upload(Bucket=target.bucket, Key=target.key, Metadata=metadata)["UploadId"])

    upload_id = requests.send(PUT_OBJECT, target, create)
    created_in = time.monotonic() - tries[0]

    def send_part(number: int, content: bytes) -> dict[str, Any]:
        etag = _send_content(requests, "upload_part", target, content, UploadId=upload_id, PartNumber=number)
        return {"PartNumber": number, "ETag": etag}

    part_bytes = max(PART_BYTES, -(-size // MAX_PARTS))
    digest = hashlib.sha256()
    try:
        with source.open("rb") as file, concurrent.futures.ThreadPoolExecutor(CONCURRENT_PARTS) as pool:
            parts: list[dict[str, Any]] = []
            sending: collections.deque[concurrent.futures.Future[dict[str, Any]]] = collections.deque()
            for number in range(1, -(-size // part_bytes) + 1):
                content = file.read(part_bytes)
                digest.update(content)
                sending.append(pool.submit(send_part, number, content))
                if len(sending) >= CONCURRENT_PARTS:
                    parts.append(sending.popleft().result())
            parts += [part.result() for part in sending]
        _require_digest(source, digest.hexdigest(), sha256)
        if len(tries) > 1:
            _abort_unanswered(requests, target, upload_id, created_in)
        try:
            requests.call(
                PUT_OBJECT,
                "complete_multipart_upload",
                target,
                lambda error: error_code(error) == "NoSuchUpload",
                UploadId=upload_id,
                MultipartUpload={"Parts": parts},
            )
        except ClientError as error:
            # An earlier try may have completed it, and only the answer was lost.
            if not _exists(requests, target, size, sha256):
                raise final_error(error, PUT_OBJECT, str(target)) from error
    except BaseException:
        abort_upload(requests, target, upload_id)
        raise


def _exists(requests: S3Requests, target: S3, size: int, sha256: str) -> bool:
    """Whether a job has already uploaded this content to the object."""
    try:
        headers = read_headers(requests, target)
    except AbsentError:
        return False
    return (ObjectHeaders.parse(headers).size, headers.get("x-amz-meta-sha256")) == (size, sha256)


def _abort_unanswered(requests: S3Requests, target: S3, upload_id: str, created_in: float) -> None:
    """Abort uploads of this object that our own requests began, but whose answers were lost.
    upload_id: our upload, all of whose parts have been sent. created_in: seconds from our first request for an upload to the
    answer. An upload of another writer began earlier or later, or has parts by now."""
    try:
        found = [one for one in list_uploads(requests, target, target.key) if one["Key"] == target.key]
        began = [one["Initiated"] for one in found if one["UploadId"] == upload_id]
        for one in found if began else ():
            seconds = (began[0] - one["Initiated"]).total_seconds()
            # Servers round times to seconds.
            if one["UploadId"] == upload_id or not -1 <= seconds <= created_in + 1:
                continue
            parts = requests.call("s3:ListMultipartUploadParts", "list_parts", target, UploadId=one["UploadId"])
            if not parts.get("Parts"):
                abort_upload(requests, target, one["UploadId"])
    except StorageError as error:
        log.warning("%s: an upload without an end may be left to the bucket's lifecycle rules", error)


def list_uploads(requests: S3Requests, target: S3, prefix: str) -> Iterator[dict[str, Any]]:
    """The unfinished uploads of objects whose keys begin with `prefix`. target: for messages. Raises StorageError."""
    markers: dict[str, str] = {}
    seen: list[dict[str, str]] = []
    while markers not in seen:
        seen.append(markers)
        page = requests.send(
            "s3:ListBucketMultipartUploads",
            target,
            lambda client: client.list_multipart_uploads(Bucket=target.bucket, Prefix=prefix, **markers),  # noqa: B023
        )
        yield from page.get("Uploads", ())
        if not page["IsTruncated"]:
            return
        markers = {"KeyMarker": page.get("NextKeyMarker", ""), "UploadIdMarker": page.get("NextUploadIdMarker", "")}
    raise StorageError(f"storage: s3:ListBucketMultipartUploads {target}: the listing does not end. See the server's own log.")


def abort_upload(requests: S3Requests, target: S3, upload_id: str) -> None:
    # Once, without retries: there may be little time, and the next attempt finds the unfinished upload.
    with contextlib.suppress(*REQUEST_FAILURES):
        client = requests.connection.client()
        client.abort_multipart_upload(Bucket=target.bucket, Key=target.key, UploadId=upload_id)


def _require_digest(source: Path, found: str, expected: str) -> None:
    if found != expected:
        raise WrongBytesError(f"{source} is damaged: its SHA-256 is {found}, expected {expected}")
