"""Find where the sounds of a wav, aiff, flac, ogg … file begin and end, from its container. A check, as decoders trust headers.

libsndfile decodes as many samples as a header announces, however many follow; it reduces what is announced to what is there; and
it ends at the end of the first of several Ogg streams. None of these is an error to it. So sizes are compared with the file here.
"""

import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from emotion.audio.mpeg import end_of_id3v2
from emotion.errors import DataError

TAGS = (b"TAG", b"ID3", b"APETAGEX", b"LYRICSBEGIN")  # beginnings of tags that programs append to any file
SECOND_FILES = (b"RIFF", b"RIFX", b"RF64", b"FORM", b"riff", b"caff", b"fLaC")
MOST_UNEXPLAINED_BYTES = 4096  # missing, or no chunk: used with a remark, if they are not more than an eighth of the sound
WRONG_BY_A_HEADER_BYTES = 64  # not worth a remark: writers count headers that they should not
OGG_FIRST_PAGE, OGG_LAST_PAGE = 2, 4  # flags
WAVE64_NAME_END = bytes.fromhex("f3acd3118cd100c04f8edb8a")


@dataclass(frozen=True)
class Part:
    """The bytes of one sound: from `start` to `end`, with other bytes than the file has at the places `replaced`."""

    start: int
    end: int
    replaced: dict[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Contents:
    """The sounds that a file consists of: one, or each stream of a chained Ogg file.

    announced_samples: of a flac whose header has a length, which `replaced` hides, so that all samples are decoded. remark: why a
    little of the sound may be missing; empty if there is no reason to think so.
    """

    parts: tuple[Part, ...]
    announced_samples: int = 0
    remark: str = ""


class _Layout(NamedTuple):
    """How a format stores chunks: the struct format of a chunk's name and size; where the first is; whether sizes include this
    header; to what chunks are aligned; the name of the chunk with the sound, and what precedes the samples in it."""

    header: str
    first: int
    size_includes_header: bool
    align: int
    sound: bytes
    before_samples: int


LAYOUTS = {
    b"RIFF": _Layout("<4sI", 12, False, 2, b"data", 0),
    b"RIFX": _Layout(">4sI", 12, False, 2, b"data", 0),
    b"RF64": _Layout("<4sI", 12, False, 2, b"data", 0),
    b"FORM": _Layout(">4sI", 12, False, 2, b"SSND", 8),
    b"riff": _Layout("<16sQ", 40, True, 8, b"data" + WAVE64_NAME_END, 0),
    b"caff": _Layout(">4sQ", 8, False, 1, b"data", 4),
}


class _Chunk(NamedTuple):
    name: bytes
    at: int  # of its content
    size: int  # of its content
    next_at: int


class _Sound(NamedTuple):
    """The samples of a file that is not compressed in frames: where they are, how many bytes the header announces, and where and
    how it does. size_counts: bytes that this size counts besides the samples."""

    at: int
    announced: int
    size_at: int
    size_format: str
    size_counts: int


def contents_of(path: Path) -> Contents:
    """The sounds of a file; of any other format, such as mp3, one from its beginning to its end.

    Sizes that mean "unknown", of a writer that could not seek back, are replaced by the true ones. Raises DataError where a
    header announces clearly less or more than the file holds, the file was cut, or a second one follows. Raises OSError.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            return Contents((Part(0, 0),))  # an empty file cannot be mapped
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            # From behind a tag: of several tags, libsndfile skips the first only.
            whole = Part(end_of_id3v2(data), size)
            magic = data[whole.start : whole.start + 4]
            if magic == b"fLaC":
                return _flac(path, data, whole)
            if magic == b"OggS":
                return _ogg(path, data, whole)
            if magic == b".snd" and size >= whole.start + 24:
                header_bytes, announced = struct.unpack_from(">II", data, whole.start + 4)
                return _checked(path, data, whole, _Sound(whole.start + header_bytes, announced, whole.start + 8, ">I", 0), None)
            if magic in LAYOUTS and (sound := _find_sound(data, whole.start, LAYOUTS[magic])):
                return _checked(path, data, whole, sound, LAYOUTS[magic])
            return Contents((Part(0, size),))


def _find_sound(data: mmap.mmap, first: int, layout: _Layout) -> _Sound | None:
    size_format = layout.header[0] + layout.header[-1]
    long_size_at = None
    for chunk in _chunks(data, first + layout.first, layout):
        if chunk.name == b"ds64":
            long_size_at = chunk.at + 8  # RF64 has its 64-bit sizes in a chunk of their own
        if chunk.name == layout.sound:
            counts = layout.before_samples + (struct.calcsize(layout.header) if layout.size_includes_header else 0)
            at = chunk.at + layout.before_samples
            size_at = chunk.at - struct.calcsize(size_format)
            (size,) = struct.unpack_from(size_format, data, size_at)
            if size == 0xFFFFFFFF and long_size_at is not None:
                size_at, size_format = long_size_at, "<Q"
                (size,) = struct.unpack_from(size_format, data, size_at)
            elif at + size - first - 8 == 0xFFFFFFFF:
                size = 0xFFFFFFFF  # the size of the whole file is "unknown", and the writer subtracted the headers
            return _Sound(at, size - counts, size_at, size_format, counts)
    return None


def _chunks(data: mmap.mmap, at: int, layout: _Layout) -> Iterator[_Chunk]:
    """The chunks from `at` to the first bytes that are none, or to one that ends behind the end of the file."""
    while chunk := _chunk_at(data, at, layout):
        yield chunk
        at = chunk.next_at
        # Some writers omit the byte that fills up an odd chunk.
        if layout.align == 2 and chunk.size % 2 and _chunk_at(data, at - 1, layout) and not _chunk_at(data, at, layout):
            at -= 1


def _chunk_at(data: mmap.mmap, at: int, layout: _Layout) -> _Chunk | None:
    header_bytes = struct.calcsize(layout.header)
    if at + header_bytes > len(data):
        return None
    name, size = struct.unpack_from(layout.header, data, at)
    if not all(0x20 <= sign < 0x7F for sign in name[:4]):
        return None
    if layout.size_includes_header:
        size = max(size - header_bytes, 0)
    content = at + header_bytes
    return _Chunk(name, content, size, content + size + -size % layout.align)


def _checked(path: Path, data: mmap.mmap, whole: Part, sound: _Sound, layout: _Layout | None) -> Contents:
    """Compare what a header announces with what the file holds. layout: None if no chunks may follow."""
    found = len(data) - sound.at
    if _is_unknown(sound):
        if found <= 0 or (layout and sound.announced <= 0 and not _unexplained_bytes(path, data, sound, layout)):
            return Contents((whole,))  # there is no sound
        longest = 2 ** (8 * struct.calcsize(sound.size_format)) - 1
        size = struct.pack(sound.size_format, min(found + sound.size_counts, longest))
        return Contents((Part(whole.start, whole.end, {sound.size_at: size}),))
    allowed = min(MOST_UNEXPLAINED_BYTES, sound.announced // 8)
    missing = sound.announced - found
    if missing > allowed:
        raise DataError(
            f"{path}: is cut, or its header is wrong: it announces {sound.announced} bytes of sound, "
            f"the file has {max(found, 0)}. Replace the file."
        )
    if missing > WRONG_BY_A_HEADER_BYTES:
        return Contents((whole,), remark=f"its header announces {missing} bytes of sound more than the file has")
    behind = _unexplained_bytes(path, data, sound, layout) if missing < 0 else 0
    if behind > allowed:
        raise DataError(
            f"{path}: its header announces {sound.announced} bytes of sound, but {behind} bytes that are no metadata follow. The "
            "header is wrong, or the file was larger than its format allows. Write it again as flac, w64 or rf64."
        )
    return Contents(
        (whole,), remark=f"{behind} bytes that are no metadata follow the sound" if behind > WRONG_BY_A_HEADER_BYTES else ""
    )


def _is_unknown(sound: _Sound) -> bool:
    """Sizes that programs write into a pipe: 0, the largest number with or without a sign, a round one below (sox, arecord)."""
    size = sound.announced + sound.size_counts
    if struct.calcsize(sound.size_format) == 8:
        return sound.announced <= 0 or size >= 1 << 62
    return sound.announced <= 0 or size == 0xFFFFFFFF or 0x7F000000 <= size <= 0x80000008


def _unexplained_bytes(path: Path, data: mmap.mmap, sound: _Sound, layout: _Layout | None) -> int:
    """How many bytes behind the sound are neither chunks nor a tag. Raises DataError where another sound begins."""
    announced = max(sound.announced, 0)
    at = sound.at + announced
    if layout:
        filled = at + -announced % layout.align
        if _chunk_at(data, filled, layout) or not _chunk_at(data, at, layout):
            at = filled  # else the byte that fills up an odd chunk is missing
        for chunk in _chunks(data, at, layout):
            if chunk.name[:4] in SECOND_FILES or chunk.name == layout.sound:
                raise DataError(f"{path}: a second sound begins after {at} bytes and would not be used. Split the file.")
            if data[at : at + 16].startswith(TAGS) or chunk.at + chunk.size > len(data):
                break
            at = chunk.next_at
    return 0 if data[at : at + 16].startswith(TAGS) else max(len(data) - at, 0)


def _flac(path: Path, data: mmap.mmap, whole: Part) -> Contents:
    """Hide the length that the header announces, and tags behind the sound, which the decoder would take for damage.

    Source: RFC 9639, sections 8.1 and 8.2.
    """
    second = data.find(b"fLaC", whole.start + 4)
    while second >= 0 and data[second + 4 : second + 8] not in (b"\0\0\0\x22", b"\x80\0\0\x22"):
        second = data.find(b"fLaC", second + 1)
    if second >= 0:
        raise DataError(f"{path}: a second sound begins after {second} bytes and would not be used. Split the file.")
    at = whole.start + 8 + 13  # of the length, 36 bits: the first four share a byte
    if len(data) < at + 5:
        return Contents((whole,))
    announced = int.from_bytes(data[at : at + 5], "big") & 0xFFFFFFFFF
    hidden = {at: bytes([data[at] & 0xF0, 0, 0, 0, 0])}
    return Contents((Part(whole.start, _end_before_tags(data), hidden),), announced_samples=announced)


def _end_before_tags(data: mmap.mmap) -> int:
    """Where the ID3v1 and APEv2 tags at the end of a file begin. Source: wiki.hydrogenaud.io, APE Tags Footer."""
    end = len(data)
    while True:
        if data[max(end - 128, 0) : end].startswith(b"TAG"):
            end -= 128
        elif data[max(end - 32, 0) : end].startswith(b"APETAGEX"):
            size, _, flags = struct.unpack_from("<III", data, end - 32 + 12)
            size += 32 if flags >> 31 else 0  # its header is not counted
            if not 32 <= size <= end:
                return end
            end -= size
        else:
            return end


class _Page(NamedTuple):
    at: int
    end: int
    flags: int


def _ogg(path: Path, data: mmap.mmap, whole: Part) -> Contents:
    """A part for each of the chained streams. The last page of a stream gets an end mark if it has none.

    A stream begins where a first page follows other pages; several first pages in a row begin one of several tracks.
    """
    parts: list[Part] = []
    without_mark = 0
    start, before = whole.start, None
    for page in [*_ogg_pages(path, data, whole.start), None]:
        if before and (page is None or page.flags & OGG_FIRST_PAGE > before.flags & OGG_FIRST_PAGE):
            is_marked = before.flags & OGG_LAST_PAGE
            parts.append(Part(start, before.end, {} if is_marked else _end_mark(data, before)))
            without_mark += not is_marked
            start = before.end
        before = page
    if len(parts) <= 1 and not without_mark:
        return Contents((whole,))
    remark = "its last page has no end mark: its writer was interrupted, or the file is cut" if without_mark else ""
    return Contents(tuple(parts), remark=remark)


def _end_mark(data: mmap.mmap, page: _Page) -> dict[int, bytes]:
    """What to replace in a page of Ogg to make it the last one of its stream: a flag and the checksum."""
    content = bytearray(data[page.at : page.end])
    content[5] |= OGG_LAST_PAGE
    content[22:26] = bytes(4)
    return {page.at + 5: bytes(content[5:6]), page.at + 22: _ogg_checksum(content).to_bytes(4, "little")}


def _ogg_pages(path: Path, data: mmap.mmap, at: int) -> Iterator[_Page]:
    """Source: RFC 3533, section 6. Raises DataError where the last page is not complete."""
    while 0 <= at < len(data):
        segments_at = at + 27
        segments = data[at + 26] if len(data) > at + 26 else 256
        end = segments_at + segments + sum(data[segments_at : segments_at + segments])
        if segments_at + segments > len(data) or end > len(data):
            raise DataError(f"{path}: is cut: its last page is not complete. Replace the file.")
        yield _Page(at, end, data[at + 5])
        # Other bytes between pages are skipped, as by the decoder.
        at = data.find(b"OggS\0", end)


def _ogg_checksum(page: bytearray) -> int:
    """CRC-32 with the polynomial 04C11DB7, neither reflected nor inverted."""
    checksum = 0
    for byte in page:
        checksum ^= byte << 24
        for _ in range(8):
            checksum = (checksum << 1 ^ (0x04C11DB7 if checksum & 1 << 31 else 0)) & 0xFFFFFFFF
    return checksum
