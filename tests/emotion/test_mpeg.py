"""Counting mp3 frames, against the standard's formulas, against lengths known from the encoder, and with damage."""

import csv
import itertools
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emotion.audio.mpeg import MpegScan, scan_mpeg

ENCODER_SAMPLES = 2304  # LAME puts 576 samples before the sound and fills up the last frame with 576 or more
FEW_KBITS = [8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160]
KBITS = {
    ("1", 1): list(range(32, 449, 32)),
    ("1", 2): [32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384],
    ("1", 3): [32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320],
    ("2", 1): [32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256],
    ("2", 2): FEW_KBITS,
    ("2", 3): FEW_KBITS,
    ("2.5", 3): FEW_KBITS,
}
RATES_HZ = {"1": [44100, 48000, 32000], "2": [22050, 24000, 16000], "2.5": [11025, 12000, 8000]}
VERSION_BITS = {"1": 3, "2": 2, "2.5": 0}
PLAIN_BYTES, PLAIN_SECONDS = 417, 1152 / 44100


def header(version: str, layer: int, kbits: int, rate_hz: int, padding: int = 0, mono: bool = False) -> bytes:
    kbits_index, rate_index = KBITS[version, layer].index(kbits) + 1, RATES_HZ[version].index(rate_hz)
    bits = 0x7FF << 21 | VERSION_BITS[version] << 19 | (4 - layer) << 17 | 1 << 16
    return struct.pack(">I", bits | kbits_index << 12 | rate_index << 10 | padding << 9 | (0xC0 if mono else 0))


def silent_frame(version: str, layer: int, kbits: int, rate_hz: int, padding: int = 0, mono: bool = False) -> bytes:
    """A frame of nothing but zeros behind its header, which is silence."""
    if layer == 1:
        length = 4 * (12 * kbits * 1000 // rate_hz + padding)
    else:
        length = (72 if layer == 3 and version != "1" else 144) * kbits * 1000 // rate_hz + padding
    return header(version, layer, kbits, rate_hz, padding, mono).ljust(length, b"\0")


PLAIN = silent_frame("1", 3, 128, 44100)


def scan(tmp_path: Path, content: bytes) -> MpegScan | None:
    path = tmp_path / "a.mp3"
    path.write_bytes(content)
    return scan_mpeg(path)


def frames_seconds(tmp_path: Path, content: bytes) -> float:
    found = scan(tmp_path, content)
    assert found is not None
    return found.frames_seconds


def plain_frames(tmp_path: Path, content: bytes) -> float:
    """How many frames like PLAIN were found."""
    return round(frames_seconds(tmp_path, content) / PLAIN_SECONDS, 6)


def random_bytes(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def mp3(folder: Path, seconds: float, rate_hz: int = 44100, channels: int = 2, mode: str = "CONSTANT") -> bytes:
    """Noise of changing loudness, so that a variable bit rate varies."""
    random = np.random.default_rng(int(rate_hz + channels))
    samples = int(seconds * rate_hz)
    sound = random.uniform(-0.3, 0.3, (samples, channels)) * np.sin(np.linspace(0, 9, samples))[:, None] ** 2
    path = folder / "made.mp3"
    soundfile.write(path, sound, rate_hz, format="MP3", bitrate_mode=mode, compression_level=0.5)
    return path.read_bytes()


@pytest.fixture(scope="module")
def three_seconds(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return mp3(tmp_path_factory.mktemp("mp3"), 3)


def id3v2(content: bytes, flags: int = 0) -> bytes:
    size = len(content)
    sizes = bytes([size >> 21 & 127, size >> 14 & 127, size >> 7 & 127, size & 127])
    footer = b"3DI\x04\0" + bytes([flags]) + sizes if flags & 0x10 else b""
    return b"ID3\x04\0" + bytes([flags]) + sizes + content + footer


# frames


@pytest.mark.parametrize(("version", "layer"), KBITS)
def test_frames_of_every_kind_last_as_long_as_a_decoder_says(tmp_path: Path, version: str, layer: int) -> None:
    samples = 384 if layer == 1 else 576 if layer == 3 and version != "1" else 1152
    for kbits, rate_hz in itertools.product(KBITS[version, layer], RATES_HZ[version]):
        frame = silent_frame(version, layer, kbits, rate_hz)
        padded = silent_frame(version, layer, kbits, rate_hz, padding=1)
        content = b"\0" + frame + 7 * (padded + frame)
        assert frames_seconds(tmp_path, content) == pytest.approx(15 * samples / rate_hz), (kbits, rate_hz)
        if kbits in KBITS[version, layer][::6]:
            content = 40 * frame
            assert frames_seconds(tmp_path, content) == pytest.approx(40 * samples / rate_hz), (kbits, rate_hz)
            assert soundfile.info(tmp_path / "a.mp3").samplerate == rate_hz
            assert len(soundfile.read(tmp_path / "a.mp3")[0]) == 40 * samples, (kbits, rate_hz)


def test_reserved_values_and_a_free_bit_rate_are_not_frames(tmp_path: Path) -> None:
    good = int.from_bytes(PLAIN[:4], "big")
    version_reserved = good & ~(3 << 19) | 1 << 19
    layer_reserved = good & ~(3 << 17)
    kbits_free, kbits_bad, rate_reserved = good & ~(15 << 12), good | 15 << 12, good | 3 << 10
    for bits in (version_reserved, layer_reserved, kbits_free, kbits_bad, rate_reserved, good & ~(1 << 31)):
        for length in (PLAIN_BYTES, 1044):
            assert scan(tmp_path, 50 * struct.pack(">I", bits).ljust(length, b"\0")) is None, hex(bits)
    assert plain_frames(tmp_path, 50 * PLAIN) == 50


def test_a_single_frame_does_not_count_and_two_do(tmp_path: Path) -> None:
    assert scan(tmp_path, PLAIN) is None
    assert plain_frames(tmp_path, 2 * PLAIN) == 2


def test_a_neighbour_of_another_version_layer_or_rate_does_not_confirm_a_frame(tmp_path: Path) -> None:
    for other in (("2", 3, 128, 22050), ("1", 2, 128, 44100), ("1", 3, 128, 48000)):
        assert scan(tmp_path, PLAIN + silent_frame(*other)) is None
    assert plain_frames(tmp_path, PLAIN + silent_frame("1", 3, 32, 44100, mono=True)) == 2


def test_a_header_between_other_bytes_does_not_count(tmp_path: Path) -> None:
    assert plain_frames(tmp_path, 10 * PLAIN + b"\0" + PLAIN + bytes(999)) == 10


def test_a_last_frame_that_is_cut_off_does_not_count(tmp_path: Path) -> None:
    assert plain_frames(tmp_path, (10 * PLAIN)[:-1]) == 9
    assert plain_frames(tmp_path, 9 * PLAIN + PLAIN[:4]) == 9
    assert plain_frames(tmp_path, 9 * PLAIN + PLAIN[:2]) == 9


# announced lengths


@pytest.mark.parametrize(("version", "mono", "side_bytes"), [("1", False, 32), ("1", True, 17), ("2", False, 17), ("2", True, 9)])
@pytest.mark.parametrize("name", [b"Xing", b"Info"])
def test_a_xing_header_announces_frames_and_is_not_counted(
    tmp_path: Path, version: str, mono: bool, side_bytes: int, name: bytes
) -> None:
    rate_hz, samples = RATES_HZ[version][0], 1152 if version == "1" else 576
    frame = silent_frame(version, 3, 128, rate_hz, mono=mono)
    for flags, count, announced in [(1, 999, 999 * samples / rate_hz), (15, 7, 7 * samples / rate_hz), (14, 7, None)]:
        tag = frame[:4] + bytes(side_bytes) + name + struct.pack(">II", flags, count)
        found = scan(tmp_path, tag.ljust(len(frame), b"\0") + 10 * frame)
        assert found == MpegScan(pytest.approx(10 * samples / rate_hz), announced and pytest.approx(announced))


def test_a_vbri_header_announces_frames_and_is_not_counted(tmp_path: Path) -> None:
    tag = PLAIN[:4] + bytes(32) + b"VBRI" + struct.pack(">HHHII", 1, 0, 75, 8192, 8509)
    found = scan(tmp_path, tag.ljust(PLAIN_BYTES, b"\0") + 10 * PLAIN)
    assert found == MpegScan(pytest.approx(10 * PLAIN_SECONDS), pytest.approx(8509 * PLAIN_SECONDS))


def test_without_a_header_nothing_is_announced(tmp_path: Path) -> None:
    assert scan(tmp_path, 10 * PLAIN) == MpegScan(pytest.approx(10 * PLAIN_SECONDS), None)
    by_chance = PLAIN[:100] + b"Xing" + PLAIN[104:]
    assert scan(tmp_path, 10 * by_chance) == MpegScan(pytest.approx(10 * PLAIN_SECONDS), None)


# whole files


@pytest.mark.parametrize("mode", ["CONSTANT", "AVERAGE", "VARIABLE"])
@pytest.mark.parametrize(("rate_hz", "channels"), [(44100, 2), (48000, 1), (32000, 2), (22050, 1), (16000, 2), (8000, 1)])
def test_an_mp3_lasts_as_long_as_the_encoded_sound(tmp_path: Path, rate_hz: int, channels: int, mode: str) -> None:
    found = scan(tmp_path, mp3(tmp_path, 2.5, rate_hz, channels, mode))
    assert found is not None
    assert 0 < found.frames_seconds - 2.5 <= ENCODER_SAMPLES / rate_hz
    assert found.announced_seconds == pytest.approx(found.frames_seconds)


def test_tags_are_not_counted(tmp_path: Path, three_seconds: bytes) -> None:
    whole = frames_seconds(tmp_path, three_seconds)
    as_if_sound = 5 * PLAIN  # the content of a tag must be skipped
    id3v1 = b"TAG" + bytes(125)
    ape = b"APETAGEX" + struct.pack("<IIII", 2000, 32, 1, 0xA0000000) + bytes(8) + random_bytes(2000)
    lyrics = b"LYRICSBEGIN" + b"la " * 99 + b"000306LYRICS200"
    for content in (
        id3v2(as_if_sound) + three_seconds,
        id3v2(as_if_sound, flags=0x10) + id3v2(b"") + id3v2(random_bytes(300_000)) + three_seconds,
        three_seconds + id3v1,
        three_seconds + id3v2(as_if_sound),
        three_seconds + ape + lyrics + id3v1,
    ):
        assert frames_seconds(tmp_path, content) == pytest.approx(whole)


def test_an_id3v2_tag_between_frames_is_skipped(tmp_path: Path) -> None:
    for flags in (0, 0x10):
        tag = id3v2(7 * PLAIN + bytes(200_000), flags)
        assert plain_frames(tmp_path, 10 * PLAIN + tag + 10 * PLAIN) == 20
        assert plain_frames(tmp_path, 10 * PLAIN + tag + PLAIN) == 11


def test_an_id3v2_tag_longer_than_the_file_is_ignored(tmp_path: Path) -> None:
    assert plain_frames(tmp_path, b"ID3\x04\0\0\x7f\x7f\x7f\x7f" + 10 * PLAIN) == 10
    assert plain_frames(tmp_path, b"ID3\x04\0\0\0\0\0\x80" + 10 * PLAIN) == 10, "no size has this bit"


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "AIFF"])
def test_other_audio_formats_have_no_mpeg_frames(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.mp3"
    soundfile.write(path, np.random.default_rng(0).uniform(-1, 1, 20000), 44100, format=kind)
    assert scan_mpeg(path) is None
    assert scan(tmp_path, path.read_bytes()[:16] + 10 * PLAIN) is None, "not even by chance"


@pytest.mark.parametrize("content", [b"", b"\xff", b"\xff\xfb\x90", b"<!DOCTYPE html><p>404", b"ID3", id3v2(bytes(99))])
def test_other_files_have_no_frames(tmp_path: Path, content: bytes) -> None:
    assert scan(tmp_path, content) is None


# damaged files


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_a_cut_mp3_lasts_as_long_as_its_remaining_frames(tmp_path: Path, mode: str) -> None:
    whole = mp3(tmp_path, 4, mode=mode)
    found = scan(tmp_path, whole[: len(whole) * 6 // 10])
    assert found is not None
    assert found.announced_seconds == pytest.approx(4, abs=0.06)
    # A decoder trims 1105 samples at the beginning and may make the most of a torn last frame.
    decoded = len(soundfile.read(tmp_path / "a.mp3")[0]) / 44100
    assert found.frames_seconds == pytest.approx(decoded + 1105 / 44100, abs=1.01 * PLAIN_SECONDS)


@pytest.mark.parametrize("size", [1, 1000, 10_000, 100_000])
@pytest.mark.parametrize("garbage", [bytes, random_bytes, lambda size: b"\xff" * size])
def test_other_bytes_in_the_middle_cost_the_frames_whose_headers_they_hit(
    tmp_path: Path, size: int, garbage: Callable[[int], bytes]
) -> None:
    sound, at = 500 * PLAIN, 250 * PLAIN_BYTES + 100
    inserted = sound[:at] + garbage(size) + sound[at:]
    # A torn frame counts, by its header.
    assert plain_frames(tmp_path, inserted) == 500
    overwritten = sound[:at] + garbage(size) + sound[at + size :]
    headers_hit = (at + size - 1) // PLAIN_BYTES - 250
    assert plain_frames(tmp_path, overwritten) == 500 - headers_hit


def test_the_lengths_of_concatenated_mp3s_add_up(tmp_path: Path, three_seconds: bytes) -> None:
    once = frames_seconds(tmp_path, three_seconds)
    for rate_hz, channels in [(44100, 2), (44100, 1), (48000, 2), (22050, 1)]:
        other = mp3(tmp_path, 2, rate_hz, channels)
        alone = frames_seconds(tmp_path, other)
        found = scan(tmp_path, three_seconds + other)
        assert found == MpegScan(pytest.approx(once + alone), pytest.approx(once)), "the first header speaks for itself"
        cut = three_seconds[: len(three_seconds) // 2]
        assert frames_seconds(tmp_path, cut + other) == pytest.approx(once / 2 + alone, abs=3 * PLAIN_SECONDS)


# any bytes

PIECES = st.one_of(
    st.binary(max_size=50),
    st.binary(min_size=1, max_size=4).map(lambda piece: b"\xff" + piece),
    st.sampled_from([PLAIN, PLAIN[:4], b"Xing", b"VBRI", b"ID3", id3v2(bytes(9)), b"\xff" * 300, bytes(300)]),
    st.builds(silent_frame, st.just("2"), st.just(3), st.sampled_from(FEW_KBITS), st.just(22050)),
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(PIECES, max_size=30).map(b"".join))
def test_no_bytes_give_more_sound_than_they_can_hold(tmp_path: Path, content: bytes) -> None:
    found = scan(tmp_path, content)
    # The lowest bit rate is 8 kbit/s; 576 samples of 22.05 kHz then take 26.1 bytes, rounded down.
    assert found is None or 0 <= found.frames_seconds <= 1.005 * len(content) / 1000


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    at=st.integers(0, 61_200),
    size=st.integers(1, 30_000),
    damage=st.sampled_from(["zeros", "ones", "random", "removed", "inserted", "cut"]),
    seed=st.integers(0, 99),
)
def test_damage_adds_no_sound_and_removes_only_what_it_touches(
    tmp_path: Path, three_seconds: bytes, at: int, size: int, damage: str, seed: int
) -> None:
    before, hit, behind = three_seconds[:at], three_seconds[at : at + size], three_seconds[at + size :]
    touched, content = {
        "zeros": (len(hit), before + bytes(len(hit)) + behind),
        "ones": (len(hit), before + b"\xff" * len(hit) + behind),
        "random": (len(hit), before + random_bytes(len(hit), seed) + behind),
        "removed": (len(hit), before + behind),
        "inserted": (0, before + random_bytes(size, seed) + hit + behind),
        "cut": (len(hit) + len(behind), before),
    }[damage]
    whole = frames_seconds(tmp_path, three_seconds)
    found = scan(tmp_path, content)
    left = found.frames_seconds if found is not None else 0.0
    # A frame may be torn where the damage begins, and two be lost where it ends: one torn, one with no neighbour left.
    lost_frames = touched / (len(three_seconds) / (whole / PLAIN_SECONDS + 1)) + 3
    # Without its name the header of the file looks like a frame of silence, and a decoder takes it for one.
    gained_frames = 1 if at < 40 else 0
    assert whole - lost_frames * PLAIN_SECONDS <= left <= whole + gained_frames * PLAIN_SECONDS + 1e-6


@pytest.mark.parametrize(
    "unit", [b"\xff", b"\0", b"\xff\xfb\x90\x64", b"\xff\xe2\x10", b"\xff\xfb\x9c\0", b"ID3", b"ID3\x04\0\0\0\0\0\0"]
)
def test_misleading_bytes_take_linear_time(tmp_path: Path, unit: bytes) -> None:
    path = tmp_path / "a.mp3"
    path.write_bytes(unit * (400_000 // len(unit)))
    start = time.process_time()
    scan_mpeg(path)
    assert time.process_time() - start < 5, "CPU seconds; usually a tenth of that, and quadratic time would be an hour"


def test_a_long_file_is_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.mp3"
    path.write_bytes(10_000 * PLAIN + bytes(10_000_000))
    tracemalloc.start()
    scan_mpeg(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


# real files


def test_unusual_real_files_last_as_long_as_they_sound(real_data: Path) -> None:
    """A decoder cuts off what the encoder added, or not; of the files that are refused none has a frame."""
    folder = real_data / "odd_mp3"
    lines = (folder / "expected.csv").read_text(encoding="utf-8").splitlines()
    for row in csv.DictReader(lines):
        found = scan_mpeg(folder / row["file"])
        if row["should"] == "refuse" or row["file"] == "wav_named_mp3.mp3":
            assert found is None, row["file"]
        else:
            assert found is not None, row["file"]
            more = found.frames_seconds - float(row["seconds"])
            assert -0.06 <= more <= 0.06 + ENCODER_SAMPLES / int(row["sample_rate"]), (row["file"], more)
