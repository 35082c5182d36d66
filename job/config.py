"""Sections of the spec that belong to the job and not to the science: where results go, storage, preemption."""

import contextlib
import ipaddress
import urllib.parse
from typing import Literal

from pydantic import field_validator

from emotion.config import Section, runtime_field


class PreemptionConfig(Section):
    time_limit_minutes: float | None = runtime_field(
        None, "stop before so much time is up; SLURM's own limit counts anyway", gt=0
    )
    grace_seconds: float = runtime_field(60.0, "stop so long before a time limit", ge=0)
    spot: Literal["aws", "gcp", "azure"] | None = runtime_field(
        None, "listen to this platform's notice that a machine goes away"
    )


class ArtifactsConfig(Section):
    destination: str | None = runtime_field(
        None, "folder or s3://… under which NAME-KEY12/ is published; WORK/published if not given"
    )


class StorageConfig(Section):
    """How s3:// is reached. Credentials, profile and anything secret come from the environment or files, as AWS has them."""

    endpoint_url: str | None = runtime_field(None, "of a store that is not Amazon's; https, or http on this machine")
    region: str | None = runtime_field(
        None, "of the bucket; not given: as AWS_REGION or the profile says", min_length=1
    )
    connections: int = runtime_field(16, "files moved at one time, from a folder or a store", ge=1, le=64)
    timeout_seconds: float = runtime_field(
        20.0, "a connection that is silent, or nearly so, for this long is given up", gt=0
    )
    patience_seconds: float = runtime_field(300.0, "a request is tried again for this long", ge=0)

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
            raise ValueError(f"{host} is a link-local address; there are no stores at such, but metadata services")
        loopback = host == "localhost" or (address is not None and address.is_loopback)
        if parts.scheme != "https" and not (parts.scheme == "http" and loopback):
            raise ValueError(
                "expected https:// (http:// only on this machine); AWS_ENDPOINT_URL_S3 in the environment may be any"
            )
        return url.rstrip("/")
