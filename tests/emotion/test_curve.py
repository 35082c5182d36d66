import numpy as np
import pytest
import torch

from emotion.audio.clips import Normalisation
from emotion.config import MelConfig, VitConfig
from emotion.errors import Interrupted
from emotion.vit.crops import crops_per_forward, predict_songs
from emotion.vit.curve import STEP_SECONDS, curve_crops, curve_of, window_seconds
from emotion.vit.network import Preprocessing, create_network, preprocessing_for
from tests.emotion.test_crops import Loudness
from tests.emotion.trainings import CPU

pytestmark = pytest.mark.usefixtures("one_thread")

MEL = MelConfig(sample_rate_hz=8000, window_samples=512, hop_samples=250, mels=32, fmax_hz=4000)  # 32 frames a second
FRAMES = 65  # centred on a frame: two seconds, one frame
CONSTANTS = Normalisation(np.full(32, -50, np.float32), np.full(32, 20, np.float32))
PREPROCESSING = Preprocessing(MEL, CONSTANTS, FRAMES, None, channels=1, max_crops=3)


def ramp(seconds: float) -> np.ndarray:
    """A song whose level rises by a tenth of a deviation of the normalisation a second, from 0."""
    course = np.arange(round(32 * seconds)) / 32
    return (-50 + 2 * course)[:, None].repeat(32, axis=1).astype(np.float32)


def test_a_point_of_the_curve_is_the_mean_of_the_window_around_its_time() -> None:
    seconds, values = curve_of(Loudness(), PREPROCESSING, CPU, ramp(8))
    # The window of 2 s is inside of the song from 1.0 to 8 - 1/32 - 1.
    np.testing.assert_array_equal(seconds, [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 6.5])
    np.testing.assert_allclose(values, np.column_stack([seconds, seconds]) / 10, atol=1e-6)
    assert window_seconds(PREPROCESSING) == 65 / 32


def test_a_step_in_the_music_is_smeared_over_the_window() -> None:
    song = np.where(np.arange(32 * 10) < 32 * 5, -50.0, -40.0)[:, None].repeat(32, axis=1).astype(np.float32)
    seconds, values = curve_of(Loudness(), PREPROCESSING, CPU, song)
    expected = ((seconds + 1 - 5) / 2).clip(0, 1) * 0.5
    np.testing.assert_allclose(values[:, 0], expected, atol=0.01)


@pytest.mark.parametrize("length", [10, 71, 72, 76, 84])
def test_a_song_without_room_for_a_step_has_one_point_in_its_middle(length: int) -> None:
    # Half of 72 frames is 1.11 s, and a crop around 1.5 s ends with frame 84.
    seconds, starts = curve_crops(length, 72, MEL)
    assert starts == [max((length - 72) // 2, 0)]
    assert seconds.tolist() == [(length - 1) / 2 / 32]
    assert curve_crops(85, 72, MEL)[0].tolist() == [1.5]


@pytest.mark.parametrize("hop", [200, 256, 301])
@pytest.mark.parametrize("frames", [32, 65])
def test_crops_stay_inside_the_song_and_are_centred_to_half_a_frame(hop: int, frames: int) -> None:
    mel = MEL.model_copy(update={"hop_samples": hop})
    rate = 8000 / hop
    for length in (frames, frames + 1, frames + 13, 500, 1001):
        seconds, starts = curve_crops(length, frames, mel)
        assert min(starts) >= 0
        assert max(starts) + frames <= length
        centres = (np.array(starts) + (frames - 1) / 2) / rate
        assert np.abs(centres - seconds).max() <= 0.51 / rate
        # No further point would have room.
        assert seconds[0] - STEP_SECONDS < (frames - 1) / 2 / rate
        assert seconds[-1] + STEP_SECONDS > (length - 1 - (frames - 1) / 2) / rate


def test_an_hour_takes_no_larger_forward_passes_than_a_song() -> None:
    network = Loudness()
    seconds, values = curve_of(network, PREPROCESSING, CPU, np.zeros((32 * 3600, 32), np.float16))
    assert len(seconds) == len(values) == 3600 * 2 - 4
    assert {shape[0] for shape in network.shapes} == {crops_per_forward(PREPROCESSING, CPU)}
    # Values stay on the scale: 0 dB is 2.5 deviations above the mean.
    np.testing.assert_array_equal(values, 1)


def test_a_curve_ends_at_a_stop_before_the_next_forward_pass() -> None:
    network = Loudness()

    def stop() -> None:
        if len(network.shapes) == 2:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        curve_of(network, PREPROCESSING, CPU, ramp(60), stop)
    assert len(network.shapes) == 2


def test_a_crop_has_the_number_that_it_has_in_the_prediction_of_the_song() -> None:
    config = VitConfig(model="test_vit", weights="random", clip_seconds=2.1, max_crops=1)
    preprocessing = preprocessing_for(config, MEL, CONSTANTS)
    network = create_network(config, preprocessing, None, 0).eval()
    frames = preprocessing.frames
    assert frames == 64  # with the crop's centre at 63 / 64 s, there is no room for one at 1 s: both see the middle of the song
    song = (-50 + 20 * torch.randn(frames, 32, generator=torch.Generator().manual_seed(0)).numpy()).astype(np.float16)
    (start,) = curve_crops(len(song), frames, MEL)[1]
    assert start == (len(song) - frames) // 2
    found = curve_of(network, preprocessing, CPU, song).values
    np.testing.assert_array_equal(found, predict_songs(network, preprocessing, CPU, [song]))
