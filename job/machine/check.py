"""One line of `emotion-job doctor`."""

from dataclasses import dataclass
from typing import Literal

from emotion.errors import EmotionError, printable


@dataclass(frozen=True)
class Check:
    """found: what was seen. remedy: what to do about a warning or an error. exit_code: of `run`, for what is wrong."""

    name: str
    status: Literal["ok", "warn", "wrong"]
    found: str
    remedy: str = ""
    exit_code: int = 0

    def line(self) -> str:
        text = f"{self.found.rstrip('.')}. {self.remedy}" if self.remedy else self.found
        return f"{self.status:6}{self.name:22}{printable(text)}"


def wrong(name: str, error: EmotionError, remedy: str = "", *, where: str = "") -> Check:
    """From an error as `run` raises it, whose first sentence says what was found and whose others what to do.
    remedy: where the error has no other sentence. where: is put before it."""
    found, _, advice = str(error).removeprefix(f"{name}: ").partition(". ")
    return Check(name, "wrong", f"{where}{found}", advice or remedy, error.exit_code)
