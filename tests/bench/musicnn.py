"""Writes MusiCNN's embeddings of every song below a folder to a file for `vit.teacher`.

    python -m tests.bench.musicnn FOLDER OUT.npz --onnx FILE [--layer layers] [--whole]

For development only: it needs onnxruntime, which is no part of the project, and the network as ONNX, converted from the
MSD_musicnn checkpoint of the package musicnn 0.1.0 (ISC licence). OUT has names [rows], embedding [rows, dimensions] and
seconds [rows]. A row is a part of a song; its seconds are the middle of the part. Parts have PATCH frames, 3 s, and follow one
another over the whole song; a shorter song is repeated. With --whole there is one row per song, the mean over its parts, and no
seconds.

The input is as in training: mono at 16 kHz, Hann windows of 512 samples every 256, 96 Slaney mels from 0 to 8,000 Hz,
log10(1 + 10000 S). Source: Pons and Serra 2019, musicnn: pre-trained convolutional neural networks for music audio tagging.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

# For importing emotion when this file is run as a program.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from emotion.audio.decoding import decode_blocks
from emotion.audio.mel import LogMel
from emotion.config import MelConfig
from emotion.data.songs import AUDIO_FILE

Array = npt.NDArray[np.float32]
MEL = MelConfig(sample_rate_hz=16000, window_samples=512, hop_samples=256, mels=96, fmin_hz=0.0, fmax_hz=8000.0)
PATCH = 187  # frames
LAYERS = {"embedding": ["model/dense/BiasAdd:0"], "layers": ["model/moments/Squeeze:0", "model/Max:0"]}
"""embedding: 200 numbers of the penultimate layer. layers: 1,506 numbers, mean and maximum over time of 753 features below it."""


def patches(audio: Path) -> Array:
    """The input of the network, [parts, PATCH, 96]."""
    log_mel = LogMel(MEL).of_blocks(decode_blocks(audio, MEL.sample_rate_hz))
    found = np.log10(1 + 10000 * 10 ** (log_mel.astype(np.float64) / 10)).astype(np.float32)
    parts = max(len(found) // PATCH, 1)
    return np.resize(found, (parts, PATCH, MEL.mels))


def name_of(audio: Path, folder: Path) -> str:
    """The id of a song in the job: its path if a songs.csv names the files, else its name without suffix."""
    return audio.relative_to(folder).as_posix() if (folder / "songs.csv").exists() else audio.stem


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a dataset: DEAM's layout, or one with a songs.csv")
    parser.add_argument("out", type=Path)
    parser.add_argument("--onnx", type=Path, required=True, help="the network")
    parser.add_argument("--layer", choices=LAYERS, default="embedding")
    parser.add_argument("--whole", action="store_true", help="one row a song")
    given = parser.parse_args()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    network = onnxruntime.InferenceSession(str(given.onnx), options, providers=["CPUExecutionProvider"])
    names, rows, seconds = [], [], []
    audio = sorted(path for path in given.folder.rglob("*") if path.is_file() and AUDIO_FILE.fullmatch(path.name))
    for path in audio:
        outputs = network.run(LAYERS[given.layer], {"model/Placeholder:0": patches(path)})
        found = np.concatenate([output.reshape(len(output), -1) for output in outputs], axis=1)
        if given.whole:
            found = found.mean(axis=0, keepdims=True)
        names += [name_of(path, given.folder)] * len(found)
        rows.append(found)
        seconds.append((np.arange(len(found)) + 0.5) * PATCH * MEL.hop_samples / MEL.sample_rate_hz)
        print(f"{len(rows)}/{len(audio)} {path.name}", flush=True)
    parts = {} if given.whole else {"seconds": np.concatenate(seconds).astype(np.float32)}
    np.savez(given.out, names=np.array(names), embedding=np.concatenate(rows).astype(np.float32), **parts)
    print(f"{len(names)} rows of {len(rows)} songs, {rows[0].shape[1]} dimensions: {given.out}")


if __name__ == "__main__":
    main()
