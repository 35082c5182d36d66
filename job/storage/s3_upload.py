"""Writing S3 objects: small ones in one request, large ones in parts.
Requests carry the MD5 of their content, which the server verifies. Objects carry their SHA-256 as metadata."""

import collections
import concurrent.futures
import contextlib
import hashlib
from http import HTTPStatus
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError

from emotion.errors import StorageError, system_reason
from job.spec.location import S3
from job.storage.protocol import AbsentError, WrongBytesError
from job.storage.s3_client import CONCURRENT_PARTS
from job.storage.s3_download import ObjectHeaders, in_base64, new_md5, read_headers
from job.storage.s3_errors import REQUEST_FAILURES, error_code, final_error, http_status, is_unsupported
from job.storage.s3_retry import S3Requests

PUT_OBJECT = "s3:PutObject"
PART_BYTES = 16 << 20  # larger files are uploaded in parts of this size
MAX_PARTS = 10_000  # S3's own limit; the parts of very large files are larger


def put_content(requests: S3Requests, target: S3, content: bytes, sha256: str, only_if_absent: bool = False) -> None:
    """Write an object in one request. sha256: of the content, in hex.
    only_if_absent: raises ClientError 412 if an object exists, and another one if the server does not support If-None-Match."""
    requests.call(
        PUT_OBJECT,
        "put_object",
        target,
        lambda error: only_if_absent and (is_condition_failed(error) or is_unsupported(error)),
        Body=content,
        ContentMD5=in_base64(new_md5(content).digest()),
        Metadata={"sha256": sha256},
        **({"IfNoneMatch": "*"} if only_if_absent else {}),
    )


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
    """Each part is retried by itself. Unless all arrive, the upload is aborted and nothing of it stays. Raises OSError, too."""
    upload_id = requests.call(PUT_OBJECT, "create_multipart_upload", target, Metadata={"sha256": sha256})["UploadId"]

    def send_part(number: int, content: bytes) -> dict[str, Any]:
        part = {"UploadId": upload_id, "PartNumber": number, "Body": content}
        md5 = in_base64(new_md5(content).digest())
        return {"PartNumber": number, "ETag": requests.call(PUT_OBJECT, "upload_part", target, ContentMD5=md5, **part)["ETag"]}

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
    """Whether a job has uploaded this content there."""
    try:
        headers = read_headers(requests, target)
    except AbsentError:
        return False
    return (ObjectHeaders.parse(headers).size, headers.get("x-amz-meta-sha256")) == (size, sha256)


def abort_upload(requests: S3Requests, target: S3, upload_id: str) -> None:
    # Once, without retries: there may be little time, and the next attempt finds what is left.
    with contextlib.suppress(*REQUEST_FAILURES):
        client = requests.connection.client()
        client.abort_multipart_upload(Bucket=target.bucket, Key=target.key, UploadId=upload_id)


def _require_digest(source: Path, found: str, expected: str) -> None:
    if found != expected:
        raise WrongBytesError(f"{source} is damaged: its SHA-256 is {found}, expected {expected}")
