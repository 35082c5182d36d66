"""Where data lies: generated, in a folder, or in object storage."""

import re
from pathlib import Path

from job.spec.model import _shown

GENERATED = "generated:"
S3 = "s3://"
BUCKET = r"[a-zA-Z0-9][a-zA-Z0-9._-]{1,62}"
"""Amazon allows less today; old buckets and other stores have such names."""
FEWEST_GENERATED, MOST_GENERATED = 12, 1000


def _location(text: str) -> str:
    """`s3://BUCKET/PREFIX` without a slash at the end, or an absolute path. Raises ValueError."""
    if not text.startswith(S3):
        return _absolute_path(text)
    bucket, *names = text.removeprefix(S3).rstrip("/").split("/")
    if "@" in bucket or "?" in text or "#" in text:
        raise ValueError("expected s3://BUCKET/PREFIX and nothing else: no user, password, query or fragment")
    if not re.fullmatch(BUCKET, bucket):
        raise ValueError(f"expected s3://BUCKET/PREFIX, found the bucket {_shown(bucket)}, which no bucket is called")
    if any(name in ("", ".", "..") for name in names) or not text.isprintable():
        raise ValueError(f"expected names between single slashes after the bucket, found {_shown('/'.join(names))}")
    return "/".join((S3 + bucket, *names))


def _absolute_path(text: str) -> str:
    """`file:///x` means the path /x, character by character; `~` is the home folder. Raises ValueError."""
    scheme = re.match("[A-Za-z][A-Za-z0-9+.-]*://", text)
    if scheme and scheme[0] != "file://":
        raise ValueError(f"{scheme[0]} is not supported here; use a path")
    if scheme and not text.startswith("file:///"):
        raise ValueError(f"expected a path after file://, as in file:///data/deam, found {_shown(text)}")
    text = text.removeprefix("file://")
    if not text.strip():
        raise ValueError("expected a path, found an empty text")
    try:
        path = Path(text).expanduser().absolute()
        # Only the file system knows where ".." leads from a symbolic link; other links keep their name.
        return str(path.resolve() if ".." in path.parts else path)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"the path {_shown(text)} leads nowhere: {error}") from None
