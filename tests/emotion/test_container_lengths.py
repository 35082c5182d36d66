"""Files whose headers announce other lengths than they have: all of their sound is decoded, or they are refused."""

import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from emotion.audio.container_lengths import _ogg_checksum, contents_of
from emotion.audio.decoding import decode_blocks
from emotion.errors import DataError
from tests.emotion.sounds import decode, noise

SAMPLES = 16000  # two seconds
RATE_HZ = 8000
SOUND = noise(SAMPLES)
ID3V1 = b"TAG" + bytes(125)
ID3V2 = b"ID3\x04\x00\x00\x00\x00\x01\x00" + bytes(128)
APE_ITEM = struct.pack("<II", 4, 0) + b"Title\0Song"
APE = b"".join(
    struct.pack("<8sIIII8x", b"APETAGEX", 2000, len(APE_ITEM) + 32, 1, flags) + item
    for flags, item in ((0xA0000000, APE_ITEM), (0x80000000, b""))
)
JUNK = np.random.default_rng(1).bytes(1000)


@pytest.fixture
def encoded(tmp_path: Path) -> Callable[..., bytes]:
    """The bytes of a file with SOUND, or another sound."""

    def encode(kind: str, sound: Any = SOUND, rate_hz: int = RATE_HZ, **how: Any) -> bytes:
        path = tmp_path / "encoded"
        soundfile.write(path, sound, rate_hz, format=kind, **({"subtype": "PCM_16"} | how if kind != "OGG" else how))
        return path.read_bytes()

    return encode


@pytest.fixture
def samples_of(tmp_path: Path) -> Callable[[bytes], int]:
    def count(content: bytes) -> int:
        (tmp_path / "2.wav").write_bytes(content)
        return sum(map(len, decode_blocks(tmp_path / "2.wav", RATE_HZ)))

    return count


@pytest.fixture
def refusal_of(samples_of: Callable[[bytes], int], tmp_path: Path) -> Callable[[bytes], str]:
    def refuse(content: bytes) -> str:
        with pytest.raises(DataError) as caught:
            samples_of(content)
        assert str(caught.value).startswith(f"{tmp_path / '2.wav'}: ")
        return str(caught.value)

    return refuse


def patched(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


SIZES = {  # format → name of the chunk with the sound, place of the size behind that, its struct format, bytes it counts besides
    "WAV": (b"data", 4, "<I", 0),
    "WAVEX": (b"data", 4, "<I", 0),
    "AIFF": (b"SSND", 4, ">I", 8),
    "AU": (b".snd", 8, ">I", 0),
    "CAF": (b"data", 4, ">Q", 4),
    "W64": (b"data", 16, "<Q", 24),
    "RF64": (b"ds64", 16, "<Q", 0),
}


def announcing(kind: str, content: bytes, size: int) -> bytes:
    """The file with another size of its sound in the header."""
    name, offset, size_format, counts = SIZES[kind]
    at = content.index(name) + offset
    assert struct.unpack_from(size_format, content, at) == (2 * SAMPLES + counts,), "the premise"
    return patched(content, at, struct.pack(size_format, size))


UNKNOWN = [
    *[("WAV", size) for size in (0, 0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000, 0x80000000, 0xFFFFFFFF - 36)],
    *[("AIFF", size) for size in (0, 8, 0xFFFFFFFF, 0x7F000008)],
    *[("AU", size) for size in (0, 0xFFFFFFFF)],
    *[(kind, size) for kind in ("CAF", "W64", "RF64") for size in (0, 2**64 - 1)],
]


@pytest.mark.parametrize(("kind", "size"), UNKNOWN)
def test_a_size_that_means_unknown_is_read_to_the_end_of_the_file(
    encoded: Callable[..., bytes], samples_of: Callable[[bytes], int], kind: str, size: int
) -> None:
    content = announcing(kind, encoded(kind), size)
    for whole in (content, patched(content, 4, bytes(4)) if kind in ("WAV", "AIFF") else content):
        assert samples_of(whole) == SAMPLES


@pytest.mark.parametrize("kind", [*SIZES, "OGG"])
def test_tags_in_front_are_skipped(encoded: Callable[..., bytes], samples_of: Callable[[bytes], int], kind: str) -> None:
    content = encoded(kind)
    assert samples_of(ID3V2 + content) == samples_of(ID3V2 + ID3V2 + content) == SAMPLES
    if kind != "OGG":
        assert samples_of(ID3V2 + announcing(kind, content, 0)) == SAMPLES


def test_unknown_sizes_change_no_sample(encoded: Callable[..., bytes], tmp_path: Path) -> None:
    expected = np.rint(SOUND[:, 0] * 32767) / 32768
    for kind in SIZES:
        size = 0 if kind != "AIFF" else 8
        (tmp_path / "2.x").write_bytes(announcing(kind, encoded(kind), size))
        np.testing.assert_allclose(decode(tmp_path / "2.x", RATE_HZ), expected, atol=2 / 32768)


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("announced", [1000, SAMPLES, 2 * SAMPLES - 5000])
def test_a_header_that_announces_less_than_the_file_has_is_refused(
    encoded: Callable[..., bytes], refusal_of: Callable[[bytes], str], kind: str, announced: int
) -> None:
    content = announcing(kind, encoded(kind), announced + SIZES[kind][3])
    said = refusal_of(content)
    assert f"its header announces {announced} bytes of sound, but " in said
    assert "Write it again" in said


@pytest.mark.parametrize("kind", SIZES)
def test_a_file_that_was_cut_is_refused(encoded: Callable[..., bytes], refusal_of: Callable[[bytes], str], kind: str) -> None:
    content = encoded(kind)
    for size in (len(content) // 2, len(content) - 5000):
        assert "is cut, or its header is wrong: it announces 32000 bytes of sound" in refusal_of(content[:size])


def test_a_header_that_claims_gigabytes_over_a_kilobyte_is_refused(
    encoded: Callable[..., bytes], refusal_of: Callable[[bytes], str]
) -> None:
    for size in (0xFFFFFFF0, 4_000_000_000, 3_000_000_000, 0x40000000):
        content = announcing("WAV", encoded("WAV"), size)[: 44 + 1000]
        assert f"announces {size} bytes of sound, the file has 1000." in refusal_of(content)


@pytest.mark.parametrize("kind", [*SIZES, "FLAC"])
def test_a_second_file_behind_the_first_is_refused(
    encoded: Callable[..., bytes], refusal_of: Callable[[bytes], str], kind: str
) -> None:
    content = encoded(kind)
    said = refusal_of(content + content)
    assert ("Write it again" if kind == "AU" else "a second sound begins after") in said


def test_a_second_chunk_with_sound_is_refused(encoded: Callable[..., bytes], refusal_of: Callable[[bytes], str]) -> None:
    content = encoded("WAV")
    assert "a second sound begins" in refusal_of(content + content[36:])


def chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content


@pytest.mark.parametrize(
    "behind",
    [
        chunk(b"LIST", b"INFOISFT" + bytes(20)),
        chunk(b"LIST", bytes(4000)) + chunk(b"id3 ", ID3V2),
        chunk(b"odd ", bytes(333)) + b"\0" + chunk(b"LIST", bytes(4000)),
        chunk(b"odd ", bytes(333)) + chunk(b"LIST", bytes(4000)),  # without the byte that fills it up
        chunk(b"LIST", bytes(4000)) + b"\0" * 7,
        ID3V1,
        ID3V2 + bytes(10000),
        APE + ID3V1,
        b"\0" * 64,
        b"junk" * 15,
    ],
)
def test_metadata_and_a_few_bytes_behind_the_sound_are_no_fault_and_no_sound(
    encoded: Callable[..., bytes], samples_of: Callable[[bytes], int], behind: bytes, tmp_path: Path
) -> None:
    assert samples_of(encoded("WAV") + behind) == SAMPLES
    assert contents_of(tmp_path / "2.wav").remark == ""


def test_a_few_more_bytes_are_used_with_a_remark(
    encoded: Callable[..., bytes], samples_of: Callable[[bytes], int], tmp_path: Path
) -> None:
    assert samples_of(encoded("WAV") + JUNK) == SAMPLES
    assert contents_of(tmp_path / "2.wav").remark == "1000 bytes that are no metadata follow the sound"
    assert samples_of(encoded("WAV")[:-1000]) == SAMPLES - 500
    assert contents_of(tmp_path / "2.wav").remark == "its header announces 1000 bytes of sound more than the file has"
    # Some writers count headers that they should not.
    assert samples_of(announcing("WAV", encoded("WAV"), 2 * SAMPLES + 44)) == SAMPLES
    assert contents_of(tmp_path / "2.wav").remark == ""


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        *[(kind, {}) for kind in SIZES],
        *[("WAV", {"subtype": subtype}) for subtype in ("PCM_24", "PCM_U8", "FLOAT", "DOUBLE", "ULAW", "IMA_ADPCM", "GSM610")],
        ("WAV", {"subtype": "PCM_16", "endian": "BIG"}),
        *[("AIFF", {"subtype": subtype}) for subtype in ("PCM_24", "PCM_S8", "FLOAT", "ALAW")],
        *[("CAF", {"subtype": subtype}) for subtype in ("PCM_24", "ALAC_16")],
        ("AU", {"subtype": "PCM_16", "endian": "LITTLE"}),
        ("FLAC", {"subtype": "PCM_24"}),
        *[("OGG", {"subtype": subtype}) for subtype in ("VORBIS", "OPUS")],
    ],
)
@pytest.mark.parametrize("samples", [SAMPLES, SAMPLES - 1, 1001])
def test_every_format_is_read_as_it_is_written(
    encoded: Callable[..., bytes], samples_of: Callable[[bytes], int], tmp_path: Path, kind: str, how: Any, samples: int
) -> None:
    found = samples_of(encoded(kind, noise(samples), **how))
    # Such formats fill up their last block.
    block = {"IMA_ADPCM": 1024, "GSM610": 320, "PCM_S8": 2, "ALAW": 2}.get(how.get("subtype"), 1)
    assert samples <= found < samples + block
    assert contents_of(tmp_path / "2.wav").remark == ""


def test_an_empty_sound_is_empty_and_not_unknown(encoded: Callable[..., bytes], refusal_of: Callable[[bytes], str]) -> None:
    for kind in ("WAV", "AIFF", "AU", "W64", "RF64"):
        assert "has no samples" in refusal_of(encoded(kind, SOUND[:0]))
    assert "has no samples" in refusal_of(encoded("WAV", SOUND[:0]) + chunk(b"LIST", bytes(4000)))


def test_formats_of_which_the_length_cannot_be_verified_are_refused(
    encoded: Callable[..., bytes], refusal_of: Callable[[bytes], str]
) -> None:
    assert "is NIST, of which the length cannot be verified; convert it" in refusal_of(encoded("NIST"))


# FLAC


def flac_announcing(content: bytes, samples: int) -> bytes:
    at = content.index(b"fLaC") + 8 + 13
    return patched(content, at, bytes([content[at] & 0xF0 | samples >> 32]) + struct.pack(">I", samples & 0xFFFFFFFF))


@pytest.mark.parametrize("announced", [0, 1, SAMPLES // 2, SAMPLES - 1])
@pytest.mark.parametrize(("before", "behind"), [(b"", b""), (ID3V2, b""), (ID3V2 + ID3V2, ID3V1), (b"", APE + ID3V1)])
def test_a_flac_is_decoded_to_its_end_whatever_it_announces(
    encoded: Callable[..., bytes], samples_of: Callable[[bytes], int], announced: int, before: bytes, behind: bytes
) -> None:
    content = encoded("FLAC")
    assert samples_of(before + flac_announcing(content, announced) + behind) == SAMPLES
    assert samples_of(before + content + behind) == SAMPLES


def test_other_bytes_behind_a_flac_of_known_length_are_ignored(
    encoded: Callable[..., bytes], samples_of: Callable[[bytes], int]
) -> None:
    assert samples_of(encoded("FLAC") + JUNK) == SAMPLES
    assert samples_of(encoded("FLAC") + bytes(5000)) == SAMPLES


def test_a_flac_that_is_cut_or_damaged_is_refused(encoded: Callable[..., bytes], refusal_of: Callable[[bytes], str]) -> None:
    content = encoded("FLAC")
    for known in (content, flac_announcing(content, 0)):
        refusal_of(known[: len(known) // 2])
        refusal_of(patched(known, len(known) // 2, b"\x55\xaa\x55\xaa"))
    # The announced samples end where the next ones can be told from other bytes.
    assert "8000 samples can be decoded, the rest" not in refusal_of(flac_announcing(content, 8000) + JUNK)
    assert f"{SAMPLES} of {SAMPLES + 1} samples" in refusal_of(flac_announcing(content, SAMPLES + 1))


# Ogg


def pages(content: bytes) -> Iterator[tuple[int, int]]:
    at = 0
    while at < len(content):
        segments = content[at + 26]
        end = at + 27 + segments + sum(content[at + 27 : at + 27 + segments])
        yield at, end
        at = end


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_all_streams_of_a_chained_ogg_are_decoded(
    encoded: Callable[..., bytes], samples_of: Callable[[bytes], int], subtype: str
) -> None:
    mono = [encoded("OGG", noise(samples), subtype=subtype) for samples in (4000, 12000)]
    stereo = encoded("OGG", noise(8000, channels=2), subtype=subtype)
    assert samples_of(b"".join(mono)) == 16000
    assert samples_of(mono[0] + mono[0]) == 8000, "also with the same serial number"
    assert samples_of(mono[0] + stereo + mono[1]) == 24000
    assert samples_of(ID3V2 + b"".join(mono) + ID3V1) == 16000


def test_a_chained_ogg_of_several_rates_is_refused(encoded: Callable[..., bytes], refusal_of: Callable[[bytes], str]) -> None:
    first, second = (encoded("OGG", SOUND, rate_hz, subtype="VORBIS") for rate_hz in (8000, 16000))
    assert "changes from 8000 Hz to 16000 Hz after 2.0 s. Split the file." in refusal_of(first + second)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_an_ogg_without_an_end_mark_is_decoded_with_a_remark(
    encoded: Callable[..., bytes], samples_of: Callable[[bytes], int], subtype: str, tmp_path: Path
) -> None:
    content = encoded("OGG", noise(12 * RATE_HZ), subtype=subtype)
    at = list(pages(content))
    assert len(at) > 4, "the premise"
    ended = content[: at[-1][0]]
    samples = samples_of(ended)
    last_granule = struct.unpack_from("<q", ended, at[-2][0] + 6)[0]
    skipped, rate_hz = (
        (struct.unpack_from("<H", content, content.index(b"OpusHead") + 10)[0], 48000) if subtype == "OPUS" else (0, 8000)
    )
    assert samples == pytest.approx((last_granule - skipped) * RATE_HZ / rate_hz, abs=1)
    assert "its last page has no end mark" in contents_of(tmp_path / "2.wav").remark
    # Its writer may have been interrupted when only the mark was missing; the last page says where the sound ends within it.
    unmarked = bytearray(content)
    unmarked[at[-1][0] + 5] &= ~4
    unmarked[at[-1][0] + 22 : at[-1][0] + 26] = bytes(4)
    unmarked[at[-1][0] + 22 : at[-1][0] + 26] = _ogg_checksum(unmarked[at[-1][0] :]).to_bytes(4, "little")
    assert samples_of(bytes(unmarked)) == 12 * RATE_HZ
    # Also where another stream follows.
    assert samples_of(ended + content) == samples + 12 * RATE_HZ


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_an_ogg_that_is_cut_within_a_page_or_has_lost_one_is_refused(
    encoded: Callable[..., bytes], refusal_of: Callable[[bytes], str], subtype: str
) -> None:
    content = encoded("OGG", noise(12 * RATE_HZ), subtype=subtype)
    at = list(pages(content))
    for size in (len(content) - 1, at[-1][0] + 10, at[-2][0] + 100):
        assert "is cut: its last page is not complete" in refusal_of(content[:size])
    middle, end = at[len(at) // 2]
    assert "samples can be decoded" in refusal_of(content[:middle] + content[end:])
    assert "samples can be decoded" in refusal_of(patched(content, middle + 100, b"\x55\xaa"))


def test_one_track_of_several_in_an_ogg_is_one_stream(encoded: Callable[..., bytes], samples_of: Callable[[bytes], int]) -> None:
    """The first pages of all tracks come first, as of a video with its sound."""
    content = encoded("OGG", subtype="VORBIS")
    (_, end), *_ = pages(content)
    other = bytearray(content[:end])
    other[14:18] = b"\1\2\3\4"
    other[28 + 1 : 28 + 7] = b"theora"
    assert samples_of(content[:end] + bytes(other) + content[end:]) == SAMPLES


@pytest.mark.full
@pytest.mark.parametrize("kind", ["wav", "aiff", "au", "caf", "w64", "flac", "opus", "ogg", "rf64"])
def test_what_ffmpeg_writes_into_a_pipe_is_read_as_a_whole(
    component: Callable[[str], str], samples_of: Callable[[bytes], int], tmp_path: Path, kind: str
) -> None:
    soundfile.write(tmp_path / "a.wav", SOUND, RATE_HZ)
    how = ["-rf64", "always", "-f", "wav"] if kind == "rf64" else ["-f", kind]
    command = [component("ffmpeg"), "-v", "error", "-i", str(tmp_path / "a.wav"), *how, "-"]
    piped = subprocess.run(command, capture_output=True, check=True).stdout
    assert samples_of(piped) == pytest.approx(SAMPLES, abs=700 if kind == "ogg" else 0)
