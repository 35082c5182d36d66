"""Sections of the spec that belong to the job and not to the science: where results go, storage, preemption."""

import contextlib
import ipaddress
import re
import urllib.parse
from typing import Literal

from pydantic import Field, field_validator

from emotion.config import Section, runtime_field


class PreemptionConfig(Section):
    time_limit_minutes: float | None = runtime_field(
        None, "stop before this time is up; a time limit of SLURM is respected without it", gt=0
    )
    grace_seconds: float = runtime_field(60.0, "save and exit this long before a time limit", ge=0)
    spot: Literal["aws", "gcp", "azure"] | None = runtime_field(
        None, "watch for this platform's interruption notice for spot instances"
    )
    hang_minutes: float | None = runtime_field(
        30.0, "after this long without progress the job logs the stacks of all threads and exits with 75; null: never", gt=0
    )


class BudgetConfig(Section):
    """When trainings end, so that the job evaluates and publishes what there is. See job/unattended/budget.py."""

    minutes: float | None = Field(
        None,
        gt=0,
        description="of all attempts together; trainings end early enough to evaluate and publish the best model so far",
    )
    price_per_hour: float | None = runtime_field(
        None, "of the machine, in any currency, for the price in plan --probe and the manifest", ge=0
    )
    stop_after: tuple[int | None, int | None] | None = runtime_field(
        None, "stop GAN and ViT after these numbers of steps (null: at the last) instead of by time; set by reproduce"
    )


class NotifyConfig(Section):
    """Where to report that a job is done, has failed or is interrupted again and again. See job/unattended/notify.py."""

    webhook: str | None = runtime_field(
        None, "name of the environment variable that holds the URL to which JSON is posted: a URL is often a secret"
    )
    command: tuple[str, ...] | None = runtime_field(
        None, "a program with its arguments, as a list; it gets the JSON on standard input", min_length=1
    )

    @field_validator("webhook")
    @classmethod
    def _is_a_name(cls, name: str | None) -> str | None:
        # Without the value: it may be the URL.
        if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError("expected the name of an environment variable; put the URL into that variable, not here")
        return name


class TrackConfig(Section):
    """Where curves are sent while a job runs. See job/unattended/trackers.py."""

    tensorboard: str | None = runtime_field(None, "folder for TensorBoard's event files, in NAME-KEY12/ below it")
    mlflow: str | None = runtime_field(
        None, "name of an MLflow experiment; the server is that of MLFLOW_TRACKING_URI", min_length=1
    )
    wandb: str | None = runtime_field(
        None,
        "name of a Weights & Biases project; key, server and mode are those of WANDB_API_KEY, WANDB_BASE_URL, WANDB_MODE",
        min_length=1,
    )


class ArtifactsConfig(Section):
    destination: str | None = runtime_field(
        None, "folder or s3://… under which NAME-KEY12/ is published; WORK/published if not given"
    )
    license: str | None = runtime_field(
        None, "of the published weights, for their model card: an identifier of the Hugging Face Hub, such as cc-by-nc-4.0"
    )
    excerpts: bool = runtime_field(
        False,
        "let the report play 8 s of the songs with the largest errors: only where you may publish them; generated songs always",
    )

    @field_validator("license")
    @classmethod
    def _license_an_identifier(cls, license: str | None) -> str | None:
        if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,63}", license):
            raise ValueError("expected lower-case letters, digits, dots and hyphens, such as cc-by-nc-4.0 or other")
        return license


class StorageConfig(Section):
    """Access to s3://. Credentials and profile come from the environment or files, by the rules of AWS."""

    endpoint_url: str | None = runtime_field(
        None, "URL of an object storage other than Amazon S3; https, or http on this machine"
    )
    region: str | None = runtime_field(None, "region of the bucket; default: AWS_REGION or that of the profile", min_length=1)
    connections: int = runtime_field(16, "number of files copied concurrently, from a folder or object storage", ge=1, le=64)
    timeout_seconds: float = runtime_field(
        20.0, "idle timeout: a connection without progress for this long is closed, and the request retried", gt=0
    )
    patience_seconds: float = runtime_field(300.0, "a failed request is retried for this long", ge=0)

    requester_pays: bool = runtime_field(False, "pay for requests and traffic of requester-pays buckets")

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
