"""The clips of both trainings are the same bytes whether the songs are on the device or in the file.

The expected clips are made by numpy alone, song by song: as before they were made on the device.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from emotion.audio.clips import RANGE, Normalisation
from emotion.audio.feature_store import Features, FeatureWriter
from emotion.config import GanConfig, VitConfig
from emotion.data.leaks import write_seen
from emotion.data.songs import SongLabels
from emotion.gan import train as gan
from emotion.training.clip_source import ClipSource, Stream
from emotion.training.seeding import batch_indices, crop_starts, generator
from emotion.training.step_records import Record, sent_records
from emotion.vit import train as vit
from tests.emotion.operators import HostReads, Operators
from tests.emotion.trainings import CPU, ROOMY_CPU, SMALL_GAN, SMALL_MEL, SMALL_VIT, context, partition, run_gan, run_vit

pytestmark = pytest.mark.usefixtures("one_thread")

FRAMES = 40
LENGTHS = [10, 39, 40, 41, 200, 79, 64, 120, 33]
"""Shorter than a clip, just as long, longer."""
Array = npt.NDArray[np.float32]


def songs_of(out: Path, lengths: list[int], seed: int) -> Features:
    rng = np.random.default_rng(seed)
    with FeatureWriter(out, SMALL_MEL) as writer:
        for song, length in enumerate(lengths):
            log_mel = (rng.uniform(-70, 20) + 9 * rng.standard_normal((length, SMALL_MEL.mels))).astype(np.float16)
            # Numbers below the smallest normal float16 too.
            log_mel[0, :3] = 6e-8, -6e-8, 0
            digests = {"file_sha256": f"file {song}", "sound_sha256": f"sound {song}"} if seed == 1 else {}
            writer.append(SongLabels(song, *rng.uniform(-1, 1, 2), 0.3, 0.3, f"artist {song}"), log_mel, **digests)
    return Features(out)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Features:
    """Some of the songs of a file, in another order."""
    return songs_of(tmp_path_factory.mktemp("real"), LENGTHS, 1).only([8, 0, 3, 4, 2, 5, 1, 7])


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Features:
    features = songs_of(tmp_path_factory.mktemp("synthetic"), [FRAMES, 50, 30, 60], 2)
    write_seen(features.folder, {"file 0", "sound 0"})
    return features


@pytest.fixture(scope="module")
def normalisation() -> Normalisation:
    rng = np.random.default_rng(3)
    mels = SMALL_MEL.mels
    return Normalisation(rng.uniform(-60, 10, mels).astype(np.float32), rng.uniform(1, 20, mels).astype(np.float32))


def expected_clips(songs: Features, stream: str, step: int, count: int, normalisation: Normalisation) -> Array:
    """[count, 1, mels, FRAMES]"""
    chosen = batch_indices(0, stream, step, count, len(songs.songs))
    starts = crop_starts(0, stream, step, [songs.songs[song].frames for song in chosen], FRAMES)
    clips = []
    for song, start in zip(chosen, starts, strict=True):
        log_mel = songs.stored(song)
        log_mel = log_mel[(start + np.arange(FRAMES)) % len(log_mel)].astype(np.float32)
        clips.append(np.clip((log_mel - normalisation.mean_db) / normalisation.sd_db, -RANGE, RANGE).T)
    return np.stack(clips)[:, None].astype(np.float32)


def same(found: torch.Tensor, expected: npt.NDArray[np.float32]) -> bool:
    """To the byte: 0 and -0 differ."""
    return found.shape == expected.shape and found.numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize("on_device", [False, True])
def test_the_gan_gets_the_clips_that_numpy_makes(real: Features, normalisation: Normalisation, on_device: bool) -> None:
    config = GanConfig(batch_size=6, latent=3)
    source = ClipSource([Stream("gan", real, 6)], FRAMES, normalisation, CPU, on_device=on_device)
    kernel = torch.eye(2)

    def numbers(step: int) -> gan.Numbers:
        return gan.step_numbers(source, step, config=config, frames=FRAMES, kernel=kernel, seed=0)

    for step, record in enumerate(sent_records(numbers, range(4), CPU, ahead=not on_device)):
        batch = gan.make_batch(source, record)
        assert same(batch.clips, expected_clips(real, "gan", step, 6, normalisation))
        assert (batch.labels.shape, batch.noise.shape[:3]) == ((6, 2), (2, 6, 3))


@dataclass(frozen=True)
class Augmented:
    clips: Array
    labels: Array


def augmented(clips: Array, labels: Array, config: VitConfig, longest: int, step: int) -> Augmented:
    """C-Mixup and masks in numpy."""
    if config.mixup_alpha > 0:
        draws = generator(0, "vit", "mixup", step)
        squares = ((labels[:, None].astype(float) - labels[None]) ** 2).sum(axis=2)
        weights = np.exp(-squares / (2 * config.mixup_bandwidth**2))
        np.fill_diagonal(weights, 1e-12)
        sums = weights.cumsum(axis=1)
        partners = (draws.random((len(labels), 1)) * sums[:, -1:] > sums).sum(axis=1)
        share = draws.beta(config.mixup_alpha, config.mixup_alpha, len(labels)).astype(np.float32)
        kept = np.maximum(share, 1 - share)[:, None]
        labels = kept * labels + (1 - kept) * labels[partners]
        kept = kept[:, :, None, None]
        clips = kept * clips + (1 - kept) * clips[partners]
    draws = generator(0, "vit", "masks", step)
    clips = clips.copy()
    sizes = [(2, config.mel_masks, config.mel_mask_bands), (3, config.time_masks, longest)]
    for axis, masks, widest in sizes:
        length = clips.shape[axis]
        for _ in range(masks):
            widths = draws.integers(0, min(widest, length) + 1, len(clips))
            for clip, width, start in zip(clips, widths, draws.integers(0, length - widths + 1), strict=True):
                clip.swapaxes(0, axis - 1)[start : start + width] *= 0
    return Augmented(clips, labels)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("mixup_alpha", [0.0, 0.4])
def test_the_vit_gets_the_clips_that_numpy_makes(
    real: Features, synthetic: Features, normalisation: Normalisation, on_device: bool, mixup_alpha: float
) -> None:
    config = VitConfig.model_validate(SMALL_VIT.model_dump() | {"mixup_alpha": mixup_alpha, "mel_masks": 2, "time_masks": 2})
    streams = [Stream("vit", real, 4), Stream("vit-synthetic", synthetic, 3)]
    source = ClipSource(streams, FRAMES, normalisation, CPU, on_device=on_device)
    shape = (SMALL_MEL.mels, FRAMES)

    def numbers(step: int) -> vit.Numbers:
        return vit.step_numbers(source, step, config=config, shape=shape, longest_mask=11, seed=0)

    for step, record in enumerate(sent_records(numbers, range(5), CPU, ahead=not on_device)):
        clips, labels = vit.make_batch(source, record)
        drawn = [expected_clips(songs.songs, songs.name, step, songs.count, normalisation) for songs in streams]
        own = [songs.songs.labels[batch_indices(0, songs.name, step, songs.count, len(songs.songs.songs))] for songs in streams]
        expected = augmented(np.concatenate(drawn), np.concatenate(own), config, 11, step)
        assert same(clips, expected.clips)
        assert same(labels, expected.labels)
        assert 0.01 < (clips == 0).float().mean() < 0.9


def test_a_step_sends_where_its_clips_are_and_not_the_clips(real: Features, normalisation: Normalisation) -> None:
    """Three numbers a clip, whatever its length; and on the device nothing waits for them."""
    source = ClipSource([Stream("gan", real, 6)], FRAMES, normalisation, CPU, on_device=True)
    numbers, _ = source.draw(0, 0)
    assert {name: array.shape for name, array in numbers.items()} == {"places": (3, 6)}
    record: Record = {name: torch.from_numpy(array) for name, array in numbers.items()}
    reads: list[str] = []
    with Operators() as operators, HostReads(reads):
        source.clips(record)
    assert operators.names
    assert operators.waits == reads == []


def test_on_a_cpu_no_song_is_copied(real: Features, normalisation: Normalisation) -> None:
    source = ClipSource([Stream("gan", real, 6)], FRAMES, normalisation, CPU, on_device=False)
    assert source.resident == []


@pytest.mark.parametrize("phase", [pytest.param("gan", marks=pytest.mark.full), "vit"])
def test_a_training_with_its_songs_on_the_device_ends_in_the_same_bytes_and_counts_them(
    phase: str, real: Features, synthetic: Features, tmp_path: Path
) -> None:
    songs = partition(real.only(range(6)), real.only([6, 7]))
    accounts, short = {}, {"epochs": 1.0}
    for device in (CPU, ROOMY_CPU):
        out = tmp_path / type(device).__name__
        given = context(out, device=device)
        if phase == "gan":
            accounts[out] = run_gan(partition(songs.training), SMALL_GAN.model_copy(update=short), given)
        else:
            accounts[out] = run_vit(songs, synthetic, SMALL_VIT.model_copy(update=short), given)
    (one, file), (other, device_) = accounts.items()
    weights = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    assert weights
    for path in weights:
        assert (one / path).read_bytes() == (other / path).read_bytes()
    features = songs.training.nbytes + (synthetic.nbytes if phase == "vit" else 0)
    for kind in ("predicted", "measured"):
        assert device_[kind]["data"] - file[kind]["data"] == features
        assert device_[kind]["peak"] - file[kind]["peak"] == features
