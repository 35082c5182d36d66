"""Sections of the spec that belong to the job and not to the science: where results go, storage, preemption."""

import contextlib
import ipaddress
import urllib.parse
from typing import Literal

from pydantic import field_validator

from emotion.config import Section, runtime_field


class PreemptionConfig(Section):
    time_limit_minutes: float | None = runtime_field(
        None, "stop before this time is up; a time limit of SLURM is respected without it", gt=0
    )
    grace_seconds: float = runtime_field(60.0, "stop this long before a time limit", ge=0)
    spot: Literal["aws", "gcp", "azure"] | None = runtime_field(
        None, "watch for this platform's notice that it takes the machine away"
    )


class ArtifactsConfig(Section):
    destination: str | None = runtime_field(
        None, "folder or s3://… under which NAME-KEY12/ is published; WORK/published if not given"
    )
    excerpts: bool = runtime_field(
        False,
        "let the report play 8 s of the songs with the largest errors: only where you may publish them; generated songs always",
    )


class StorageConfig(Section):
    """Access to s3://. Credentials and profile come from the environment or files, by the rules of AWS."""

    endpoint_url: str | None = runtime_field(None, "of object storage other than Amazon's; https, or http on this machine")
    region: str | None = runtime_field(None, "of the bucket; by default AWS_REGION or the one of the profile", min_length=1)
    connections: int = runtime_field(16, "files that are copied at one time, from a folder or object storage", ge=1, le=64)
    timeout_seconds: float = runtime_field(
        20.0, "idle timeout: a connection without progress for this long is closed, and the request retried", gt=0
    )
    patience_seconds: float = runtime_field(300.0, "a failed request is retried for this long", ge=0)

    requester_pays: bool = runtime_field(
        False, "pay for the requests and the traffic of buckets whose owners leave that to the reader"
    )

    @field_validator("endpoint_url")
    @classmethod
    def _endpoint_safe(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname or ""
        if not host or parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("expected https://HOST or https://HOST:PORT, without user, password or query")
        address = None
        with contextlib.suppress(ValueError):
            address = ipaddress.ip_address(host)
        if address is not None and address.is_link_local:
            raise ValueError(f"{host} is a link-local address, where metadata services are and no object storage")
        loopback = host == "localhost" or (address is not None and address.is_loopback)
        if parts.scheme != "https" and not (parts.scheme == "http" and loopback):
            raise ValueError(
                "expected https:// (http:// only on this machine); AWS_ENDPOINT_URL_S3 in the environment may be any"
            )
        return url.rstrip("/")
