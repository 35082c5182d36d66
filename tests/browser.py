"""Chromium without a window, driven through a pipe by its own protocol (https://chromedevtools.github.io/devtools-protocol/).

`python -m tests.browser PAGE FOLDER` writes pictures of a page in both themes, as on a phone and on a desk.
"""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

WIDTHS = (360, 1280)
THEMES = ("light", "dark")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
    *("--autoplay-policy=no-user-gesture-required", "--mute-audio"),
)


class Browser:
    """One tab. commands, answers: our ends of the pipes; events: all so far, in order."""

    def __init__(self, commands: BinaryIO, answers: int) -> None:
        self.commands, self.answers, self.received = commands, answers, b""
        self.events: list[dict[str, Any]] = []
        self.number, self.session = 0, ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command, which may not be an error."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.commands.write(json.dumps(message).encode() + b"\0")
        self.commands.flush()
        while (answer := self._read()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, (method, answer["error"])
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, page: Path, width: int, height: int = 800, theme: str = "light") -> None:
        """Load a file at the width of a screen (below 600 that of a phone), in a theme, and wait until it is loaded."""
        phone = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        self.events.clear()
        loader = self.call("Page.navigate", url=page.as_uri())["loaderId"]
        while not any((found["loaderId"], found["name"]) == (loader, "load") for found in self.methods("Page.lifecycleEvent")):
            self.events.append(self._read())
        self.call("Page.bringToFront")

    def run(self, script: str) -> Any:
        """The value of an expression in the page; of a promise, what it is fulfilled with."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key: str) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode={"Tab": 9, "ArrowRight": 39}.get(key, 0),
            )

    def point_at(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def picture(self, path: Path) -> None:
        """Write the whole page as PNG."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def methods(self, name: str) -> list[Any]:
        """The parameters of all events of a name since the page was opened."""
        return [event["params"] for event in self.events if event["method"] == name]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self.received:
            content = os.read(self.answers, 1 << 20)
            assert content, "chromium has ended"
            self.received += content
        message, _, self.received = self.received.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found


@contextlib.contextmanager
def browser(program: str, folder: Path) -> Iterator[Browser]:
    """A Chromium whose profile is in `folder`. It reads commands from descriptor 3 and answers on 4."""
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    command = ["bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "bash", program, *FLAGS, f"--user-data-dir={folder}"]
    environment = {**os.environ, "HOME": str(folder)}
    with subprocess.Popen(
        command, pass_fds=(theirs_in, theirs_out), env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            with open(ours_out, "wb") as commands:  # noqa: PTH123 - a descriptor
                yield Browser(commands, ours_in)
        finally:
            process.terminate()
            os.close(ours_in)


def main(page: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile, browser(shutil.which("chromium") or "chromium", Path(profile)) as tab:
        for width in WIDTHS:
            for theme in THEMES:
                tab.open(page.resolve(), width, theme=theme)
                tab.picture(folder / f"{page.stem}-{width}-{theme}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
