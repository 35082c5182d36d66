"""The result of one check, which is a line of `emotion-job doctor`."""

from dataclasses import dataclass
from typing import Literal

from emotion.errors import EmotionError, printable


@dataclass(frozen=True)
class Check:
    """The result of one check. found: what was found. remedy: what to do about a warning or an error. exit_code: the one with
    which `run` would end, if status is wrong."""

    name: str
    status: Literal["ok", "warn", "wrong"]
    found: str
    remedy: str = ""
    exit_code: int = 0

    def line(self) -> str:
        text = f"{self.found.rstrip('.')}. {self.remedy}" if self.remedy else self.found
        return f"{self.status:6}{self.name:22}{printable(text)}"


def wrong(name: str, error: EmotionError, remedy: str = "", *, where: str = "") -> Check:
    """A failed check, from an error as `run` raises it: its first sentence says what was found, the others what to do.
    remedy: used if the error has only one sentence. where: prefix of what was found."""
    found, _, advice = str(error).removeprefix(f"{name}: ").partition(". ")
    return Check(name, "wrong", f"{where}{found}", advice or remedy, error.exit_code)
