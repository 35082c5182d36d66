"""A terminal for tests: what a program draws on it, and how it looks in the end."""

import fcntl
import io
import os
import pty
import struct
import termios

END = "<end of what was written>"


class Terminal:
    """`stream` is what a program writes to. Terminals end lines by CR LF; ESC [ K removes the rest of a line."""

    def __init__(self, columns: int = 80) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stream = io.TextIOWrapper(io.FileIO(theirs, "w"), encoding="utf-8", write_through=True)

    def written(self) -> str:
        """Since the last call."""
        self.stream.write(END)
        text = b""
        while not text.endswith(END.encode()):
            text += os.read(self._ours, 1 << 16)
        return text.decode().removesuffix(END)

    def pictures(self) -> list[str]:
        """Of the one line that is drawn again and again."""
        return [line for line in self.written().replace("\x1b[K", "").split("\r") if line.strip()]

    def screen(self) -> list[str]:
        """The lines as they are in the end, without empty ones."""
        lines = self.written().replace("\r\n", "\n").replace("\x1b[K", "").split("\n")
        return [line.split("\r")[-1].rstrip() for line in lines if line.split("\r")[-1].strip()]

    def close(self) -> None:
        self.stream.close()
        os.close(self._ours)
