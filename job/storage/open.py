"""The one place that decides between a folder and object storage."""

from collections.abc import Callable
from pathlib import Path

from emotion.config import StorageConfig
from job.spec.location import S3
from job.storage.local_folder import Folder
from job.storage.protocol import Place


def place_of(url: str, config: StorageConfig, should_stop: Callable[[], bool], writer: str = "") -> Place:
    """A location of the spec as a place. writer: tells those apart who may write one file of a folder at one time.

    should_stop is asked while a store keeps us waiting.
    """
    if url.startswith(S3):
        from job.storage.s3 import Bucket  # boto3 takes half a second

        return Bucket(url, config, should_stop)
    return Folder(Path(url), writer)
