"""Reads a safe subset of YAML 1.2 from PyYAML's events and keeps the line and column of every value.

Plain scalars follow YAML 1.2's core schema: `no`, `on`, `yes`, dates and 12:30:45 are text, 010 is ten, 1e-4 a number.
Refused: duplicate keys, aliases and anchors, tags, merge keys, keys that are not text, .inf and .nan, whole numbers
beyond 64 bits, a second document, control characters, deep nesting, large files. There is no recursion and no shared
value, so no input of the allowed size can exhaust stack or memory.
"""

import json
import re
import unicodedata
from dataclasses import dataclass, field
from typing import TypeAlias

import yaml

from emotion.characters import is_invisible, name_of, with_names
from emotion.errors import SpecError, printable
from job.spec.yaml_events import UnreadableError, events, line_and_column

Value: TypeAlias = "dict[str, Value] | list[Value] | str | int | float | bool | None"
KeyPath: TypeAlias = tuple[str | int, ...]

MAX_BYTES = 256 * 1024
MAX_DEPTH = 16
MAX_INTEGER = 2**63 - 1

_NULL = {"", "~", "null", "Null", "NULL"}
_TRUE = {"true", "True", "TRUE"}
_FALSE = {"false", "False", "FALSE"}
_DECIMAL = re.compile(r"[-+]?[0-9]+")
_PREFIXED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
# Control characters, lone surrogates, a byte order mark in the middle, and the line breaks of YAML 1.1 that editors do
# not show: U+2028 would end a comment, so that the text after it would be read.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")

# _ADDRESS: scheme, host, and the rest. _WEBHOOK: the key, and its value on the command line.
_ADDRESS = re.compile(r"(https?://)(?:[^/\s@]*@)?([^/\s\"'?#]+)[/?#][^\s\"'\]},]+", re.IGNORECASE)
_WEBHOOK = re.compile(r"(\bwebhook\b\"?\s*[=:]\s*).+", re.DOTALL)

LOOKS_LIKE_ITEM = re.compile(
    r"[\u2010-\u2015\u2212\ufe58\ufe63\uff0d]([ \u00a0]|$)"
)  # hyphens, dashes and minus signs other than ASCII's


@dataclass(frozen=True)
class Problem:
    """A refused part of an otherwise readable document. hides: the path whose value is therefore unknown."""

    line: int
    column: int
    text: str
    hides: KeyPath | None = None


@dataclass(frozen=True)
class Document:
    """A value and the positions of its parts in the text. problems: refused parts; their values are left out."""

    value: Value
    positions: dict[KeyPath, tuple[int, int]]
    problems: tuple[Problem, ...] = ()

    def position(self, path: KeyPath) -> tuple[int, int]:
        """(line, column), from 1, of the key or list item at `path`; of its nearest known parent if there is none."""
        while path and path not in self.positions:
            path = path[:-1]
        return self.positions.get(path, (1, 1))


def read(text: str | bytes, name: str) -> Document:
    """The document in `text`. name: name of the text in messages, usually the file's path. Refused parts are listed in
    `problems`, to be reported together with other errors. Raises SpecError for a syntax error, which ends the reading."""
    try:
        return _build(_decoded(text), flow_only=False)
    except UnreadableError as refused:
        raise SpecError(f"{name}:{refused.line}:{refused.column}: {refused.text}") from None


def scalar_or_flow(text: str, name: str) -> Value:
    """A value from the command line, by the same rules: a scalar, `[a list]` or `{a: mapping}`.
    Raises SpecError with every problem, each `NAME: what was found, what is allowed`."""
    try:
        document = _build(_decoded(text), flow_only=True)
    except UnreadableError as refused:
        raise SpecError(f"{name}: {refused.text}") from None
    if document.problems:
        raise SpecError(*(f"{name}: {p.text}" for p in document.problems))
    return document.value


def plain_scalar(text: str) -> Value:
    """The value of an unquoted scalar by YAML 1.2's core schema. Raises ValueError for a number out of range."""
    if text in _NULL:
        return None
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    if _DECIMAL.fullmatch(text) or _PREFIXED.fullmatch(text):
        # The length first: int() refuses thousands of decimal digits, and is slow for as many hexadecimal ones.
        number = int(text, {"0o": 8, "0x": 16}.get(text[:2], 10)) if len(text) <= 100 else MAX_INTEGER + 1
        if abs(number) > MAX_INTEGER:
            raise ValueError(f"the whole number {shortened(text)}, allowed are those within ±{MAX_INTEGER}")
        return number
    if _FLOAT.fullmatch(text):
        real = float(text)
        if abs(real) == float("inf"):
            raise ValueError(f"the number {shortened(text)} is too large, allowed are those within ±1.797e308")
        return real
    if _NOT_FINITE.fullmatch(text):
        raise ValueError(f"{text} is refused, only finite numbers are allowed")
    return text


def shortened(text: str) -> str:
    """At most 60 characters of `text`, for messages."""
    return text if len(text) <= 60 else f"{text[:57]}…"


def without_secret(text: str) -> str:
    """`text` for messages: without the value of a webhook, and with only scheme and host of other web addresses, as the rest may
    be a key."""
    return _ADDRESS.sub(r"\1\2/***", _WEBHOOK.sub(r"\1***", text))


def shown(value: object) -> str:
    """A value as messages quote it: short and on one line."""
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return with_names(value, shortened(repr(without_secret(value))))
    return shortened(printable(without_secret(json.dumps(value, ensure_ascii=False))))


def _decoded(text: str | bytes) -> str:
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    if len(data) > MAX_BYTES:
        raise UnreadableError(1, 1, f"more than {MAX_BYTES // 1024} KiB of YAML, at most that is allowed")
    if isinstance(text, bytes):
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            line, column = line_and_column(data[: error.start].decode("utf-8"))
            if data.startswith((b"\xff\xfe", b"\xfe\xff")):
                found = "UTF-32" if data.startswith(b"\xff\xfe\0\0") else "UTF-16"
                raise UnreadableError(1, 1, f"the file is {found}, expected UTF-8; save it as UTF-8") from None
            found = f"byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
            raise UnreadableError(line, column, found) from None
    text = text.removeprefix("\ufeff")
    forbidden = _FORBIDDEN.search(text)
    if forbidden:
        line, column = line_and_column(text[: forbidden.start()])
        raise UnreadableError(line, column, f"the invisible character {name_of(forbidden[0])}, which is not allowed; delete it")
    return text


@dataclass
class _Collection:
    """A list or mapping whose end has not been read. path: None inside a refused part. In a mapping, keys and values alternate:
    `has_key` says that a key was read, and `key` is None if that key was refused, so that its value is dropped."""

    container: "list[Value] | dict[str, Value]"
    path: KeyPath | None
    has_key: bool = False
    key: str | None = None


@dataclass
class _Reading:
    """The part of the document that has been read. text: the whole document."""

    text: str
    root: Value = None
    positions: dict[KeyPath, tuple[int, int]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def refuse(self, event: yaml.Event, text: str, hides: KeyPath | None = None) -> None:
        place = _start(event)
        if isinstance(event, yaml.ScalarEvent) and event.style is None and event.start_mark and event.end_mark:
            begin = event.start_mark.index
            misread = _misread(self.text[begin : event.end_mark.index])
            place = line_and_column(self.text[: begin + misread]) if misread is not None else place
        self.problems.append(Problem(*place, text, hides))


def _build(text: str, flow_only: bool) -> Document:
    reading = _Reading(text)
    stack: list[_Collection] = []
    documents = 0
    for event in events(text):
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise UnreadableError(*_start(event), "a second document, one is allowed; remove the '---' line")
            if event.tags or event.version not in (None, (1, 2)):
                reading.refuse(event, "a % directive, none but %YAML 1.2 is allowed; remove it")
        elif isinstance(event, yaml.SequenceEndEvent | yaml.MappingEndEvent):
            stack.pop()
        elif isinstance(event, yaml.NodeEvent):
            if isinstance(event, yaml.CollectionStartEvent) and len(stack) == MAX_DEPTH:
                raise UnreadableError(*_start(event), f"nested more than {MAX_DEPTH} deep, at most that is allowed")
            if flow_only and isinstance(event, yaml.CollectionStartEvent) and not event.flow_style:
                raise UnreadableError(*_start(event), "expected a value, [a list] or {a: mapping}; put text with ': ' in quotes")
            collection = _read_node(event, stack[-1] if stack else None, reading)
            if collection is not None:
                stack.append(collection)
    return Document(reading.root, reading.positions, tuple(sorted(reading.problems, key=lambda p: (p.line, p.column))))


def _read_node(event: yaml.NodeEvent, parent: _Collection | None, reading: _Reading) -> _Collection | None:
    """Add a key, a scalar or a new collection to its parent. Returns the collection, if it is one."""
    if parent is not None and isinstance(parent.container, dict) and not parent.has_key:
        parent.has_key = True
        parent.key = _read_key(event, parent, parent.container, reading)
        return _new_collection(event, None)
    path = _next_path(parent)
    if path is not None:
        reading.positions.setdefault(path, _start(event))
    collection = _new_collection(event, path)
    value: Value = collection.container if collection is not None else None
    refusal = _refused_property(event)
    if isinstance(event, yaml.ScalarEvent):
        try:
            value = _scalar(event)
        except ValueError as error:
            refusal = refusal or str(error)
    if refusal is not None:
        reading.refuse(event, refusal, path)
    if parent is None:
        reading.root = value
    elif isinstance(parent.container, list):
        parent.container.append(value)
    else:
        # A refused scalar is left out, as a wrong value would only be a second error.
        if parent.key is not None and (refusal is None or collection is not None):
            parent.container[parent.key] = value
        parent.has_key = False
    return collection


def _read_key(event: yaml.NodeEvent, parent: _Collection, siblings: dict[str, Value], reading: _Reading) -> str | None:
    refusal = _refused_property(event)
    if refusal is not None:
        reading.refuse(event, refusal)
        return None
    if not isinstance(event, yaml.ScalarEvent):
        reading.refuse(event, "a list or mapping as a key, only text is allowed")
        return None
    if event.style is None and event.value == "<<":
        reading.refuse(event, "the merge key <<, which is not allowed; write the keys out", parent.path)
        return None
    try:
        key = _scalar(event)
    except ValueError as error:
        reading.refuse(event, str(error))
        return None
    if not isinstance(key, str):
        found = f"{shortened(event.value)} as a key" if event.value else "an empty key"
        reading.refuse(event, f"{found}, only text is allowed; put it in quotes if it is meant")
        return None
    if parent.path is None:
        return key if key not in siblings else None
    path = (*parent.path, key)
    if path in reading.positions:
        line, column = reading.positions[path]
        reading.refuse(event, f"the key {shortened(key)!r} a second time, once is allowed; first at {line}:{column}")
        return None
    reading.positions[path] = _start(event)
    return key


def _next_path(parent: _Collection | None) -> KeyPath | None:
    """The path of the next value; None inside a rejected value."""
    if parent is None:
        return ()
    if parent.path is None:
        return None
    if isinstance(parent.container, list):
        return (*parent.path, len(parent.container))
    return None if parent.key is None else (*parent.path, parent.key)


def _new_collection(event: yaml.NodeEvent, path: KeyPath | None) -> _Collection | None:
    if isinstance(event, yaml.MappingStartEvent):
        return _Collection({}, path)
    if isinstance(event, yaml.SequenceStartEvent):
        return _Collection([], path)
    return None


def _refused_property(event: yaml.NodeEvent) -> str | None:
    """Why an alias, anchor or tag of this node is refused; None if it has none."""
    if isinstance(event, yaml.AliasEvent):
        return f"the alias *{shortened(str(event.anchor))}, which is not allowed; write the value out"
    if event.anchor is not None:
        return f"the anchor &{shortened(str(event.anchor))}, which is not allowed; remove it"
    if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag is not None:
        tag = event.tag.replace("tag:yaml.org,2002:", "!!")
        return f"the tag {shortened(tag)}, none is allowed; put text in quotes and leave other values bare"
    return None


def _scalar(event: yaml.ScalarEvent) -> Value:
    if event.style is None:
        misread = _misread(event.value)
        if misread is not None:
            raise ValueError(
                f"{name_of(event.value[misread])} in text without quotes; delete it, or put the text in plain quotes"
            )
        return plain_scalar(event.value)
    # An escape such as "\0" makes a character that is refused in the text itself.
    forbidden = _FORBIDDEN.search(event.value)
    if forbidden:
        raise ValueError(f"an escape for the character {name_of(forbidden[0])}, which is not allowed")
    return event.value


def _misread(text: str) -> int | None:
    """Index of a misleading character in text without quotes: an invisible one, or a first one like a quote or dash."""
    if text and (unicodedata.category(text[0]) in ("Pi", "Pf") or text[0] in "„‚" or LOOKS_LIKE_ITEM.match(text)):
        return 0
    return next((place for place, sign in enumerate(text) if is_invisible(sign) and sign not in "\r\n"), None)


def _start(event: yaml.Event) -> tuple[int, int]:
    assert event.start_mark is not None
    return event.start_mark.line + 1, event.start_mark.column + 1
