"""The only place that chooses between a folder and object storage."""

from collections.abc import Callable

from job.config import StorageConfig
from job.spec.location import S3, StoredLocation
from job.storage.local_folder import LocalFolder
from job.storage.protocol import Storage


def open_storage(location: StoredLocation, config: StorageConfig, should_stop: Callable[[], bool], writer: str = "") -> Storage:
    """The storage at a location. should_stop: checked during every wait for object storage. writer: a suffix for temporary files;
    it must differ between writers that may write the same file of a folder at the same time."""
    if isinstance(location, S3):
        from job.storage.s3 import S3Prefix  # importing boto3 takes half a second

        return S3Prefix(location, config, should_stop)
    return LocalFolder(location.path, writer)
