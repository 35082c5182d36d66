import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from emotion.audio.clips import Normalisation
from emotion.audio.feature_store import Features, FeatureWriter
from emotion.config import MelConfig, SynthConfig
from emotion.data.leaks import write_seen
from emotion.data.songs import SongLabels
from emotion.errors import Interrupted
from emotion.files import write_json
from emotion.gan.label_reader import LabelReader
from emotion.gan.networks import Generator
from emotion.gan.synth import Synthesizer, synthesize
from tests.emotion.trainings import CPU, context, never, partition

pytestmark = pytest.mark.usefixtures("one_thread")

MEL = MelConfig(sample_rate_hz=8000, window_samples=512, hop_samples=256, mels=16, fmax_hz=4000)
FRAMES, LATENT, WIDTH = 20, 3, 4
SONGS = 12
NORMALISATION = Normalisation(np.full(16, -40, np.float32), np.full(16, 5, np.float32))


def noise_at(level_db: float, seed: int, frames: int = 40) -> np.ndarray:
    return (level_db + np.random.default_rng(seed).standard_normal((frames, MEL.mels))).astype(np.float32)


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Features:
    """Songs of one noise from -50 to -28 dB, in the same order as their arousal; all of the same valence but for its sign."""
    out = tmp_path_factory.mktemp("songs")
    with FeatureWriter(out, MEL) as writer:
        for song in range(SONGS):
            labels = SongLabels(song, 0.1 * (-1) ** song, -0.55 + 0.1 * song, 0.3, 0.3, f"artist {song % 6}")
            writer.append(labels, noise_at(-50 + 2 * song, song), file_sha256=f"file {song}", sound_sha256=f"sound {song}")
    return Features(out)


@pytest.fixture(scope="module")
def reader(songs: Features) -> LabelReader:
    return LabelReader(partition(songs), FRAMES, seed=0, threads=1, check_stop=lambda: None)


@pytest.fixture(scope="module")
def gan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As train_gan writes it, with random weights."""
    out = tmp_path_factory.mktemp("gan")
    torch.manual_seed(0)
    save_file(
        {name: 3 * value for name, value in Generator(MEL.mels, LATENT, WIDTH).state_dict().items()},
        out / "generator.safetensors",
    )
    shape = {"latent": LATENT, "width": WIDTH, "frames": FRAMES, "steps": 1}
    write_json(out / "config.json", {**shape, "mel": MEL.model_dump(), "normalisation": NORMALISATION.to_json()})
    write_seen(out, {"file 0", "sound 0"})
    return out


@pytest.fixture
def synthetic(songs: Features, gan: Path) -> Callable[..., Features]:
    def run(out: Path, should_stop: Callable[[], bool] = never, clips: int = 20, **values: object) -> Features:
        config = SynthConfig.model_validate({"songs": clips, "samples": (), **values})
        synthesize(partition(songs), gan=gan, config=config, context=context(out, should_stop))
        return Features(out)

    return run


def test_the_label_of_a_clip_is_read_from_how_it_sounds(reader: LabelReader) -> None:
    levels = np.array([-47.0, -39.0, -31.0])
    read = reader.read(np.stack([noise_at(level, 100, FRAMES) for level in levels]))
    # 20 dB are 1 in arousal; nothing that sounds tells the sign of the valence.
    assert np.allclose(read[:, 1], (levels + 39) / 20, atol=0.15)
    assert np.abs(read[:, 0]).max() < 0.15


def test_a_clip_reads_the_same_alone_and_among_others(reader: LabelReader) -> None:
    clips = np.stack([noise_at(-45 + number, number, FRAMES) for number in range(6)]).reshape(2, 3, FRAMES, MEL.mels)
    read = reader.read(clips)
    assert read.shape == (2, 3, 2)
    assert np.array_equal(read[1, 2], reader.read(clips[1, 2]))


def test_the_number_of_threads_changes_no_byte(songs: Features, reader: LabelReader) -> None:
    threaded = LabelReader(partition(songs), FRAMES, seed=0, threads=3, check_stop=lambda: None)
    clips = np.stack([noise_at(-45 + 3 * number, number, FRAMES) for number in range(4)])
    assert np.array_equal(threaded.read(clips), reader.read(clips))


def test_other_songs_than_training_songs_are_not_learnt_from(songs: Features, reader: LabelReader) -> None:
    rows = partition(songs.only(range(8)), validation=songs.only([8, 9]), test=songs.only([10, 11]))
    few = LabelReader(rows, FRAMES, seed=0, threads=1, check_stop=lambda: None)
    loud = noise_at(-28, 11, FRAMES)
    # The loudest training song has an arousal of 0.15, the loudest song 0.55.
    assert few.read(loud)[1] < 0.25 < 0.4 < reader.read(loud)[1]


def test_the_nearest_label_is_nearest_by_the_covariance_of_the_training_labels(tmp_path: Path) -> None:
    # Valence and arousal lie on a diagonal but for 0.05, so (0.3, 0.3) is nearer to (0, 0) than (0.2, -0.2), by far.
    with FeatureWriter(tmp_path, MEL) as writer:
        for song in range(8):
            along, across = -0.7 + 0.2 * song, 0.05 * (-1) ** song
            writer.append(SongLabels(song, along + across, along - across, 0.3, 0.3, f"artist {song}"), noise_at(-40, song))
    reader = LabelReader(partition(Features(tmp_path)), FRAMES, seed=0, threads=1, check_stop=lambda: None)
    asked = np.zeros((2, 2), np.float32)
    read = np.array([[[0.2, -0.2], [0.1, 0.1]], [[0.3, 0.3], [0.2, 0.2]]])
    assert reader.nearest(read, asked).tolist() == [1, 0]


def test_of_the_clips_made_for_a_label_the_one_that_reads_most_like_it_is_kept(
    synthetic: Callable[..., Features], reader: LabelReader, gan: Path, tmp_path: Path
) -> None:
    first, chosen = synthetic(tmp_path / "first"), synthetic(tmp_path / "chosen", candidates=4)
    assert np.array_equal(first.labels, chosen.labels)
    synthesizer = Synthesizer(gan, CPU)
    streams = ["synth", *(f"synth candidate {number}" for number in (1, 2, 3))]
    made = np.stack(
        [np.concatenate([synthesizer(first.labels[at : at + 16], 0, name, at) for at in (0, 16)]) for name in streams]
    )
    nearest = reader.nearest(reader.read(made.astype(np.float16).astype(np.float32)), first.labels)
    assert set(nearest) == {0, 1, 2, 3}
    for number, candidate in enumerate(nearest):
        assert np.allclose(chosen.song(number), made[candidate, number], rtol=0, atol=0.04), number


@pytest.mark.parametrize("candidates", [1, 3])
def test_a_label_moves_towards_what_is_read_from_its_clip(
    synthetic: Callable[..., Features], reader: LabelReader, tmp_path: Path, candidates: int
) -> None:
    asked = synthetic(tmp_path / "asked", candidates=candidates)
    read = reader.read(np.stack([asked.song(number) for number in range(20)]))
    assert np.abs(read - asked.labels).max() > 0.1
    for share in (0.25, 1.0):
        moved = synthetic(tmp_path / str(share), candidates=candidates, read_share=share)
        assert (tmp_path / str(share) / "features.f16").read_bytes() == (tmp_path / "asked" / "features.f16").read_bytes()
        assert np.allclose(moved.labels, asked.labels + share * (read - asked.labels), atol=1e-6)


def test_without_candidates_and_a_share_no_regressor_is_fitted(
    synthetic: Callable[..., Features], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("emotion.gan.synth.LabelReader")
    assert len(synthetic(tmp_path / "usual").songs) == 20
    with pytest.raises(NameError):
        synthetic(tmp_path / "chosen", candidates=2)


def test_a_section_without_the_new_keys_has_the_fields_of_before() -> None:
    assert set(SynthConfig().result_fields()) == {"songs", "label_spread", "samples", "griffin_lim_iterations"}
    assert {"candidates", "read_share"} <= set(SynthConfig(candidates=2, read_share=0.5).result_fields())


def written(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("features.f16", "songs.csv")]


def test_a_choice_killed_after_any_batch_resumes_to_the_same_bytes(
    synthetic: Callable[..., Features], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"clips": 37, "candidates": 3, "read_share": 0.5}
    synthetic(tmp_path / "whole", **settings)
    monkeypatch.setattr("emotion.audio.feature_store.DURABLE_SECONDS", 0.0)
    asked = count()
    synthetic(tmp_path / "counted", lambda: next(asked) < 0, **settings)
    questions = next(asked)
    for batches in range(3):
        # The last questions are those of the three batches; those before them are of the regressor.
        answers = count()

        def is_last(last: int = questions - 3 + batches, answers: Iterator[int] = answers) -> bool:
            if next(answers) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return False

        out = tmp_path / str(batches)
        killed = multiprocessing.get_context("fork").Process(target=synthetic, args=(out, is_last), kwargs=settings)
        killed.start()
        killed.join()
        assert killed.exitcode == -signal.SIGKILL
        with pytest.raises(Interrupted, match=f"after {16 * batches} of 37"):
            synthetic(out, lambda: True, **settings)
        synthetic(out, **settings)
        assert written(out) == written(tmp_path / "whole")
