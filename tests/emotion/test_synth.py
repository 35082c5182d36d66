import multiprocessing
import os
import shutil
import signal
import wave
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from emotion.audio.clips import Normalisation
from emotion.audio.feature_store import Features, FeatureWriter
from emotion.config import MelConfig, SynthConfig
from emotion.data.leaks import SEEN, read_seen, write_seen
from emotion.data.songs import SongLabels
from emotion.errors import DataError, Interrupted, ModelError
from emotion.files import write_json
from emotion.gan import synth
from emotion.gan.networks import Generator
from emotion.gan.synth import Synthesizer, synthesize
from tests.emotion.trainings import CPU, context, never, partition

pytestmark = pytest.mark.usefixtures("one_thread")

MEL = MelConfig(sample_rate_hz=8000, window_samples=512, hop_samples=256, mels=16, fmax_hz=4000)
FRAMES = 20
LATENT, WIDTH = 3, 4
NORMALISATION = Normalisation(np.linspace(-60, -30, 16, dtype=np.float32), np.full(16, 5, np.float32))
TRAINING = [1, 3, 4]
# The labels of the other songs are far from those of training songs.
LABELS = [(-0.9, -0.9), (0.5, 0.25), (-0.9, 0.9), (0.625, 0.5), (0.25, 0.75), (0.9, -0.9)]


def config(songs: int, **values: object) -> SynthConfig:
    return SynthConfig.model_validate({"songs": songs, "samples": (), "griffin_lim_iterations": 1} | values)


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Features:
    out = tmp_path_factory.mktemp("features")
    with FeatureWriter(out, MEL) as writer:
        for song, (valence, arousal) in enumerate(LABELS):
            labels = SongLabels(song, valence, arousal, 0.3, 0.3, f"artist {song}")
            log_mel = np.full((40, 16), -40, np.float32)
            writer.append(labels, log_mel, file_sha256=f"file {song}", sound_sha256=f"sound {song}")
    return Features(out)


@pytest.fixture(scope="module")
def gan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as train_gan writes it, with large random weights, so that the output reaches both ends of its range."""
    out = tmp_path_factory.mktemp("gan")
    torch.manual_seed(0)
    state = {name: 3 * value for name, value in Generator(MEL.mels, LATENT, WIDTH).state_dict().items()}
    save_file(state, out / "generator.safetensors")
    write_json(
        out / "config.json",
        {
            "latent": LATENT,
            "width": WIDTH,
            "frames": FRAMES,
            "steps": 1,
            "mel": MEL.model_dump(),
            "normalisation": NORMALISATION.to_json(),
        },
    )
    write_seen(out, {"file 0", "sound 0"})
    return out


@pytest.fixture
def synthetic(features: Features, gan: Path) -> Callable[..., Features]:
    """synthetic(out, config) writes synthetic clips to a folder and opens it."""

    def run(out: Path, settings: SynthConfig, should_stop: Callable[[], bool] = never) -> Features:
        synthesize(partition(features.only(TRAINING)), gan=gan, config=settings, context=context(out, should_stop))
        return Features(out)

    return run


@pytest.mark.parametrize("songs", [4, 16, 37])
def test_exactly_as_many_clips_are_written_as_asked_for(synthetic: Callable[..., Features], tmp_path: Path, songs: int) -> None:
    clips = synthetic(tmp_path, config(songs)).songs
    assert [clip.song_id for clip in clips] == list(range(songs))
    assert {clip.frames for clip in clips} == {FRAMES}
    # Each is a group of its own: no split can tie them to a song or to each other.
    assert len({clip.group for clip in clips}) == songs


def test_a_clip_does_not_depend_on_its_batch(
    synthetic: Callable[..., Features], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = synthetic(tmp_path / "usual", config(20))
    monkeypatch.setattr(synth, "BATCH", 3)
    small = synthetic(tmp_path / "small", config(20))
    assert np.array_equal(usual.labels, small.labels)
    for index in range(20):
        # As near as float16 tells apart at 64 dB.
        assert np.allclose(usual.song(index), small.song(index), rtol=0, atol=0.07), index


def test_clips_of_one_label_differ_and_so_do_those_of_another_seed_or_stream(gan: Path) -> None:
    synthesizer = Synthesizer(gan, CPU)
    labels = np.zeros((3, 2), np.float32)
    clips = [*synthesizer(labels, 0, "synth", 0), *synthesizer(labels, 1, "synth", 0)]
    clips += [*synthesizer(labels, 0, "samples", 0), *synthesizer(labels, 0, "synth", 3)]
    for number, clip in enumerate(clips):
        assert all(np.abs(clip - other).max() > 1 for other in clips[:number]), number


def test_the_same_seed_gives_the_same_bytes(synthetic: Callable[..., Features], tmp_path: Path) -> None:
    settings = config(5, samples=((0.5, -0.5),))
    for name in ("one", "two"):
        synthetic(tmp_path / name, settings)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_each_training_song_is_the_centre_of_equally_many_labels(synthetic: Callable[..., Features], tmp_path: Path) -> None:
    # With next to no spread a drawn label is a training song's own.
    drawn = synthetic(tmp_path, config(30, label_spread=1e-6)).labels
    counts = Counter((round(float(valence), 3), round(float(arousal), 3)) for valence, arousal in drawn)
    assert counts == {LABELS[index]: 10 for index in TRAINING}


def test_each_label_belongs_to_the_clip_that_was_generated_for_it(
    synthetic: Callable[..., Features], gan: Path, tmp_path: Path
) -> None:
    clips = synthetic(tmp_path, config(20))
    alone = Synthesizer(gan, CPU)(clips.labels[18:19], 0, "synth", 18)[0]
    assert np.allclose(clips.song(18), alone, rtol=0, atol=0.07)


def test_synthetic_clips_fill_the_range_of_normalised_real_ones_and_never_leave_it(
    synthetic: Callable[..., Features], tmp_path: Path
) -> None:
    clips = synthetic(tmp_path, config(20))
    log_mel = np.concatenate([clips.song(index) for index in range(20)])
    # Four deviations of 5 dB around each band's mean.
    assert (np.abs(log_mel - np.linspace(-60, -30, 16)) <= 20.05).all()
    assert (np.abs(log_mel - np.linspace(-60, -30, 16)) >= 19).any()
    values = NORMALISATION.apply(log_mel)
    assert np.allclose(values * NORMALISATION.sd_db + NORMALISATION.mean_db, log_mel, rtol=0, atol=0.05)


def test_only_labels_of_real_songs_are_read(features: Features, gan: Path, tmp_path: Path) -> None:
    class Unopened(Features):
        def song(self, index: int) -> np.ndarray:
            raise AssertionError(f"song {index} was opened")

        def clip(self, index: int, start: int, frames: int) -> np.ndarray:
            raise AssertionError(f"song {index} was opened")

    unopened = Unopened.__new__(Unopened)
    unopened.__dict__.update(features.__dict__)
    synthesize(partition(unopened.only(TRAINING)), gan=gan, config=config(4), context=context(tmp_path))
    assert len(Features(tmp_path).songs) == 4


def test_samples_are_named_after_their_labels_and_last_as_long_as_a_clip(
    synthetic: Callable[..., Features], tmp_path: Path
) -> None:
    synthetic(tmp_path, config(4, samples=((-0.8, 0.6), (-0.8, 0.6))))
    names = ["00_valence-0.80_arousal+0.60", "01_valence-0.80_arousal+0.60"]
    files = {path.name: path for path in (tmp_path / "samples").iterdir()}
    assert set(files) == {f"{name}.{kind}" for name in names for kind in ("png", "wav")}
    with wave.open(str(files[f"{names[0]}.wav"])) as sound:
        assert (sound.getframerate(), sound.getnframes()) == (8000, (FRAMES - 1) * 256)
    # Two samples of one point are two clips.
    assert files[f"{names[0]}.wav"].read_bytes() != files[f"{names[1]}.wav"].read_bytes()


@pytest.mark.full
def test_the_number_of_threads_changes_no_byte_of_the_samples(features: Features, gan: Path, tmp_path: Path) -> None:
    settings = config(4, samples=((-0.8, 0.6), (0.5, 0.1), (0.0, 0.0), (0.9, 0.9)), griffin_lim_iterations=3)
    for threads in (1, 3):
        one = replace(context(tmp_path / str(threads)), device=replace(CPU, threads=threads))
        synthesize(partition(features.only(TRAINING)), gan=gan, config=settings, context=one)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "3")


OUTPUTS = ("features.f16", "songs.csv", "mel.json")


def files_of(folder: Path) -> dict[str, bytes]:
    """Without progress.json, which has the time."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "progress.json"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.parametrize(("questions", "batches_left"), [(1, 3), (2, 2), (3, 1)])
def test_a_stopped_synthesis_leaves_no_features_and_resumes_to_the_same_bytes(
    synthetic: Callable[..., Features], tmp_path: Path, questions: int, batches_left: int
) -> None:
    answers = iter([False] * (questions - 1))
    with pytest.raises(Interrupted, match=f"after {16 * (questions - 1)} of 37"):
        synthetic(tmp_path / "stopped", config(37), lambda: next(answers, True))
    assert not {path.name for path in (tmp_path / "stopped").iterdir()} & set(OUTPUTS)
    # Asked once before each batch: finished clips are not generated again.
    answers = iter([False] * batches_left)
    synthetic(tmp_path / "stopped", config(37), lambda: next(answers))
    assert next(answers, None) is None
    synthetic(tmp_path / "whole", config(37))
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "whole")


def test_a_synthesis_stopped_among_the_samples_keeps_the_clips(synthetic: Callable[..., Features], tmp_path: Path) -> None:
    settings = config(37, samples=((0.5, -0.5), (0.0, 0.0)))
    # Three batches, then the clips of both samples, the first sound and both pictures.
    answers = iter([False] * (3 + 2 + 1 + 2))
    with pytest.raises(Interrupted, match="after 1 of 2 samples"):
        synthetic(tmp_path / "stopped", settings, lambda: next(answers, True))
    # The clips are there: no batch is generated again.
    answers = iter([False] * (2 + 2 + 2))
    synthetic(tmp_path / "stopped", settings, lambda: next(answers))
    synthetic(tmp_path / "whole", settings)
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "whole")


def test_a_synthesis_killed_after_any_batch_resumes_to_the_same_bytes(
    synthetic: Callable[..., Features], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synthetic(tmp_path / "whole", config(37))
    monkeypatch.setattr("emotion.audio.feature_store.DURABLE_SECONDS", 0.0)
    for batches in range(3):
        questions = count()

        def is_last(batches: int = batches, questions: Iterator[int] = questions) -> bool:
            if next(questions) == batches:
                os.kill(os.getpid(), signal.SIGKILL)
            return False

        out = tmp_path / str(batches)
        killed = multiprocessing.get_context("fork").Process(target=synthetic, args=(out, config(37), is_last))
        killed.start()
        killed.join()
        assert killed.exitcode == -signal.SIGKILL
        with pytest.raises(Interrupted, match=f"after {16 * batches} of 37"):
            synthetic(out, config(37), lambda: True)
        synthetic(out, config(37))
        assert files_of(out) == files_of(tmp_path / "whole")


@pytest.mark.parametrize("clips", [1, 15, 21, 31])
def test_a_synthesis_cut_within_a_batch_resumes_to_the_same_bytes(
    synthetic: Callable[..., Features], tmp_path: Path, clips: int
) -> None:
    synthetic(tmp_path / "whole", config(37))
    answers = iter([False, False])
    with pytest.raises(Interrupted, match="after 32 of 37"):
        synthetic(tmp_path / "cut", config(37), lambda: next(answers, True))
    os.truncate(tmp_path / "cut" / ".features.f16.part", clips * FRAMES * MEL.mels * 2 + 7)
    with pytest.raises(Interrupted, match=f"after {clips} of 37"):
        synthetic(tmp_path / "cut", config(37), lambda: True)
    synthetic(tmp_path / "cut", config(37))
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def test_clips_of_another_generator_or_seed_are_generated_again(features: Features, gan: Path, tmp_path: Path) -> None:
    other = tmp_path / "gan"
    shutil.copytree(gan, other)
    state = {name: value / 2 for name, value in load_file(gan / "generator.safetensors").items()}
    save_file(state, other / "generator.safetensors")
    songs, out = partition(features.only(TRAINING)), tmp_path / "out"
    answers = iter([False, False])
    with pytest.raises(Interrupted, match="after 32 of 37"):
        synthesize(songs, gan=gan, config=config(37), context=context(out, lambda: next(answers, True)))
    for folder, seed in ((other, 0), (gan, 1)):
        with pytest.raises(Interrupted, match="after 0 of 37"):
            synthesize(songs, gan=folder, config=config(37), context=context(out, lambda: True, seed=seed))


def test_a_generator_that_has_seen_a_held_out_song_is_refused(features: Features, gan: Path, tmp_path: Path) -> None:
    held_out = features.only([0])
    held_out.songs = [replace(features.songs[0], song_id=77, sound_sha256="decoded elsewhere")]
    training = features.only(TRAINING)
    for songs in (partition(training, validation=held_out), partition(training, test=held_out)):
        with pytest.raises(ModelError, match=r"leak: what makes synthetic clips .* ids: 77"):
            synthesize(songs, gan=gan, config=config(4), context=context(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_the_label_of_a_held_out_song_is_refused_for_the_density(features: Features, gan: Path, tmp_path: Path) -> None:
    songs = partition(features.only(TRAINING), test=features.only([3]))
    with pytest.raises(ModelError, match=r"ids: 3"):
        synthesize(songs, gan=gan, config=config(4), context=context(tmp_path))


def test_synthetic_clips_come_with_the_list_of_all_songs_behind_them(synthetic: Callable[..., Features], tmp_path: Path) -> None:
    synthetic(tmp_path / "synthetic", config(4))
    # The generator has seen song 0; the density comes from songs 1, 3 and 4.
    assert read_seen(tmp_path / "synthetic") == {f"{kind} {song}" for kind in ("file", "sound") for song in (0, 1, 3, 4)}


def test_a_generator_without_its_list_of_songs_is_refused(features: Features, gan: Path, tmp_path: Path) -> None:
    copied = tmp_path / "gan"
    shutil.copytree(gan, copied)
    (copied / SEEN).unlink()
    songs = partition(features.only(TRAINING))
    with pytest.raises(DataError, match=r"seen_songs\.txt: expected the digests"):
        synthesize(songs, gan=copied, config=config(4), context=context(tmp_path / "synthetic"))
