"""Notices that a spot instance will be taken away, from the metadata service of AWS, GCP or Azure."""

import http.client
import json

METADATA = "169.254.169.254"
TIMEOUT_SECONDS = 1.0


def spot_notice(platform: str, metadata: str) -> str | None:
    """The notice that this machine will be taken away, or None. Raises OSError for no answer or one that cannot be read."""
    try:
        return SPOT_NOTICES[platform](metadata)
    except (http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError) as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def aws_notice(metadata: str) -> str | None:
    """The interruption notice of a spot instance, given two minutes before (EC2 user guide, instance metadata version 2)."""
    token = _request(metadata, "PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})
    if token is None:
        raise ValueError("no token")
    headers = {"X-aws-ec2-metadata-token": token}
    found = _request(metadata, "GET", "/latest/meta-data/spot/instance-action", headers)
    if found is None:
        return None
    action = json.loads(found)
    return f"{action['action']} at {action['time']}" if isinstance(action, dict) and "action" in action else None


def gcp_notice(metadata: str) -> str | None:
    """Whether this machine is being preempted, 30 s before (Compute Engine, metadata value `preempted`)."""
    found = _request(metadata, "GET", "/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return "preempted" if found is not None and found.strip() == "TRUE" else None


def azure_notice(metadata: str) -> str | None:
    """A scheduled event of type Preempt for this machine, 30 s before. The service also lists those of related machines."""
    headers = {"Metadata": "true"}
    found = _request(metadata, "GET", "/metadata/scheduledevents?api-version=2020-07-01", headers)
    events = [event for event in json.loads(found or "{}").get("Events", []) if event["EventType"] == "Preempt"]
    if not events:
        return None
    name = _request(metadata, "GET", "/metadata/instance/compute/name?api-version=2021-02-01&format=text", headers)
    for event in events:
        if name is None or name.strip() in event["Resources"]:
            return f"Preempt not before {event.get('NotBefore') or 'now'}"
    return None


SPOT_NOTICES = {"aws": aws_notice, "gcp": gcp_notice, "azure": azure_notice}  # key: preemption.spot; each asks once


def _request(metadata: str, method: str, path: str, headers: dict[str, str]) -> str | None:
    """The body of an answer of the metadata service, None for 404. Uses no proxy and follows no redirect."""
    connection = http.client.HTTPConnection(metadata, timeout=TIMEOUT_SECONDS)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        body = response.read(1 << 16)
    finally:
        connection.close()
    if response.status == http.client.NOT_FOUND:
        return None
    if response.status != http.client.OK:
        raise ValueError(f"HTTP status {response.status}")
    return body.decode()
