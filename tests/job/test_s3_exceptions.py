"""Which failures of botocore may pass. Every exception that it has must be known here."""

import inspect
import ssl

import botocore.exceptions
import pytest
from urllib3.exceptions import LocationParseError, ProxyError

from emotion.errors import AccessError, SpecError, StorageError
from job.storage.s3_errors import final_error, is_transient, is_unknown_host, reason_of
from job.storage.s3_exceptions import CREDENTIALS, ENDS_WITH, MAY_PASS, OTHERS, SETTINGS, ending_of, may_pass

NO_FAILURES = {"BotoCoreError", "ClientError", "EventStreamError"}
"""The base of all, and answers of a server, which their status and code tell apart."""


@pytest.mark.parametrize("name", [name for name, kind in vars(botocore.exceptions).items() if inspect.isclass(kind)])
def test_every_exception_of_botocore_is_sorted(name: str) -> None:
    kind = getattr(botocore.exceptions, name)
    if kind.__module__ != "botocore.exceptions" or issubclass(kind, Warning) or name in NO_FAILURES:
        return
    sorted_bases = [base for base in kind.__mro__ if base in ENDS_WITH and base is not botocore.exceptions.BotoCoreError]
    assert sorted_bases, f"{name}: can it pass? Sort it into one of the tuples of job/storage/s3_exceptions.py"


def test_no_exception_is_sorted_twice() -> None:
    assert len({*MAY_PASS, *CREDENTIALS, *SETTINGS, *OTHERS}) == len([*MAY_PASS, *CREDENTIALS, *SETTINGS, *OTHERS])


URL = "http://store.example/bucket/x?X-Amz-Signature=abc"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (botocore.exceptions.ReadTimeoutError(endpoint_url=URL), None),
        (botocore.exceptions.ConnectTimeoutError(endpoint_url=URL), None),
        (botocore.exceptions.ConnectionClosedError(endpoint_url=URL), None),
        (botocore.exceptions.EndpointConnectionError(endpoint_url=URL), None),
        (botocore.exceptions.HTTPClientError(error=OSError("reset")), None),
        (botocore.exceptions.HTTPClientError(error=ValueError("I/O operation on closed file.")), None),
        (botocore.exceptions.SSLError(endpoint_url=URL, error="EOF occurred"), None),
        (botocore.exceptions.CredentialRetrievalError(provider="container-role", error_msg="no answer"), None),
        (botocore.exceptions.ProxyConnectionError(proxy_url="http://p", error=OSError("reset")), None),
        (botocore.exceptions.SSLError(endpoint_url=URL, error=ssl.SSLError("certificate verify failed")), StorageError),
        (botocore.exceptions.HTTPClientError(error=ValueError("Invalid header value b'canary\\n'")), SpecError),
        (botocore.exceptions.HTTPClientError(error=UnicodeError("label too long: canary")), SpecError),
        (botocore.exceptions.HTTPClientError(error=LocationParseError("http://u:canary@h:x")), SpecError),
        (botocore.exceptions.ProxyConnectionError(proxy_url="http://socks5://h:1", error=OSError("canary")), SpecError),
        (
            botocore.exceptions.ProxyConnectionError(
                proxy_url="http://p", error=ProxyError("no", OSError("Tunnel connection failed: 407 Authentication"))
            ),
            AccessError,
        ),
        (botocore.exceptions.ProfileNotFound(profile="p"), AccessError),
        (botocore.exceptions.UnauthorizedSSOTokenError(), AccessError),
        (botocore.exceptions.ConfigParseError(path="/x"), SpecError),
        (botocore.exceptions.UnknownRegionError(region_name="x", error_msg=""), SpecError),
        (botocore.exceptions.InvalidS3AddressingStyleError(s3_addressing_style="x"), SpecError),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_what_can_never_pass_is_not_sent_again(error: Exception, kind: type[Exception] | None) -> None:
    assert is_transient(error) == may_pass(error) == (kind is None)
    text = reason_of(error)
    assert "canary" not in text
    assert "abc" not in text
    if kind is not None:
        ending = final_error(error, "s3:GetObject", "s3://bucket/x")
        assert type(ending) is kind
        assert "\n" not in str(ending)


def test_an_exception_that_a_newer_botocore_has_counts_as_a_setting() -> None:
    class Newer(botocore.exceptions.BotoCoreError):
        fmt = "newer"

    assert ending_of(Newer()) is SpecError
    assert not may_pass(Newer())
    assert not is_unknown_host(Newer())
