"""Pictures of log-mels, training curves and predictions."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from emotion.config import MelConfig
from emotion.features import Array
from emotion.files import written_atomically


def save_figure(path: Path, figure: Figure) -> None:
    """As PNG; without the version and time that would make equal pictures differ."""
    with written_atomically(path) as file:
        figure.savefig(file, format="png", dpi=100, metadata={"Software": None})


def save_spectrogram(path: Path, log_mel: Array, mel: MelConfig, title: str) -> None:
    """A log-mel [frames, mels] in dB, time to the right, frequency upwards."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    seconds = len(log_mel) * mel.hop_samples / mel.sample_rate_hz
    top = float(np.max(log_mel))
    image = axes.imshow(
        log_mel.T, origin="lower", aspect="auto", extent=(0, seconds, 0, mel.mels), vmin=top - 80, vmax=top, cmap="magma"
    )
    axes.set(title=title, xlabel="seconds", ylabel="mel band")
    figure.colorbar(image, label="dB")
    save_figure(path, figure)
