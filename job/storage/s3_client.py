"""One boto3 client for all threads: settings, credentials, and a direct way to get an object."""

import contextlib
import ipaddress
import logging
import os
import re
import socket
import ssl
import threading
import urllib.parse
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, TypeAlias

import boto3
import botocore.session
from botocore import UNSIGNED
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.exceptions import BotoCoreError
from urllib3 import BaseHTTPResponse

from emotion.errors import AccessError, SpecError
from job.config import StorageConfig
from job.spec.location import S3
from job.storage.s3_answers import verify_object, watch_answers
from job.storage.s3_credentials import Credentials
from job.storage.s3_errors import error_code, error_from_response, http_status, reason_of, seconds_ahead
from job.storage.s3_exceptions import PROVIDE_CREDENTIALS

log = logging.getLogger(__name__)

CONCURRENT_PARTS = 4  # parts of one upload that are sent at the same time; they are held in memory
GET_PARAMETERS = {"Range": "Range", "If-Match": "IfMatch", "x-amz-checksum-mode": "ChecksumMode"}  # header → boto3's name for it
REQUESTER = "x-amz-request-payer"
FALLBACK_BLOCK_BYTES = 1024
METADATA_IPV6 = ipaddress.ip_address("fd00:ec2::254")  # Amazon's metadata service, which is not a link-local address


class FallbackBody:
    """boto3's public body. It waits until a block is full, so blocks are small: a slow server or a stop is then noticed."""

    def __init__(self, body: Any) -> None:
        self._body = body
        self.close = body.close

    def read1(self, size: int) -> bytes:
        return bytes(self._body.read(min(size, FALLBACK_BLOCK_BYTES)))


Body: TypeAlias = BaseHTTPResponse | FallbackBody


class S3Connection:
    """A boto3 client that all threads share, and what is known about its server.
    boto3 signs, sends and parses. It does not retry: see s3_retry."""

    def __init__(self, config: StorageConfig) -> None:
        self.config = config
        self._lock = threading.Lock()
        self._client: Any = None
        self._credentials: Any = None
        self._bucket_urls: dict[str, str] = {}
        self._indirect_buckets: set[str] = set()  # buckets in another region, which only boto3's own get_object finds
        self.unsupported: set[str] = set()  # names of headers that this server does not support
        self.clock_ahead_seconds: float | None = None  # by the last answer that boto3 has parsed

    def client(self) -> Any:
        """The boto3 client. Raises SpecError or AccessError if it cannot be created."""
        with self._lock:
            if self._client is None:
                try:
                    self._client = self._new_client()
                except (BotoCoreError, ValueError) as error:
                    raise SpecError(
                        f"storage: {reason_of(error)}. Check storage.endpoint_url, storage.region and AWS's own settings."
                    ) from error
            return self._client

    def _new_client(self) -> Any:
        _refuse_metadata_service(self.config.endpoint_url)
        config = Config(
            retries={"total_max_attempts": 1, "mode": "standard"},
            connect_timeout=self.config.timeout_seconds,
            read_timeout=self.config.timeout_seconds,
            max_pool_connections=self.config.connections + CONCURRENT_PARTS,
            # Many servers do not know the checksums that newer clients add by default. Uploads carry a Content-MD5 instead.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        found = botocore.session.get_session()
        self._credentials = Credentials(found)
        session = boto3.session.Session(botocore_session=found)
        # Amazon answers with the right region; other servers accept any.
        region = self.config.region or session.region_name or "us-east-1"
        if not re.fullmatch(r"[A-Za-z0-9-]+", region):
            raise SpecError(
                f"storage: {region!a} is no region. Correct storage.region, AWS_DEFAULT_REGION or the region of the profile."
            )
        if not self._credentials.exist:
            config = config.merge(Config(signature_version=UNSIGNED))  # a public bucket needs none; others deny the access
        client = session.client("s3", region_name=region, endpoint_url=self.config.endpoint_url, config=config)
        if self.config.requester_pays:
            client.meta.events.register("before-call.s3", _add_requester)
        _refuse_unusable_authorities(found, client.meta.endpoint_url)
        client.meta.events.register("before-sign.s3", self._credentials.verify)
        client.meta.events.register("before-parse.s3.*", self._read_clock)
        watch_answers(client)
        return client

    def _read_clock(self, response_dict: Mapping[str, Any], **_: Any) -> None:
        self.clock_ahead_seconds = seconds_ahead(response_dict["headers"])

    def identity(self) -> str:
        """Where the credentials come from, or `anonymous`. Raises as `client` does."""
        self.client()
        return str(self._credentials.origin())

    def renew(self, expired: Any) -> None:
        """Read the credentials again for the next client, unless another thread has replaced the `expired` one."""
        with self._lock:
            if self._client is expired:
                self._client = None

    def hint(self, client: Any, bucket: str) -> str:
        """A sentence about settings that may have caused a failed request; empty if there is no known cause."""
        endpoint = urllib.parse.urlsplit(client.meta.endpoint_url)
        host, path = endpoint.hostname or "", endpoint.path.rstrip("/")
        if host.startswith(f"{bucket}.") or path.endswith(f"/{bucket}"):
            return f" The endpoint {host}{path} has the bucket {bucket} in it, which is added once more: leave it out there."
        if not self._credentials.exist:
            return f" No credentials were found, so the request was anonymous, as public buckets allow. {PROVIDE_CREDENTIALS}"
        return ""

    def drop_header(self, header: str) -> None:
        """Stop sending this header to the server."""
        if header not in self.unsupported:
            self.unsupported.add(header)
            log.warning("storage: this server does not support %s: continuing without it", header)

    def get(self, client: Any, target: S3, headers: Mapping[str, str]) -> tuple[Mapping[str, str], Body]:
        """The headers (names in lower case) and the body of an object, or of the requested range of it.
        Raises what boto3's get_object raises. The request is signed and sent by parts of boto3, without the layers of its
        client, which take longer than the transfer of a song. One of these parts is private: if it is missing, and for buckets in
        another region, the ordinary get_object is used."""
        # The client's session: its proxies, certificates, timeouts and connections.
        http_session = getattr(getattr(client, "_endpoint", None), "http_session", None)
        # Access points and directory buckets have hosts, regions and signatures of their own.
        indirect = target.bucket in self._indirect_buckets or ":" in target.bucket or is_directory_bucket(target)
        if http_session is not None and not indirect:
            response = http_session.send(self._signed(client, target, headers))
            if response.status_code in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
                found = {name.lower(): value for name, value in response.headers.items()}
                verify_object(response.status_code, found, response.raw, headers.get("Range"))
                return found, response.raw
            error = error_from_response(response, self.config.timeout_seconds)
            if http_status(error) >= HTTPStatus.BAD_REQUEST and error_code(error) != "AuthorizationHeaderMalformed":
                raise error
            self._indirect_buckets.add(target.bucket)
        parameters = {GET_PARAMETERS[name]: value for name, value in headers.items()}
        answer = client.get_object(Bucket=target.bucket, Key=target.key, **parameters)
        body = getattr(answer["Body"], "_raw_stream", None) or FallbackBody(answer["Body"])
        metadata = answer["ResponseMetadata"]
        verify_object(metadata["HTTPStatusCode"], metadata["HTTPHeaders"], body, headers.get("Range"))
        return metadata["HTTPHeaders"], body

    def _signed(self, client: Any, target: S3, headers: Mapping[str, str]) -> Any:
        credentials = self._credentials.frozen() if self._credentials.exist else None
        url = self._bucket_urls.get(target.bucket)
        if url is None:
            signed = client.generate_presigned_url("get_object", Params={"Bucket": target.bucket, "Key": "x"})
            url = self._bucket_urls[target.bucket] = signed.partition("?")[0].removesuffix("x")
        request = AWSRequest("GET", url + urllib.parse.quote(target.key, safe="/~"), headers=dict(headers))
        request.stream_output = True
        if self.config.requester_pays:
            request.headers[REQUESTER] = "requester"
        if credentials is not None:
            S3SigV4Auth(credentials, "s3", client.meta.region_name).add_auth(request)
        return request.prepare()


def _add_requester(params: dict[str, Any], **_: Any) -> None:
    params["headers"][REQUESTER] = "requester"


def is_directory_bucket(target: S3) -> bool:
    """Whether the bucket is in S3 Express, which signs with sessions and whose ETags are not digests."""
    return target.bucket.endswith("--x-s3")


def _refuse_metadata_service(endpoint_url: str | None) -> None:
    """Raise SpecError if the endpoint is a cloud's metadata service, which would receive secrets and give them out."""
    host = urllib.parse.urlsplit(endpoint_url or "").hostname
    if host is None:
        return
    with contextlib.suppress(socket.gaierror):
        for *_, address in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM):
            found = ipaddress.ip_address(str(address[0]).partition("%")[0])
            if found.is_link_local or found == METADATA_IPV6:
                raise SpecError(
                    f"storage.endpoint_url: {host} is at the link-local address {address[0]}, which is no object storage."
                )


def _refuse_unusable_authorities(session: botocore.session.Session, endpoint_url: str) -> None:
    """Raise SpecError if the file of trusted authorities is absent or holds none, AccessError if it cannot be read.
    Without this check, each request would fail as if the server's certificate were not trusted."""
    name, path = "ca_bundle in AWS_CONFIG_FILE", session.get_config_variable("ca_bundle")
    if path is None:
        name, path = "REQUESTS_CA_BUNDLE", os.environ.get("REQUESTS_CA_BUNDLE")
    elif "AWS_CA_BUNDLE" in os.environ:
        name = "AWS_CA_BUNDLE"
    if path is None or not endpoint_url.startswith("https:"):
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=path)
    except ssl.SSLError as error:
        raise SpecError(
            f"{name}: {path} holds no certificates ({error.reason}). Name a file with them in PEM, or unset it."
        ) from error
    except PermissionError as error:
        raise AccessError(f"{name}: {path} cannot be read: {error.strerror}.") from error
    except OSError as error:
        raise SpecError(f"{name}: {path}: {error.strerror}. Name a file with certificates in PEM, or unset it.") from error
