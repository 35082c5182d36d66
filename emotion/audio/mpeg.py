"""Duration of an mp3, counted from its frames without decoding. A check, since a decoder may stop early without an error."""

import functools
import mmap
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

# Indexed by the two bits of the version: 2.5, reserved, 2, 1.
RATES_HZ = ((11025, 12000, 8000), None, (22050, 24000, 16000), (44100, 48000, 32000))
# By layer, then indexed by the bits of the bit rate, from 1: for version 1, and for the versions with lower sample rates.
KBITS_PER_SECOND = {
    1: (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    2: (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    3: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
}
LOW_KBITS_PER_SECOND = {
    1: (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    2: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    3: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
# The beginning of a possible frame header. A long run of one byte does not match, which keeps the search linear.
LIKE_A_HEADER = re.compile(rb"\xff[\xe2-\xe7\xf2-\xf7\xfa-\xff][\x10-\xef]")
# A frame with one of these names, behind side information of some length, has no sound but describes the others.
DESCRIPTOR = re.compile(rb"Xing|Info|VBRI")
DESCRIPTOR_WITHIN_BYTES = 4 + 2 + 32 + 4
N, V = b"nV"  # each of these names has one of these bytes, which is found much faster
# Files of other formats, whose content may look like two frames in a row by chance.
OTHER_FORMATS = (b"RIFF", b"RIFX", b"RF64", b"FORM", b"riff", b"caff", b".snd", b"fLaC", b"OggS")


@dataclass(frozen=True)
class MpegScan:
    frames_seconds: float  # of all frames; a decoder may correctly return some 2,300 samples less, an encoder's padding
    announced_seconds: float | None  # according to a Xing, Info or VBRI header in the first frame


def scan_mpeg(path: Path) -> MpegScan | None:
    """Add up the frames of an mp3 (or of layer I or II) by their headers; None if there are no frames.

    A frame counts if it is complete and the one directly before or behind it has the same version, layer and sample rate.
    Other bytes are skipped. Accepts any bytes, in time linear in their number. Raises OSError for an unreadable file.
    """
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return None  # an empty file cannot be mapped
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            first = end_of_id3v2(data)
            return None if data[first : first + 4] in OTHER_FORMATS else _scan(data)


class _Frame(NamedTuple):
    length_bytes: int
    samples: int
    rate_hz: int  # implies the version
    layer: int

    def is_like(self, other: "_Frame | None") -> bool:
        return other is not None and (self.rate_hz, self.layer) == (other.rate_hz, other.layer)


def _scan(data: mmap.mmap) -> MpegScan | None:
    seconds = 0.0
    announced: float | None = None
    before: _Frame | None = None
    found_any = False
    at = 0
    while True:
        if frame := _confirmed_frame_at(data, at, before):
            descriptor = DESCRIPTOR.search(data, at, at + DESCRIPTOR_WITHIN_BYTES)
            if descriptor is None:
                seconds += frame.samples / frame.rate_hz
            elif not found_any:
                announced = _announced_seconds(data, descriptor.start(), frame)
            found_any = True
            before = frame
            frames, at = _plain_frames(data, at + frame.length_bytes, frame)
            seconds += frames * frame.samples / frame.rate_hz
        elif tag_bytes := _tag_bytes_at(data, at):
            at += tag_bytes
        elif candidate := LIKE_A_HEADER.search(data, at + 1):
            before = None
            at = candidate.start()
        else:
            return MpegScan(seconds, announced) if found_any else None


def _plain_frames(data: mmap.mmap, at: int, before: _Frame) -> tuple[int, int]:
    """How many complete frames like the one before, and no descriptors, follow each other from here on, and where they end.

    They are nearly all of a file: a loop without calls counts them in a third of the time that the others take.
    """
    lengths: dict[bytes, int] = {}  # of frames with this header; 0 for one that is not like the frame before
    frames, size = 0, len(data)
    while True:
        start = data[at : at + DESCRIPTOR_WITHIN_BYTES]
        header = start[:4]
        length = lengths.get(header)
        if length is None:
            frame = _frame_at(data, at)
            length = lengths[header] = frame.length_bytes if frame is not None and frame.is_like(before) else 0
        if length == 0 or at + length > size or ((N in start or V in start) and DESCRIPTOR.search(start)):
            return frames, at
        frames += 1
        at += length


def _confirmed_frame_at(data: mmap.mmap, at: int, before: _Frame | None) -> _Frame | None:
    """The complete frame that begins here, if one of its neighbours is like it."""
    frame = _frame_at(data, at)
    if frame is None or at + frame.length_bytes > len(data):
        return None
    return frame if frame.is_like(before) or frame.is_like(_frame_at(data, at + frame.length_bytes)) else None


def _frame_at(data: mmap.mmap, at: int) -> _Frame | None:
    return _frame(*struct.unpack_from(">I", data, at)) if at + 4 <= len(data) else None


@functools.lru_cache(4096)
def _frame(header: int) -> _Frame | None:
    """The frame with this header of 32 bits, None for none. A free bit rate is refused, since the length would be a guess.

    Source: ISO/IEC 11172-3 and 13818-3, section 2.4.2.3; version 2.5, which is in neither, is like 2.
    """
    version, layer = header >> 19 & 3, 4 - (header >> 17 & 3)
    rate_index, kbits_index, padding = header >> 10 & 3, header >> 12 & 15, header >> 9 & 1
    rates_hz, is_low = RATES_HZ[version], version != 3
    if header >> 21 != 0x7FF or rates_hz is None or layer == 4 or rate_index == 3 or kbits_index in (0, 15):
        return None
    rate_hz = rates_hz[rate_index]
    kbits = (LOW_KBITS_PER_SECOND if is_low else KBITS_PER_SECOND)[layer][kbits_index - 1]
    if layer == 1:
        return _Frame((12 * 1000 * kbits // rate_hz + padding) * 4, 384, rate_hz, layer)
    samples = 576 if layer == 3 and is_low else 1152
    return _Frame(samples // 8 * 1000 * kbits // rate_hz + padding, samples, rate_hz, layer)


def _announced_seconds(data: mmap.mmap, tag_at: int, frame: _Frame) -> float | None:
    """Source: Xing's and Fraunhofer's own descriptions of their headers; no standard has them."""
    if data[tag_at : tag_at + 4] == b"VBRI":
        count_at = tag_at + 14
    elif int.from_bytes(data[tag_at + 4 : tag_at + 8], "big") & 1:
        count_at = tag_at + 8
    else:
        return None
    return int.from_bytes(data[count_at : count_at + 4], "big") * frame.samples / frame.rate_hz


def end_of_id3v2(data: mmap.mmap) -> int:
    """Where the ID3v2 tags at the beginning of a file end; 0 if it has none."""
    at = 0
    while tag_bytes := _tag_bytes_at(data, at):
        at += tag_bytes
    return at


def _tag_bytes_at(data: mmap.mmap, at: int) -> int:
    """The length of the ID3v2 tag that begins here; 0 if none does, or if it would end behind the end of the file.

    Source: id3.org, ID3v2.4, section 3.1.
    """
    start = data[at : at + 10]
    if len(start) < 10 or start[:3] != b"ID3" or 0xFF in start[3:5] or max(start[6:]) >= 0x80:
        return 0
    content = start[6] << 21 | start[7] << 14 | start[8] << 7 | start[9]
    length = 10 + content + (10 if start[5] & 0x10 else 0)
    return length if at + length <= len(data) else 0
