import pytest

from emotion.audio.mel import LogMel
from tests.emotion.sounds import MEL


@pytest.fixture(scope="session")
def log_mel() -> LogMel:
    return LogMel(MEL)
