"""Identify files whose content does not match their name by their first bytes, for error messages."""

import re

FIRST_BYTES = 512  # as many are looked at

_SIGNATURES = [
    (
        rb"version https://git-lfs\.github\.com/spec",
        "a git-lfs pointer and not the file itself; run `git lfs pull` where it comes from",
    ),
    (rb"(/|\.\./|\.git/)*annex/objects/", "a git-annex pointer and not the file itself; run `git annex get` where it comes from"),
    (rb"\s*<(!doctype html|html|head|body)", "a web page, perhaps of a login or an error; download the file again"),
    (rb"PK\x03\x04", "an Excel workbook or another zip archive"),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Excel workbook"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ\x00|\x28\xb5\x2f\xfd", "a compressed file; unpack it"),
    (rb"%PDF-", "a PDF"),
    (rb"(?s:OggS.{24,80}\x7fFLAC)", "flac inside ogg, which cannot be decoded here; convert it to plain flac"),
    (rb"(?s:OggS.{24,80}Speex   )", "Speex inside ogg, which cannot be decoded here; convert it to flac"),
    (rb"\x1aE\xdf\xa3", "webm or Matroska, which cannot be decoded here; convert it to flac"),
    (rb"0&\xb2u\x8ef\xcf\x11", "wma, which cannot be decoded here; convert it to flac"),
    (rb"(?s:....ftyp)", "mp4 or m4a, which cannot be decoded here; convert it to flac"),
    (rb"wvpk|TTA1", "WavPack or True Audio, which cannot be decoded here; convert it to flac"),
    (rb"\xff[\xf0\xf1\xf8\xf9]", "aac, which cannot be decoded here; convert it to flac"),
    (rb"\x00+\Z", "nothing but zero bytes, as a copy that was cut off leaves them; copy the file again"),
]
SIGNATURES = [(re.compile(pattern, re.IGNORECASE), words) for pattern, words in _SIGNATURES]


def found_instead(content: bytes) -> str | None:
    """What a file is that should be a table or a song, by its first bytes; None where nothing of the kind is found."""
    return next((words for pattern, words in SIGNATURES if pattern.match(content[:FIRST_BYTES])), None)
