"""Labels read from synthetic clips by a regressor on the training songs: to choose among clips, and to correct their labels.

Source: Ding et al. 2021, arXiv:2104.03164 (cGAN-KD): clips from which another label is read than they were made for are left out,
and a label is replaced by what a teacher reads.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from emotion.audio.feature_store import NO_TONALITY
from emotion.audio.partition import Partition
from emotion.audio.song_vectors import song_vector
from emotion.config import MelConfig
from emotion.evaluation.regressors import fit_svr, grouped_folds
from emotion.gan.density import kernel_shape
from emotion.threads import in_threads

CROPS_PER_SONG = 5

Array = npt.NDArray[np.float64]
Clips = npt.NDArray[np.float32]
Positions = npt.NDArray[np.int64]


class LabelReader:
    """A support vector machine on vectors of clips, fitted to crops of the training songs.

    Not the ridge by which the phase quality reads labels back, so that its score is not what was chosen by; but both have learnt
    from the same songs. The number of threads changes no byte.
    """

    def __init__(self, partition: Partition, frames: int, *, seed: int, threads: int, check_stop: Callable[[], None]) -> None:
        """frames: of a clip. Raises DataError for training songs of one group."""
        training = partition.training
        self._mel = training.mel
        self._metric = kernel_shape(training.labels)

        def vector(crop: tuple[int, int]) -> Array:
            return clip_vector(training.clip(*crop, frames), training.mel)

        starts = [np.linspace(0, max(song.frames - frames, 0), CROPS_PER_SONG).astype(int).tolist() for song in training.songs]
        crops = [(index, start) for index, of_song in enumerate(starts) for start in dict.fromkeys(of_song)]
        vectors = np.array(list(in_threads(vector, crops, threads, check_stop)))
        songs = [index for index, _ in crops]
        folds = grouped_folds([partition.training_groups[song] for song in songs], seed)
        labels = training.labels[songs].astype(np.float64)
        self._regressor, _ = fit_svr(vectors, labels, folds, seed=seed, threads=threads, check_stop=check_stop)

    def read(self, clips: Clips) -> Array:
        """[..., frames, mels] in dB → [..., 2]. Each clip gets the same bytes whatever clips are beside it."""
        vectors = [clip_vector(clip, self._mel) for clip in clips.reshape(-1, *clips.shape[-2:])]
        return self._regressor.predict(np.array(vectors)).reshape(*clips.shape[:-2], 2)

    def nearest(self, read: Array, asked: npt.NDArray[np.float32]) -> Positions:
        """[candidates, batch, 2] and [batch, 2] → [batch]: of each clip the candidate that reads most like the label asked for.

        By Mahalanobis distance with the covariance of the training labels, as valence and arousal correlate.
        """
        away = np.linalg.solve(self._metric, (read - asked).reshape(-1, 2).T)
        return np.asarray((away**2).sum(axis=0).reshape(read.shape[:2]).argmin(axis=0))


def clip_vector(log_mel: Clips, mel: MelConfig) -> Array:
    """`song_vector` without tonality, which is measured on sound."""
    return song_vector(log_mel, mel, NO_TONALITY)
