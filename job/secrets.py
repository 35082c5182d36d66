"""Secrets of this process, and texts without them.

`scrubbed` replaces every known secret by the name of what holds it. All texts that leave the process pass it: log lines and
tracebacks, the line on standard error, attempts.jsonl, the manifest. Known are

- environment variables whose names suggest a secret, and the token files that variables in SECRET_FILES name,
- `user:password` in variables that hold URLs, such as those of proxies,
- credentials that were found elsewhere and passed to `protect`: of a profile, a helper program, a role.

Each is found in all its spellings: stripped, escaped as by repr, JSON, HTML and URLs, in base64 and hex. Text that looks like a
secret is replaced, too, even if its value is not known: userinfo and signatures in URLs, tokens of Hugging Face. A value that is
a word or name of this program, such as `training`, is not a secret: replacing it would change names of phases and metrics.
"""

import base64
import html
import json
import logging
import os
import re
import sys
import threading
import traceback
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

SECRET_VARIABLES = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_SECURITY_TOKEN",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
)
SECRET_FILES = ("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", "HF_TOKEN_PATH")
PASSWORD_NAME = re.compile(r"PASSWORD|PASSWD|PASSPHRASE", re.IGNORECASE)
SECRET_NAME = re.compile(rf"SECRET|TOKEN(?!IZER)|CREDENTIAL|{PASSWORD_NAME.pattern}|API_?KEY|(^|_)KEYS?(_|$)", re.IGNORECASE)
NO_SECRET_NAME = re.compile(
    r"_(FILE|PATH|DIR|FOLDER|NAME|USER|ARN|URL|URI|ENDPOINT|REGION|BUCKET|TYPE|TTL|EXPIRATION|PREFIX|IDS?)$", re.IGNORECASE
)
MIN_LENGTH = 8
"""Minimum length of a secret, in characters: shorter ones would match ordinary words and numbers."""
MIN_GUESSED_LENGTH = 12
"""Minimum length of values of other variables whose names suggest a secret, and of parts of a secret."""
MAX_FILE_BYTES = 1 << 16
PLAIN = re.compile(r"[+-]?[\d.,:]+|[/~.][^\n]*|[A-Za-z][A-Za-z0-9+.-]*://[^@]*")
"""Numbers, paths and URLs without a password."""
WORDS = re.compile(r"([A-Za-z]+\d{0,4}|\d{1,4})([-_./ :,]+([A-Za-z]+\d{0,4}|\d{1,4}))*")
"""Names of regions, buckets, objects: words and short numbers."""
AWS_KEY_ID = re.compile(r"A[KS]IA[A-Z0-9]{12,}")
PATTERNS = (
    (("@",), re.compile(r"(?<![A-Za-z0-9+.-])([A-Za-z][A-Za-z0-9+.-]{0,20}://)[^/?#\s\"'<>]*@"), r"\1"),
    (
        ("x-amz-",),
        re.compile(r"(?i)(\bX-Amz-(?:Signature|Credential|Security-Token)['\"]?\s*(?:=|:|%3D)\s*b?['\"]?)[^&\s\"'<>,;]+"),
        r"\1***",
    ),
    (
        ("sig=", "signature=", "token=", "awsaccesskeyid="),
        re.compile(r"(?i)([?&](?:signature|sig|token|access_token|AWSAccessKeyId)=)[^&\s\"'<>]+"),
        r"\1***",
    ),
    (("credential=", "signature="), re.compile(r"\b((?:Credential|Signature)=)[^&\s\"'<>,]+"), r"\1***"),
    (
        ("authorization",),
        re.compile(r"(?i)(\b(?:proxy-)?authorization['\"]?\s*[:=]\s*b?['\"]?(?:bearer |basic )?)[A-Za-z0-9+/=._~-]{8,}"),
        r"\1***",
    ),
    (("hf_",), re.compile(r"\bhf_[A-Za-z0-9]{20,}"), "***"),
)
"""Texts that look like secrets of unknown value: (lower-case hints, one of which such a text contains; pattern; replacement)."""

_protected: set[tuple[str, str]] = set()


def protect(name: str, value: str | None) -> None:
    """Register a secret that is not in the environment. name: its replacement in texts."""
    if value and len(value.strip()) >= MIN_LENGTH:
        _protected.add((name, value))


def scrubbed(text: str) -> str:
    """The text without secrets."""
    known = frozenset(_known())
    names = _known_spellings(known)
    text = _without_whole(_outermost(known), text)
    text = _without_beginnings(names, _known_heads(known), text)
    text = _without_whole(names, text)
    lowered = text.lower()
    for hints, pattern, replacement in PATTERNS:
        if any(hint in lowered for hint in hints):
            text = pattern.sub(replacement, text)
    return text


def _without_whole(names: Mapping[str, str], text: str) -> str:
    if any(spelling in text for spelling in names):  # quicker than a pattern in texts without secrets, which nearly all are
        longest_first = sorted(names, key=len, reverse=True)
        text = re.sub("|".join(map(re.escape, longest_first)), lambda match: f"[{names[match[0]]}]", text)
    return text


def _without_beginnings(names: Mapping[str, str], heads: Mapping[str, str], text: str) -> str:
    """The text without the beginnings of truncated secrets, as in messages that quote the beginning of a long text."""
    for head, name in heads.items():
        at = 0
        is_words = WORDS.fullmatch(head) and not re.search("[a-z][A-Z]", head)  # base64 may begin with only letters
        while not is_words and (at := text.find(head, at)) >= 0:
            left = max(_shared(text[at : at + len(spelling)], spelling) for spelling in names if spelling.startswith(head))
            text = f"{text[:at]}[{name}]{text[at + left :]}"
            at += len(name) + 2
    return text


def _shared(one: str, other: str) -> int:
    """Length of the common prefix."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def scrubbed_json(value: Any) -> Any:
    """A JSON value with every text in it scrubbed; names of keys stay."""
    if isinstance(value, dict):
        return {name: scrubbed_json(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [scrubbed_json(inner) for inner in value]
    return scrubbed(value) if isinstance(value, str) else value


def known_secret(text: str) -> str | None:
    """The name of a known secret in this text; None if there is none."""
    return next((name for spelling, name in _known_spellings(frozenset(_known())).items() if spelling in text), None)


class ScrubbingFormatter(logging.Formatter):
    """Formats log lines and their tracebacks without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return scrubbed(super().format(record))


def scrub_tracebacks() -> None:
    """Print uncaught exceptions of all threads with secrets removed."""

    def show(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
        if sys.stderr is not None:
            sys.stderr.write(scrubbed("".join(traceback.format_exception(kind, error, trace))))

    sys.excepthook = show
    threading.excepthook = lambda found: show(found.exc_type, found.exc_value, found.exc_traceback)
    if logging.lastResort is not None:  # used by libraries whose loggers are not configured
        logging.lastResort.setFormatter(ScrubbingFormatter())


def _known() -> Iterator[tuple[str, str]]:
    """(name, value) of the secrets in the environment, in the files that it names, and those passed to `protect`."""
    yield from tuple(_protected)
    yield from _secrets_of(tuple(os.environ.items()))
    for name in SECRET_FILES:
        value = _content(os.environ.get(name, ""))
        if len(value.strip()) >= MIN_LENGTH:
            yield name, value


@lru_cache(maxsize=2)
def _secrets_of(variables: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    return tuple((name, value) for name, value in secrets_of(dict(variables)) if not _is_own_name(value.strip()))


def _is_own_name(value: str) -> bool:
    """Whether the value is words that this program's sources contain: in its texts, they cannot be told from the secret."""
    if not WORDS.fullmatch(value):
        return False
    alone = re.compile(rf"(?<![A-Za-z0-9]){re.escape(value)}(?![A-Za-z0-9])")
    folder = Path(__file__).parents[1]
    sources = (path for package in ("emotion", "job") for path in (folder / package).rglob("*.py"))
    return any(alone.search(path.read_text(encoding="utf-8")) for path in sources)


def secrets_of(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(variable, secret) of the variables whose names or values suggest a secret."""
    for name, value in environment.items():
        # Up to the last @, as passwords may contain unescaped "/" and "@".
        userinfo = value.rpartition("://")[2].rpartition("@")[0] if "://" in value or _is_proxy(name) else ""
        user, colon, password = userinfo.partition(":")
        texts = {userinfo, password} if colon else {user} if not WORDS.fullmatch(user) else set()
        # Also up to a "/", where a URL with a malformed password is cut.
        secrets = texts | {urllib.parse.unquote(text) for text in texts} | {userinfo.partition("/")[0] for _ in texts}
        yield from ((name, secret) for secret in secrets if len(secret) >= MIN_LENGTH)
        if _is_secret(name, value.strip()):
            yield name, value


def _is_proxy(name: str) -> bool:
    return name.upper().endswith("_PROXY")


def _is_secret(name: str, value: str) -> bool:
    if name in SECRET_VARIABLES:
        return len(value) >= MIN_LENGTH
    if name == "AWS_ACCESS_KEY_ID":  # not a secret if it is a user name, as on some servers
        return bool(AWS_KEY_ID.fullmatch(value)) or (len(value) >= MIN_GUESSED_LENGTH and not WORDS.fullmatch(value))
    if len(value) < MIN_GUESSED_LENGTH or PLAIN.fullmatch(value) or NO_SECRET_NAME.search(name):
        return False
    if PASSWORD_NAME.search(name):
        return True
    return bool(SECRET_NAME.search(name)) and not WORDS.fullmatch(value)


def _content(path: str) -> str:
    """The text of a small regular file; empty if there is none. A pipe must not be read: its reader needs the only copy."""
    try:
        if not path or not Path(path).is_file():
            return ""
        with Path(path).open("rb") as file:
            return file.read(MAX_FILE_BYTES).decode(errors="replace")
    except (OSError, ValueError):  # a name that no file can have
        return ""


@lru_cache(maxsize=8)
def _known_spellings(known: frozenset[tuple[str, str]]) -> dict[str, str]:
    """Spelling → name of the secret."""
    return {spelling: name for name, value in sorted(known, reverse=True) for spelling in spellings(value)}


@lru_cache(maxsize=8)
def _outermost(known: frozenset[tuple[str, str]]) -> dict[str, str]:
    """Spelling → name of the secret, of spellings that no other one contains. (A secret contains its own runs of letters.)"""
    names = _known_spellings(known)
    return {one: name for one, name in names.items() if not any(one in other and one != other for other in names)}


@lru_cache(maxsize=8)
def _known_heads(known: frozenset[tuple[str, str]]) -> dict[str, str]:
    """Beginning of a long spelling → name of the secret. Outermost spellings come first: a truncated text may begin with one."""
    names, outermost = _known_spellings(known), _outermost(known)
    long = (spelling for spelling in names if len(spelling) >= 2 * MIN_GUESSED_LENGTH)
    return {one[:MIN_GUESSED_LENGTH]: names[one] for one in sorted(long, key=lambda one: one not in outermost)}


ESCAPES: tuple[Callable[[str], str], ...] = (
    lambda text: text,
    lambda text: json.dumps(text)[1:-1],
    lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    lambda text: repr(text)[1:-1],
    lambda text: ascii(text)[1:-1],
    lambda text: repr(text.encode(errors="replace"))[2:-1],
    lambda text: text.replace("'", "\\'"),
    html.escape,
    lambda text: urllib.parse.quote(text, safe="", errors="replace"),
    lambda text: urllib.parse.quote(text, errors="replace"),
    lambda text: urllib.parse.quote_plus(text, errors="replace"),
    lambda text: re.sub("%..", lambda code: code[0].lower(), urllib.parse.quote(text, safe="", errors="replace")),
)
"""Escapes that may be applied to a secret in a text: JSON, repr, HTML, URLs."""


@lru_cache(maxsize=256)
def spellings(value: str) -> frozenset[str]:
    """The texts by which a secret is recognised."""
    bare = value.strip()
    whole = {bare, bare.strip("'\""), *(line.strip() for line in value.splitlines())}
    found = {outer(inner(text)) for text in whole for inner in ESCAPES for outer in ESCAPES}
    for text in whole:
        content = text.encode(errors="replace")
        found |= {content.hex(), content.hex().upper()}
        for encoded in _in_base64(content):
            found |= {encoded, urllib.parse.quote(encoded, safe=""), encoded.translate(str.maketrans("+/", "-_"))}
    # The parts that no escape changes: they are found in any escaping, and where the secret is split at line ends.
    found |= {
        part for part in re.findall(r"[A-Za-z0-9]+", value) if not WORDS.fullmatch(part) and len(part) >= MIN_GUESSED_LENGTH
    }
    return frozenset(text for text in found if len(text) >= MIN_LENGTH and text.strip())


def _in_base64(content: bytes) -> Iterator[str]:
    """Base64 of these bytes after 0, 1 or 2 other bytes, without the characters that depend on the neighbouring bytes."""
    for before in range(3):
        encoded = base64.b64encode(b"\0" * before + content).decode()
        yield encoded[-(-8 * before // 6) : 8 * (before + len(content)) // 6]
