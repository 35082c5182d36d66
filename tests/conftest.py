"""What several tests share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real music and label files that may not enter the repository; a counted skip where it is not given."""
    folder = os.environ.get("EMOTION_TEST_DATA")
    if not folder:
        pytest.skip("EMOTION_TEST_DATA is not set: needs a folder with deam_annotations, odd_mp3 and vgmidi48")
    return Path(folder)
