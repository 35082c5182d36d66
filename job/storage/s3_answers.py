"""Validates the answers of S3, before a request counts as carried out.

A captive portal, a proxy or a wrong endpoint may answer 200 with a page of its own, or with nothing. boto3 reads that as an
answer without contents: an empty listing, or a successful write. Here it is a BrokenAnswerError, which quotes what arrived.
"""

import contextlib
import http.client
import re
from collections.abc import Mapping
from datetime import datetime
from http import HTTPStatus
from typing import Any
from xml.etree import ElementTree

import botocore.handlers
from botocore.exceptions import BotoCoreError, ClientError
from urllib3.exceptions import HTTPError

from job.storage.s3_errors import BrokenAnswerError

ROOTS = {
    "ListObjectsV2": "ListBucketResult",
    "ListMultipartUploads": "ListMultipartUploadsResult",
    "ListParts": "ListPartsResult",
    "CopyObject": "CopyObjectResult",
    "CreateMultipartUpload": "InitiateMultipartUploadResult",
    "CompleteMultipartUpload": "CompleteMultipartUploadResult",
}
"""Operation → root element of its answer."""
FIELDS = {
    "ListObjectsV2": ("IsTruncated",),
    "ListMultipartUploads": ("IsTruncated",),
    "CopyObject": ("ETag",),
    "CreateMultipartUpload": ("UploadId",),
    "CompleteMultipartUpload": ("ETag",),
}
"""Operation → elements of its answer that must not be empty."""
LISTED_FIELDS = {"Contents": ("Key", "Size", "ETag", "LastModified"), "Upload": ("Key", "UploadId", "Initiated")}
"""Element of a listing → its elements that must not be empty."""
WITHOUT_BODY = ("PutObject", "UploadPart", "DeleteObject", "AbortMultipartUpload")
EXCERPT_BYTES = 80  # how much of an unexpected body a message quotes


def watch_answers(client: Any) -> None:
    """Make the client verify every answer before it parses it."""
    # boto3's private handler reports an error document that comes with HTTP 200 as HTTP 500, which was never sent. It is removed,
    # because `verify_answer` raises the error as it is. If boto3 has no such handler, nothing is removed.
    client.meta.events.unregister("before-parse.s3.*", getattr(botocore.handlers, "_handle_200_error", None))
    client.meta.events.register("before-parse.s3.*", verify_answer)


def verify_answer(operation_model: Any, response_dict: Mapping[str, Any], **_: Any) -> None:
    """Raise BrokenAnswerError unless this is an answer to the operation; ClientError if it is an error document."""
    operation, status, headers = operation_model.name, response_dict["status_code"], response_dict["headers"]
    if status >= HTTPStatus.MULTIPLE_CHOICES or not (operation in ROOTS or operation in WITHOUT_BODY):
        return
    body = bytes(response_dict["body"]).strip()
    root = _document(body)
    if root is not None and _name(root) == "Error":
        raise _error_with(status, root, operation)
    if operation in WITHOUT_BODY:
        if body or (operation in ("PutObject", "UploadPart") and not bare_etag(headers)):
            raise unexpected(status, headers, body)
        return
    if root is None or _name(root) != ROOTS[operation] or not _has(root, FIELDS.get(operation, ())):
        raise unexpected(status, headers, body)
    if operation.startswith("List"):
        _verify_listing(root, status, headers, body)


def _verify_listing(root: ElementTree.Element, status: int, headers: Mapping[str, str], body: bytes) -> None:
    truncated = next((child.text for child in root if _name(child) == "IsTruncated"), "false")
    if truncated not in ("true", "false"):
        raise unexpected(status, headers, body)
    for child in root:
        if _name(child) not in LISTED_FIELDS:
            continue
        found = {_name(field): (field.text or "").strip('"') for field in child}
        lacking = [name for name in LISTED_FIELDS[_name(child)] if not found.get(name)]
        if lacking:
            raise BrokenAnswerError(f"the listing has an entry without {lacking[0]}")
        try:  # boto3 would fail on them
            if int(found.get("Size", "0")) < 0:
                raise ValueError(f"a size of {found['Size']}")
            datetime.fromisoformat(found.get("LastModified") or found["Initiated"])
        except ValueError as error:
            raise BrokenAnswerError(f"the listing has an entry with another value than expected: {error}") from error


def verify_object(status: int, headers: Mapping[str, str], body: Any, asked_range: str | None) -> None:
    """Raise BrokenAnswerError unless this is an object, or the requested range of it. headers: names in lower case."""
    first = re.match(r"bytes=(\d+)-", asked_range or "")
    begins = re.match(r"bytes (\d+)-\d+/\d+$", headers.get("content-range", ""))
    if not bare_etag(headers) or (status == HTTPStatus.PARTIAL_CONTENT) != ("content-range" in headers):
        beginning = b""
        with contextlib.suppress(HTTPError, BotoCoreError, http.client.HTTPException, OSError):
            beginning = body.read1(EXCERPT_BYTES)
        body.close()
        raise unexpected(status, headers, beginning)
    if begins is None and "content-range" not in headers:
        return
    if begins is None or first is None or int(begins[1]) != int(first[1]):
        body.close()
        asked, came = asked_range or "the whole object", ascii(headers["content-range"][:EXCERPT_BYTES])
        raise BrokenAnswerError(f"the answer has another range: {came}, expected {asked}")


def bare_etag(headers: Mapping[str, str]) -> str:
    """The ETag without quotes; empty if there is none. headers: with names in lower case, or boto3's own."""
    return str(headers.get("etag") or "").strip().strip('"')


def unexpected(status: int, headers: Mapping[str, str], body: bytes) -> BrokenAnswerError:
    """The error for a text that is not an answer to the request."""
    kind = str(headers.get("content-type") or "")
    kind = f"of type {ascii(kind[:EXCERPT_BYTES])[1:-1]}" if kind else "without a type"
    begins = ascii(body[:EXCERPT_BYTES].decode("utf-8", "backslashreplace"))
    what = f"beginning with {begins}" if body else "without a body"
    return BrokenAnswerError(f"the answer is not one of object storage: HTTP {status}, {kind}, {what}")


def _document(body: bytes) -> ElementTree.Element | None:
    """The parsed XML body; None if it is not XML."""
    try:
        return ElementTree.fromstring(body)  # noqa: S314  boto3 parses the same bytes with the same parser
    except (ElementTree.ParseError, ValueError):
        return None


def _error_with(status: int, root: ElementTree.Element, operation: str) -> ClientError:
    fields = {_name(child): child.text or "" for child in root}
    found = {"Code": fields.get("Code") or "Error", "Message": fields.get("Message", "")}
    return ClientError({"Error": found, "ResponseMetadata": {"HTTPStatusCode": status}}, operation)


def _name(element: ElementTree.Element) -> str:
    """The tag name without its namespace."""
    return element.tag.rpartition("}")[2]


def _has(element: ElementTree.Element, fields: tuple[str, ...]) -> bool:
    present = {_name(child) for child in element if (child.text or "").strip('"')}
    return present.issuperset(fields)
