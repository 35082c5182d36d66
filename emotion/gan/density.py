"""Kernel density of the training labels, from which synthetic labels are drawn. Uniform labels would be far from any song."""

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def kernel_shape(labels: npt.ArrayLike) -> Array:
    """[2, 2] Cholesky factor of the Gaussian kernel around each label: Scott's rule with the labels' own covariance.

    labels: [songs, 2] in [-1, 1]. Source: Scott 1992, Multivariate Density Estimation, h = n^(-1/(d+4)).
    """
    points = np.asarray(labels, np.float64)
    covariance = np.cov(points, rowvar=False) + 1e-6 * np.eye(2)
    return np.asarray(np.linalg.cholesky(covariance) * len(points) ** (-1 / 6))


def draw_labels(labels: npt.ArrayLike, count: int, spread: float, rng: np.random.Generator) -> Array:
    """[count, 2] labels drawn from the density of `labels` with its kernel scaled by `spread`, clipped to [-1, 1].

    labels: [songs, 2] in [-1, 1]. Each is the centre of equally many draws (give or take one), in random order.
    """
    points = np.asarray(labels, np.float64)
    rounds = [rng.permutation(len(points)) for _ in range(-(-count // len(points)))]
    centres = points[np.concatenate(rounds)[:count]]
    noise = rng.standard_normal((count, 2)) @ kernel_shape(points).T
    return np.clip(centres + spread * noise, -1, 1)
