"""A small cost model: the seconds of each phase on a CPU, from the spec, the number of songs and their length.

Trainings are counted in arithmetic operations (of the convolutions and matrix products, twice the multiplications), other phases
in songs, clips and seconds of sound. The speeds were measured on two idle cores of an AMD EPYC with bf16.
`python -m tests.bench.estimates` compares the model with jobs. On a machine that has run a job before, estimate.py corrects the
model by the times of that job. Without such a job, nothing is known about trainings on a GPU.
"""

import math
import re
from dataclasses import dataclass

from job.spec.model import JobSpec

# Arithmetic.
GAN_PASSES = 14  # through generator or discriminator, in one optimizer step: a backward pass counts as two
VALIDATION_CROPS, FEWEST_PROBED = 2, 32  # as in emotion/vit/validation.py
LAYERS = {"test_vit": (64, 6, 3), "tiny": (192, 12, 4), "small": (384, 12, 4), "base": (768, 12, 4), "large": (1024, 24, 4)}
"""Width, blocks and ratio of the hidden layer, by a word in the name of a ViT."""

# Speeds, in seconds.
START = 1.5  # of a training: to predict its memory and create its networks
PER_GIGAFLOP = {"gan": 0.018, "vit": 0.008}
PER_VIT_STEP = 0.03  # besides arithmetic
PER_READER_SONG, MOST_READER_SONGS = 0.015, 400  # songs that `synth` fits a regressor to, and their maximum; five crops each
PER_READ_CLIP = 0.0015
PER_GENERATED_SONG = 0.09
PER_SECOND_OF_SOUND = 0.0007
PER_STAGED_BYTE = 3e-9  # to compute its digest
GENERATED_SECONDS = 10.4  # of sound in a generated song, on average
BYTES_PER_SECOND = {".wav": 176_400, ".aiff": 176_400, ".aif": 176_400, ".flac": 90_000}
USUAL_BYTES_PER_SECOND = 16_000  # 128 kbit/s
"""Typical bytes per second of sound in a stereo music file, by suffix."""


@dataclass(frozen=True)
class Songs:
    """The size of a dataset, as the cost model needs it. count: number of songs; seconds: their total duration; size: bytes of
    all files."""

    count: int
    seconds: float
    size: int


def seconds_of_sound(suffix: str, size: int) -> float:
    """The probable duration of an audio file of this size. The file is not read."""
    return size / BYTES_PER_SECOND.get(suffix.lower(), USUAL_BYTES_PER_SECOND)


def seconds_of(phase: str, spec: JobSpec, songs: Songs) -> float | None:
    """Seconds estimated by the cost model; None for an unknown ViT or phase."""
    training, validation = split_sizes(spec, songs.count)
    if phase == "stage":
        generated = spec.data.source.startswith("generated:")
        return songs.count * PER_GENERATED_SONG if generated else 0.2 + songs.size * PER_STAGED_BYTE
    if phase == "features":
        return 0.5 + songs.seconds * PER_SECOND_OF_SOUND
    if phase == "gan":
        steps = math.ceil(spec.gan.epochs * training / spec.gan.batch_size)
        return START + steps * spec.gan.batch_size * GAN_PASSES * gan_gigaflops(spec) * PER_GIGAFLOP["gan"]
    if phase == "synth":
        sounds = len(spec.synth.samples) * spec.gan.clip_seconds * spec.synth.griffin_lim_iterations
        clips = spec.synth.songs * spec.synth.candidates
        reader = 0.0
        if spec.synth.needs_reader:
            reader = PER_READER_SONG * min(training, MOST_READER_SONGS) + PER_READ_CLIP * clips
        return 1.0 + clips * gan_gigaflops(spec) * PER_GIGAFLOP["gan"] + reader + 0.003 * sounds
    if phase == "quality":
        return 2.5 + 0.004 * songs.count
    if phase == "vit":
        return _vit_seconds(spec, songs)
    of_song = _embedding_seconds(spec, songs)
    if phase == "stack":
        return None if of_song is None else 4.0 + 0.008 * songs.count + of_song * (training + validation)
    if phase == "evaluate":
        return None if of_song is None else 0.2 + 0.001 * songs.count + of_song * (songs.count - training - validation)
    return {"split": 0.01, "publish": 1.5}.get(phase)


def split_sizes(spec: JobSpec, songs: int) -> tuple[int, int]:
    """Approximate numbers of songs for training and for validation."""
    split = spec.split
    if split.protocol == "all":
        return songs, 0
    tested = 1 / split.folds if split.protocol == "kfold" else split.test_fraction
    others = songs * (1 - tested)
    return max(1, round(others * (1 - split.validation_fraction))), max(1, round(others * split.validation_fraction))


def gan_gigaflops(spec: JobSpec) -> float:
    """GFLOPs of one clip through the generator; the discriminator needs about as many (emotion/gan/networks.py). At each of three
    resolutions: 19 width² multiplications for a position at half resolution. In the first layer: 36 width more."""
    frames = spec.mel.frames(spec.gan.clip_seconds)
    positions = 64 * -(-spec.mel.mels // 16) * -(-frames // 16)
    return 2e-9 * positions * (57 * spec.gan.width**2 + 36 * spec.gan.width)


def vit_gigaflops(spec: JobSpec, share_of_blocks: float = 1) -> float | None:
    """GFLOPs of one crop through at most this share of the model's blocks; None for an unknown ViT."""
    name = spec.vit.model
    known = next((layers for word, layers in LAYERS.items() if word in name.split("_") or word == name), None)
    patch = 16 if name == "test_vit" else next(map(int, re.findall(r"_patch(\d+)", name)), None)
    if known is None or patch is None:
        return None
    width, blocks, ratio = known
    height, length = spec.vit.image_size or (spec.mel.mels, spec.mel.frames(spec.vit.clip_seconds))
    tokens = -(-height // patch) * -(-length // patch)
    passed = min(share_of_blocks * blocks, spec.vit.depth or blocks)
    return 2e-9 * passed * ((4 + 2 * ratio) * width**2 * tokens + 2 * width * tokens**2)


def _embedding_seconds(spec: JobSpec, songs: Songs) -> float | None:
    """Seconds to embed one song with half of the blocks of a pretrained ViT, including one pretrained in an earlier run."""
    if spec.vit.weights == "random":
        return 0.0
    of_crop = vit_gigaflops(spec, share_of_blocks=1 / 2)
    return None if of_crop is None else _crops_of_song(spec, songs) * of_crop * PER_GIGAFLOP["vit"]


def _crops_of_song(spec: JobSpec, songs: Songs) -> int:
    """The number of crops that are taken of a song of average length."""
    return min(spec.vit.max_crops, math.ceil(songs.seconds / max(songs.count, 1) / spec.vit.clip_seconds))


def _vit_seconds(spec: JobSpec, songs: Songs) -> float | None:
    """Seconds for all epochs; early stopping may end the training sooner. With a linear probe, all training songs pass through
    the network once more."""
    vit, of_crop = spec.vit, vit_gigaflops(spec)
    if of_crop is None:
        return None
    training, validation = split_sizes(spec, songs.count)
    steps = math.ceil(vit.epochs * training / (vit.batch_size - vit.synthetic_per_batch))
    validated = validation + min(validation, max(validation // 2, FEWEST_PROBED))  # with training songs
    crops = steps * vit.batch_size * 3 + (vit.epochs + spec.begins_with_probe) * VALIDATION_CROPS * validated
    if spec.begins_with_probe:
        crops += training * _crops_of_song(spec, songs)
    return START + spec.vit_trainings * (steps * PER_VIT_STEP + crops * of_crop * PER_GIGAFLOP["vit"])
