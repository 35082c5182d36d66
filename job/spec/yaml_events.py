"""PyYAML's events, with tabs allowed as in YAML 1.2, and its errors in plain words at the position to correct."""

import re
from collections.abc import Iterator

import yaml

from emotion.characters import is_deceptive, name_of

LINE_BREAK = re.compile("\r\n|\r|\n")
QUOTED_OR_COMMENT = re.compile(r""""(\\.|[^"\\])*"|'[^']*'|(^|(?<=[ \t]))#.*""")

BLOCK_HEADER = re.compile(r"[|>][-+0-9]*[ \t]*\t[ \t]*")  # with a tab after it


class UnreadableError(Exception):
    """The text cannot be read beyond this position, from 1."""

    def __init__(self, line: int, column: int, text: str) -> None:
        super().__init__(text)
        self.line, self.column, self.text = line, column, text


class _Loader(yaml.SafeLoader):
    """The loader in pure Python: its parser does not recurse, reads no further than requested, and its errors have positions.

    PyYAML refuses all tabs between tokens. Here a tab may separate tokens of a line, and a line may consist of tabs and a
    comment. Within brackets around the whole document, tabs may indent; elsewhere a tab that indents is an error. After a tab
    behind `-` or `?`, no mapping or list may begin in the same line.
    """

    def scan_to_next_token(self) -> None:
        while True:
            while self.peek() == " " or (self.peek() == "\t" and self._may_skip_tab()):
                self.forward()
            if self.peek() == "#":
                self._skip_line()
            if not self.scan_line_break():  # type: ignore[no-untyped-call]
                return
            if not self.flow_level:
                self.allow_simple_key = True

    def _may_skip_tab(self) -> bool:
        if self.flow_level and self.indent < 0:
            return True  # brackets of the whole document, as in JSON, where tabs may indent
        if self.buffer[self.pointer - self.column : self.pointer].strip(" \t"):
            self.allow_simple_key = self.allow_simple_key and self.flow_level > 0
            return True
        return self._after_blanks()[1] in "\0\r\n#"

    def _after_blanks(self) -> tuple[int, str]:
        """The number of spaces and tabs from here, and the character after them."""
        length = 0
        while self.peek(length) in " \t":
            length += 1
        return length, self.peek(length)

    def _skip_line(self) -> None:
        while self.peek() not in "\0\r\n":
            self.forward()

    def scan_block_scalar(self, style: str) -> yaml.ScalarToken:
        if header := BLOCK_HEADER.match(self.buffer, self.pointer):
            self.buffer = self.buffer[: header.start()] + header[0].replace("\t", " ") + self.buffer[header.end() :]
        found: yaml.ScalarToken = super().scan_block_scalar(style)
        return found

    def scan_plain_spaces(self, indent: int, start_mark: yaml.Mark) -> list[str] | None:
        length, following = self._after_blanks()
        blanks = self.prefix(length)
        if "\t" in blanks:
            self.forward(length)
            if following not in "\0\r\n#":
                return [blanks]
        found: list[str] | None = super().scan_plain_spaces(indent, start_mark)
        return found


def events(text: str) -> Iterator[yaml.Event]:
    """The events of a text. Raises UnreadableError for a syntax error."""
    loader = _Loader(text)
    try:
        while loader.check_event():
            yield loader.get_event()  # type: ignore[no-untyped-call]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark or loader.get_mark()
        first = min(mark.line, error.context_mark.line if error.context_mark else mark.line)
        raise _at_deceptive_character(text, first, UnreadableError(mark.line + 1, mark.column + 1, _explained(error))) from None
    except (ValueError, OverflowError):
        # PyYAML gives an escape such as "\UFFFFFFFF" to chr() and the number of a %YAML line to int() unchecked.
        mark = loader.get_mark()
        raise UnreadableError(mark.line + 1, mark.column + 1, "not valid YAML: an impossible number or escape") from None
    finally:
        loader.dispose()


def line_and_column(before: str) -> tuple[int, int]:
    """(line, column), from 1, of the character after this text."""
    lines = LINE_BREAK.split(before)
    return len(lines), len(lines[-1]) + 1


def _at_deceptive_character(text: str, first: int, error: UnreadableError) -> UnreadableError:
    """The error at the first character, outside of quotes and comments, that may be its cause; else the error as it is.

    first: the line, from 0, where the part that was being read began. The cause may be in the line before: after a character that
    only looks like a colon, the text continues in the next line, whose colon is then an error.
    """
    lines = LINE_BREAK.split(text)
    while first > 0:
        first -= 1
        if lines[first].strip():
            break
    for number in range(first, min(error.line, len(lines))):
        line = QUOTED_OR_COMMENT.sub(lambda match: "x" * len(match[0]), lines[number])
        for column, sign in enumerate(line):
            if is_deceptive(sign) and sign != "\t":
                words = f"{name_of(sign)}, which is no part of YAML's syntax; type the plain character, or quote the text"
                place = "" if error.line == number + 1 else f" in line {error.line}"
                return UnreadableError(number + 1, column + 1, f"{words}. YAML found{place}: {error.text}")
    return error


def _explained(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or "not readable"
    if "'\\t'" in problem:
        return "a tab, where only spaces are allowed; indent with spaces"
    if "mapping values are not allowed" in problem:
        return "a ':' that does not belong here; check the indentation, and put text that contains ': ' in quotes"
    if "could not find expected ':'" in problem:
        return "a line without ':', expected KEY: VALUE"
    if "expected <block end>" in problem and not problem.endswith(("'}'", "']'", "','")):
        return "this does not fit the lines above; check the indentation"
    if "cannot start any token" in problem:
        return f"{problem.replace('that cannot start any token', 'that may not start a value')}; put the text in quotes"
    start = error.context_mark
    if start is not None and error.problem_mark is not None and start.line != error.problem_mark.line:
        return f"not valid YAML: {problem}, {error.context} that began in line {start.line + 1}"
    return f"not valid YAML: {problem}"
