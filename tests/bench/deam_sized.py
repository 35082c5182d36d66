"""Makes a dataset of DEAM's size in seconds: encoded pieces of generated music, joined in a new order for each song.

    python tests/bench/deam_sized.py FOLDER [--excerpts 1744] [--full 58]

Excerpts last 45 s and full songs 234 s; they are stereo mp3s of 44.1 kHz and 128 kbit/s, as in DEAM. A song's labels are the
means of its pieces' labels, scaled to DEAM's spread and with noise added, so they can be learned from the sound.
"""

import argparse
import io
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import soxr

from emotion.data.deam import find_dataset
from emotion.data.toy_dataset import AUDIO_FOLDER, LABEL_FOLDER, generate_dataset

RATE_HZ, KBITS = 44100, 128
PIECES = 28
PIECE_FRAMES = 345
"""Frames of a piece; with 1,152 samples each, they last 9.0 s."""
EXCERPT_PIECES, FULL_PIECES = 5, 26
RATING_NOISE = 0.6
HEADER = "song_id, valence_mean, valence_std, arousal_mean, arousal_std"


def cbr_frames(mp3: bytes) -> list[bytes]:
    """The frames of a file of constant bit rate, without the first, which only describes the others."""
    frames = []
    at = 0
    while at < len(mp3):
        length = 144_000 * KBITS // RATE_HZ + (mp3[at + 2] >> 1 & 1)
        frames.append(mp3[at : at + length])
        at += length
    return frames[1:]


def encoded_piece(sound: np.ndarray, rate_hz: int) -> bytes:
    """[samples] mono → PIECE_FRAMES frames of stereo mp3, which can be placed after any other piece."""
    samples = soxr.resample(np.tile(sound, 2), rate_hz, RATE_HZ)[: 1152 * (PIECE_FRAMES + 4)]
    content = io.BytesIO()
    stereo = np.stack([samples, 0.9 * samples], axis=1)
    # For this encoder, levels 0 to 1 are 320 to 32 kbit/s.
    level = (320 - KBITS) / (320 - 32)
    soundfile.write(content, stereo, RATE_HZ, format="MP3", compression_level=level, bitrate_mode="CONSTANT")
    return b"".join(cbr_frames(content.getvalue())[:PIECE_FRAMES])


def make_dataset(root: Path, excerpts: int = 1744, full: int = 58, pieces: int = PIECES) -> None:
    """Write both label tables and the songs below `root`, in DEAM's layout. Making the pieces takes most of the time."""
    if not (0 < excerpts <= 1999 and 0 <= full <= 58):
        raise ValueError(f"ids of DEAM's excerpts are 2 to 2000, of its full songs 2001 to 2058; found {excerpts} and {full}")
    with tempfile.TemporaryDirectory() as folder:
        generate_dataset(Path(folder), pieces, 0, lambda: False)
        songs = find_dataset(Path(folder)).songs
        encoded = [encoded_piece(*soundfile.read(Path(folder) / song.audio)) for song in songs]
        moods = np.array([[song.valence, song.arousal] for song in songs])
    moods = (moods - moods.mean(axis=0)) / moods.std(axis=0)
    (root / AUDIO_FOLDER).mkdir(parents=True)
    (root / LABEL_FOLDER).mkdir(parents=True)
    rng = np.random.default_rng(1)
    used: set[tuple[int, ...]] = set()
    tables: list[list[str]] = [[HEADER], [HEADER]]
    for song_id in [*range(2, 2 + excerpts), *range(2001, 2001 + full)]:
        is_full = song_id > 2000
        order: tuple[int, ...] = ()
        while not order or order in used:
            order = tuple(rng.integers(0, pieces, FULL_PIECES if is_full else EXCERPT_PIECES).tolist())
        used.add(order)
        (root / AUDIO_FOLDER / f"{song_id}.mp3").write_bytes(b"".join(encoded[piece] for piece in order))
        mood = moods[list(order)].mean(axis=0) * np.sqrt(len(order)) + RATING_NOISE * rng.standard_normal(2)
        valence, arousal = np.clip(4.9 + 1.1 * mood, 1.2, 8.8)
        tables[is_full].append(f"{song_id},{valence:.2f},1.5,{arousal:.2f},1.5")
    for years, rows in zip(("1_2000", "2000_2058"), tables, strict=True):
        if len(rows) > 1:
            text = "\n".join(rows) + "\n"
            (root / LABEL_FOLDER / f"static_annotations_averaged_songs_{years}.csv").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--excerpts", type=int, default=1744)
    parser.add_argument("--full", type=int, default=58)
    arguments = parser.parse_args()
    make_dataset(arguments.folder, arguments.excerpts, arguments.full)


if __name__ == "__main__":
    main()
