"""Whether notifications can be sent from here. Nothing is sent."""

import os
import shutil
from collections.abc import Iterator

from emotion.errors import printable
from job.config import NotifyConfig
from job.machine.check import Check


def unusable(config: NotifyConfig) -> dict[str, str]:
    """`webhook` or `command` → what is missing: a permanent problem, which no retry solves. The text never contains the URL."""
    found = {}
    if config.webhook is not None and not os.environ.get(config.webhook, "").strip().startswith(("https://", "http://")):
        found["webhook"] = (
            f"the environment variable {config.webhook} is not set, or holds no URL that begins with https:// or http://"
        )
    if config.command is not None and shutil.which(config.command[0]) is None:
        found["command"] = f"there is no program {printable(config.command[0])} here, or it cannot be executed"
    return found


def check_notifications(config: NotifyConfig) -> Iterator[Check]:
    """A warning for each kind of notification that cannot be sent."""
    for name, problem in unusable(config).items():
        yield Check(f"notify.{name}", "warn", problem, "Correct it, or there is no notification of the end of the job.")
