"""A regressor fitted to training songs predicts the labels of synthetic clips: to select clips and to correct their labels.

Source: Ding et al. 2021, arXiv:2104.03164 (cGAN-KD): clips whose predicted label differs from the requested label are dropped,
and labels are replaced by a teacher's prediction.
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
    """A support vector regression from feature vectors of clips to labels, fitted to crops of the training songs.

    A song has up to CROPS_PER_SONG crops. `fit_svr` draws MOST_SVR_ROWS of all crops if there are more: from 401 songs on. Of
    the crops of 1,224 songs it leaves out two thirds, and about 160 songs with all of theirs.

    The phase quality reads labels back with a ridge regression instead, so that clips are not selected by the model that scores
    them. Both learn from the training songs. The result does not depend on the number of threads.
    """

    def __init__(self, partition: Partition, frames: int, *, seed: int, threads: int, check_stop: Callable[[], None]) -> None:
        """frames: length of a clip. Raises DataError if all training songs are in one group."""
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
        """Predict labels: [..., frames, mels] in dB → [..., 2]. The result for a clip does not depend on the other clips."""
        vectors = [clip_vector(clip, self._mel) for clip in clips.reshape(-1, *clips.shape[-2:])]
        return self._regressor.predict(np.array(vectors)).reshape(*clips.shape[:-2], 2)

    def nearest(self, read: Array, asked: npt.NDArray[np.float32]) -> Positions:
        """Predicted [candidates, batch, 2] and requested labels [batch, 2] → [batch] index of the nearest candidate.

        Uses the Mahalanobis distance with the covariance of the training labels, as valence and arousal are correlated.
        """
        away = np.linalg.solve(self._metric, (read - asked).reshape(-1, 2).T)
        return np.asarray((away**2).sum(axis=0).reshape(read.shape[:2]).argmin(axis=0))


def clip_vector(log_mel: Clips, mel: MelConfig) -> Array:
    """`song_vector` without tonality, which is computed from sound and so unknown for a synthetic clip."""
    return song_vector(log_mel, mel, NO_TONALITY)
