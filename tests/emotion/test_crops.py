from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from emotion.audio.clips import Normalisation
from emotion.config import MelConfig, VitConfig
from emotion.errors import Interrupted
from emotion.training.device import Device, ResolvedPrecision
from emotion.vit.crops import crops_per_forward, predict_songs
from emotion.vit.network import Preprocessing, create_network, preprocessing_for
from tests.emotion.trainings import CPU

pytestmark = pytest.mark.usefixtures("one_thread")

MEL = MelConfig(sample_rate_hz=8000, window_samples=512, hop_samples=256, mels=32, fmax_hz=4000)
FRAMES = 32
PREPROCESSING = Preprocessing(
    MEL, Normalisation(np.full(32, -30, np.float32), np.full(32, 10, np.float32)), FRAMES, None, channels=1, max_crops=3
)
LENGTHS = [20, FRAMES, 40, 64, 200, 33, 31, 96, 500, 65]
"""Of songs, in frames: shorter than a crop, of one crop, of two, of more than three."""
CROPS = 1 + 1 + 2 + 2 + 3 + 2 + 1 + 3 + 3 + 3


def noise(lengths: Sequence[int], mels: int = 32) -> list[npt.NDArray[np.float16]]:
    rng = np.random.default_rng(0)
    return [(rng.uniform(-45, -15) + 5 * rng.standard_normal((length, mels))).astype(np.float16) for length in lengths]


def loud(*parts: float) -> npt.NDArray[np.float16]:
    """A song of one crop after another, each of a constant loudness in deviations of the normalisation."""
    return np.repeat(-30 + 10 * np.array(parts), FRAMES)[:, None].repeat(32, axis=1).astype(np.float16)


class Loudness(nn.Module):
    """In the place of a network: predicts the mean of a clip, and keeps the shapes of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, clips: Tensor) -> Tensor:
        self.shapes.append(tuple(clips.shape))
        return clips.mean(dim=(1, 2, 3))[:, None].expand(-1, 2)


def check_grouping(config: VitConfig, mel: MelConfig, precision: ResolvedPrecision, lengths: Sequence[int]) -> None:
    device = Device(torch.device("cpu"), precision, torch.get_num_threads(), deterministic=True)
    normalisation = Normalisation(np.full(mel.mels, -30, np.float32), np.full(mel.mels, 10, np.float32))
    preprocessing = preprocessing_for(config, mel, normalisation)
    network = create_network(config, preprocessing, None, 0).eval()
    songs = noise(lengths, mel.mels)

    def predicted(*groups: Sequence[npt.NDArray[np.float16]]) -> Any:
        return np.concatenate([predict_songs(network, preprocessing, device, group) for group in groups])

    together = predicted(songs)
    assert len(np.unique(together[:, 0])) == len(songs)
    assert np.array_equal(predicted(*[[song] for song in songs]), together)
    assert np.array_equal(predicted(*[songs[first : first + 3] for first in range(0, len(songs), 3)]), together)
    assert np.array_equal(predicted(songs[::-1])[::-1], together)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_song_gets_the_same_numbers_whatever_songs_are_beside_it(precision: ResolvedPrecision) -> None:
    config = VitConfig(model="test_vit", weights="random", clip_seconds=1.1, max_crops=3)
    check_grouping(config, MEL, precision, LENGTHS)


@pytest.mark.full
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("image_size", [None, (224, 224)])
def test_a_song_gets_the_same_numbers_beside_others_from_networks_as_in_the_presets(
    image_size: tuple[int, int] | None, precision: ResolvedPrecision
) -> None:
    config = VitConfig(model="vit_small_patch16_224", weights="random", image_size=image_size, max_crops=3)
    check_grouping(config, MelConfig(), precision, [300, 1000, 431, 1938])


def test_a_prediction_is_the_mean_over_crops_from_end_to_end() -> None:
    songs = [loud(0.25), loud(0.25, 0.75), loud(-0.5, 0.0, 0.25, -0.75, 0.5), loud(0.5)[:11], loud(9, -3.5), loud(3), loud(-9)]
    found = predict_songs(Loudness(), PREPROCESSING, CPU, songs)
    # Of five parts three crops: the first, the third and the last. Loudness is limited to 4 deviations, a prediction to 1.
    assert np.allclose(found[:, 0], [0.25, 0.5, (-0.5 + 0.25 + 0.5) / 3, 0.5, (4 - 3.5) / 2, 1, -1], atol=1e-6)
    assert np.array_equal(found[:, 0], found[:, 1])


def test_of_fewer_crops_each_is_from_the_middle_of_its_part() -> None:
    song = loud(-0.5, 0.0, 0.25)
    assert [predict_songs(Loudness(), PREPROCESSING, CPU, [song], crops=crops)[0, 0] for crops in (1, 3, 9)] == pytest.approx(
        [0.0, -0.25 / 3, -0.25 / 3]
    )


def test_all_forward_passes_have_one_shape_and_before_each_a_stop_is_asked_for() -> None:
    network, asked = Loudness(), []

    def check_stop() -> None:
        assert len(network.shapes) == len(asked)
        asked.append(True)
        if len(asked) == stop_at:
            raise Interrupted("enough")

    stop_at = 0
    assert CROPS == 21
    predict_songs(network, PREPROCESSING, CPU, noise(LENGTHS), check_stop=check_stop, per_forward=8)
    assert network.shapes == [(8, 1, 32, FRAMES)] * 3
    assert len(asked) == 3
    network.shapes.clear()
    asked.clear()
    stop_at = 3
    with pytest.raises(Interrupted):
        predict_songs(network, PREPROCESSING, CPU, noise(LENGTHS), check_stop=check_stop, per_forward=8)
    assert len(network.shapes) == 2


def test_a_long_prediction_logs_how_many_crops_are_done(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    predict_songs(Loudness(), PREPROCESSING, CPU, noise(LENGTHS), per_forward=8)
    assert caplog.messages == []
    monkeypatch.setattr("emotion.vit.crops.LINE_SECONDS", 0.0)
    predict_songs(Loudness(), PREPROCESSING, CPU, noise(LENGTHS), per_forward=8)
    assert caplog.messages == ["vit crops=8/21", "vit crops=16/21"]


class Recorded(TorchFunctionMode):
    """The names of all calls of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


def test_numbers_are_fetched_once_after_the_last_forward_pass() -> None:
    with Recorded() as recorded:
        predict_songs(Loudness(), PREPROCESSING, CPU, noise(LENGTHS), per_forward=4)
    fetches = [name for name in recorded.names if name in ("cpu", "numpy", "item", "tolist", "__bool__", "__float__", "__int__")]
    assert fetches == ["cpu", "numpy"]
    last_pass = max(number for number, name in enumerate(recorded.names) if name == "mean")
    assert recorded.names.index("cpu") > last_pass


def test_a_pass_holds_fewer_of_larger_crops_and_at_least_one() -> None:
    def sizes(kind: str, precision: ResolvedPrecision) -> list[int]:
        device = Device(torch.device(kind), precision, 1, deterministic=True)
        shapes = [(32, 32), (128, 416), (224, 224), (1024, 4096)]
        return [crops_per_forward(Preprocessing(MEL, PREPROCESSING.normalisation, 1, size, 1, 1), device) for size in shapes]

    assert sizes("cpu", "fp32") == [8, 2, 2, 1]
    assert sizes("cpu", "bf16") == [8, 8, 8, 1]
    assert sizes("cuda", "bf16") == sizes("cuda", "fp32") == [128, 128, 128, 2]
