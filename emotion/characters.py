"""Find invisible and look-alike Unicode characters in user input and name them in messages."""

import re
import unicodedata

from emotion.errors import printable

# Controls have no names in Unicode's database.
CONTROLS = {0: "NULL", 9: "TAB", 10: "LINE FEED", 13: "CARRIAGE RETURN", 27: "ESCAPE", 127: "DELETE", 133: "NEXT LINE"}
# Fillers, joiners and blanks. Unicode classifies them as letters, marks or symbols, so str.isprintable() is true for them.
UNSEEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u2800\u3164\uffa0]")
VARIATION_SELECTOR = re.compile("[\ufe00-\ufe0f\U000e0100-\U000e01ef]")  # visible after an emoji only
QUOTES_AND_MINUS = "„‚‟‛′″−"  # the other quotes and dashes have Unicode categories of their own


def name_of(sign: str) -> str:
    """A character's code point and name, such as U+00A0 (NO-BREAK SPACE)."""
    name = unicodedata.name(sign, "") or CONTROLS.get(ord(sign), "a control character" if ord(sign) < 160 else "")
    return f"U+{ord(sign):04X}" + (f" ({name})" if name else "")


def is_invisible(sign: str) -> bool:
    """Whether a character is invisible: controls, tabs, marks of direction and width, every blank but the ASCII space."""
    return not sign.isprintable() or bool(UNSEEN.match(sign))


def is_deceptive(sign: str) -> bool:
    """Whether a character is invisible or looks like an ASCII one: quotes, dashes, colons, digits of other scripts."""
    if sign.isascii():
        return is_invisible(sign)
    return (
        is_invisible(sign)
        or unicodedata.category(sign) in ("Pi", "Pf", "Pd", "Nd")
        or sign in QUOTES_AND_MINUS
        or bool(VARIATION_SELECTOR.match(sign))
        or unicodedata.normalize("NFKC", sign).isascii()
    )


def with_names(text: str, quoted: str) -> str:
    """`quoted` followed by the names of up to three deceptive characters in `text`. quoted: `text` as a message shows it."""
    names = list(dict.fromkeys(name_of(sign) for sign in text if is_deceptive(sign)))[:3]
    return f"{quoted} with {' and '.join(names)}" if names else quoted


def quoted(text: str) -> str:
    """Text as a message quotes it: its repr, cut to 60 characters, with the names of its deceptive characters."""
    piece = text if len(text) <= 60 else f"{text[:57]}…"
    return with_names(piece, repr(piece))


def terminal_text(text: object) -> str:
    """Text that is safe to print: tabs and line feeds stay, every other unprintable character is escaped.

    File names, table cells, server responses and library exceptions may contain terminal escape sequences.
    """
    return re.sub(r"[^\n\t]+", lambda piece: printable(piece[0]), str(text))


def problem_of_path(text: str) -> str | None:
    """Why a path cannot be used in messages, logs and JSON; None if it can."""
    if not text:
        return "is empty"
    if not is_utf8(text):
        return "is not UTF-8"
    if any(unicodedata.category(character) == "Cc" for character in text):
        return "has a control character or a line end in it"
    return None


def is_utf8(text: str) -> bool:
    """Whether a text from the system, such as a path, was valid UTF-8. Python decodes invalid bytes as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
