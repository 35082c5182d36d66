"""Failed requests to S3: the meaning of each error, whether it is transient, and the message for the user.
Amazon documents the error codes at https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html."""

import http.client
import socket
import time
import urllib.parse
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus

import botocore.exceptions
from botocore.awsrequest import AWSResponse
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError, create_parser
from urllib3.exceptions import HTTPError, NameResolutionError

from emotion.errors import AccessError, Interrupted, SpecError, StorageError
from job.secrets import scrubbed
from job.storage.protocol import AbsentError
from job.storage.s3_exceptions import CREDENTIALS, PROVIDE_CREDENTIALS, ending_of, is_malformed, is_proxy_refusal, may_pass

TRANSIENT_STATUSES = {408, 409, 425, 429, 500, 502, 503, 504}  # 409: a conditional request collided with another one
TRANSIENT_CODES = {"BadDigest", "InternalError", "OperationAborted", "RequestTimeout", "RequestTimeoutException"}
THROTTLING_CODES = {"BandwidthLimitExceeded", "RequestLimitExceeded", "SlowDown", "ServiceUnavailable", "Throttling"}
THROTTLING_CODES |= {"ThrottlingException", "TooManyRequestsException"}
EXPIRED_CODES = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
UNSUPPORTED_CODES = {"BadRequest", "InvalidArgument", "InvalidRequest", "NotImplemented", "NotSupported", "400"}
BAD_CREDENTIALS_CODES = {"InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch"}
ABSENT_CODES = {"NoSuchKey", "NotFound", "404"}
FINAL_CODES = {"AccessDenied", "NoSuchBucket", "NoSuchUpload"} | ABSENT_CODES | BAD_CREDENTIALS_CODES | EXPIRED_CODES
MAX_ERROR_BYTES = 1 << 16  # an error document is read up to this length


class BrokenAnswerError(Exception):
    """An answer that is incomplete, too slow, or lacks required content."""


REQUEST_FAILURES = (ClientError, BotoCoreError, ResponseParserError, BrokenAnswerError)  # everything that a failed request raises


def error_code(error: Exception) -> str:
    """The S3 error code, empty for an error without an answer."""
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, ClientError) else ""


def http_status(error: Exception) -> int:
    """The HTTP status, 0 for an error without an answer."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) if isinstance(error, ClientError) else 0


def is_unsupported(error: Exception) -> bool:
    """Whether the server may have refused the request because it does not support one of its headers."""
    return http_status(error) == HTTPStatus.NOT_IMPLEMENTED or error_code(error) in UNSUPPORTED_CODES


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, ClientError):
        if http_status(error) == HTTPStatus.OK:  # an error document after the status had been sent, or of a proxy
            return error_code(error) not in FINAL_CODES
        return error_code(error) in TRANSIENT_CODES | THROTTLING_CODES or http_status(error) in TRANSIENT_STATUSES
    return isinstance(error, BrokenAnswerError) or may_pass(error)


def is_unknown_host(error: Exception) -> bool:
    cause = getattr(error, "kwargs", {}).get("error")
    if isinstance(error, botocore.exceptions.ProxyConnectionError):
        cause = getattr(cause, "original_error", None)
    elif not isinstance(error, botocore.exceptions.EndpointConnectionError):
        return False
    return isinstance(cause, NameResolutionError | socket.gaierror)


def reason_of(error: Exception) -> str:
    """One line on what went wrong, without any part of the request, which holds a signature."""
    if isinstance(error, ClientError):
        message = _one_line(str(error.response.get("Error", {}).get("Message") or ""))
        return f"HTTP {http_status(error)} {error_code(error)}".rstrip() + (f" ({message[:200]})" if message else "")
    if isinstance(error, BotoCoreError) and "endpoint_url" in error.kwargs:
        parts = urllib.parse.urlsplit(str(error.kwargs["endpoint_url"]))
        return f"{type(error).__name__} at {parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}"
    if is_malformed(error):  # without its text, which may be a header with a secret, or a part of a proxy's password
        return f"the request cannot be made ({type(getattr(error, 'kwargs', {}).get('error')).__name__})"
    text = str(error)
    if isinstance(error, botocore.exceptions.ProxyConnectionError):
        text += f": {error.kwargs.get('error')}"
    elif isinstance(error, OSError) and error.filename:
        text = f"{error.filename}: {error.strerror}"
    return _one_line(text)[:200].rstrip(".") or type(error).__name__


def _one_line(text: str) -> str:
    """Remove secrets, then line breaks: secrets are found only in unchanged text."""
    return " ".join(scrubbed(text).split())


def final_error(error: Exception, action: str, url: str) -> Exception:
    """The exception to raise for a failure that a retry would only repeat.
    action: as in an IAM policy, for example s3:GetObject. url: of the object or prefix."""
    code, status = error_code(error), http_status(error)
    text = f"storage: {action} {url}: {reason_of(error)}"
    if code in EXPIRED_CODES:
        return Interrupted(f"{text}. The credentials have expired, also after reading them again: renew them and rerun")
    if code == "RequestTimeTooSkewed":
        return StorageError(f"{text}. {_clock_skew(error)} Set this machine's clock and run it again.")
    if code == "NoSuchBucket":
        return StorageError(f"{text}. Correct the bucket's name, or storage.endpoint_url and storage.region.")
    if code in ABSENT_CODES and action == "s3:ListBucket":
        return StorageError(f"{text}. There is no such bucket: check its name and storage.endpoint_url.")
    if code in ABSENT_CODES:
        return AbsentError(f"{text}. There is no such object.")
    if code in BAD_CREDENTIALS_CODES:
        return AccessError(f"{text}. The server does not accept these credentials: check access key, secret and token.")
    if code == "InvalidObjectState":
        return StorageError(f"{text}. The object is archived: restore it first.")
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN) or code == "AccessDenied":
        return AccessError(
            f"{text}. Allow {action} there for these credentials (without s3:ListBucket, an absent object looks the same; if the "
            f"reader has to pay for the bucket, set storage.requester_pays)."
        )
    if 300 <= status < 400:
        return StorageError(f"{text}. Redirects to another host are not followed: set storage.endpoint_url or storage.region.")
    if is_proxy_refusal(error):
        return AccessError(f"{text}. Correct user and password in HTTPS_PROXY, or list the store's host in NO_PROXY.")
    if isinstance(error, CREDENTIALS):
        return AccessError(f"{text}. {PROVIDE_CREDENTIALS}")
    if isinstance(error, botocore.exceptions.SSLError) and "No such file" in str(error):
        return StorageError(f"{text}. The file that AWS_CA_BUNDLE, REQUESTS_CA_BUNDLE or ca_bundle names is missing: restore it.")
    if isinstance(error, botocore.exceptions.SSLError) and "WRONG_VERSION" not in str(error):
        return StorageError(
            f"{text}. The server's certificate is not trusted, nothing was sent. Fix the certificate, or name your "
            f"authority's in AWS_CA_BUNDLE."
        )
    if is_unknown_host(error) and not is_malformed(error):
        return StorageError(f"{text}. There is no such host, or no DNS: check storage.endpoint_url, proxies and the network.")
    kind = ending_of(error) if isinstance(error, BotoCoreError) else StorageError
    if kind is SpecError:
        return SpecError(
            f"{text}. Correct storage in the spec, AWS's own settings, or the proxies in HTTP_PROXY and HTTPS_PROXY."
        )
    return kind(f"{text}. See storage in the spec, and the server's own log.")


def _clock_skew(error: Exception) -> str:
    headers = error.response["ResponseMetadata"].get("HTTPHeaders", {}) if isinstance(error, ClientError) else {}
    seconds = seconds_ahead(headers)
    return "The clocks differ too much." if seconds is None else clock_text(seconds)


def seconds_ahead(headers: Mapping[str, str]) -> float | None:
    """Seconds by which this machine's clock is ahead of the server's, by the Date of an answer just received; None without it."""
    try:
        return (datetime.now(UTC) - parsedate_to_datetime(headers["date"])).total_seconds()
    except (KeyError, ValueError, TypeError):
        return None


def clock_text(seconds: float) -> str:
    return f"This machine's clock is {abs(seconds) / 60:.0f} minutes {'ahead of' if seconds > 0 else 'behind'} the server's."


def error_from_response(response: AWSResponse, timeout_seconds: float) -> ClientError:
    """The ClientError that boto3 would raise for this answer. Raises BrokenAnswerError if the answer does not arrive in time."""
    content, deadline = b"", time.monotonic() + timeout_seconds
    try:
        while len(content) < MAX_ERROR_BYTES and (block := response.raw.read1(MAX_ERROR_BYTES)):
            content += block
            if time.monotonic() > deadline:
                raise BrokenAnswerError(f"HTTP {response.status_code}, and no complete answer in {timeout_seconds:g} s")
    except (HTTPError, http.client.HTTPException, OSError) as error:
        raise BrokenAnswerError(f"HTTP {response.status_code}, and {reason_of(error)}") from error
    finally:
        response.raw.close()

    answer = {"status_code": response.status_code, "headers": response.headers, "body": content}
    parsed = create_parser("rest-xml").parse(answer, None)
    found = parsed.setdefault("Error", {})
    # For an <Error> with a namespace, the parser puts the code at the top; in the page of a proxy it finds none.
    code = found.get("Code") or parsed.get("Code")
    found["Code"] = code if isinstance(code, str) and code else str(response.status_code)
    message = found.get("Message") or parsed.get("Message")
    found["Message"] = message if isinstance(message, str) else ""
    return ClientError(parsed, "GetObject")
