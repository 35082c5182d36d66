"""Figures of log-mels and labels. The same data gives the same bytes. Charts of the report: emotion/report/charts.py."""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from emotion.audio.decoding import Array
from emotion.config import MelConfig
from emotion.files import write_bytes

Numbers = npt.NDArray[np.float64]

matplotlib.rcdefaults()  # a user's matplotlibrc would change the bytes, or ask for LaTeX


def png_bytes(figure: Figure, title: str | None = None) -> bytes:
    """The figure as PNG, without the metadata that would make equal figures differ. title: one in its metadata."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100, metadata={"Software": None, "Title": title})
    return picture.getvalue()


def save_figure(path: Path, figure: Figure) -> None:
    """Write the PNG of `png_bytes`, atomically."""
    write_bytes(path, png_bytes(figure))


def save_spectrogram(path: Path, log_mel: Array, mel: MelConfig, title: str) -> None:
    """Write the picture of a log-mel [frames, mels] in dB: time to the right, frequency upwards."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    extent = (0, len(log_mel) * mel.hop_samples / mel.sample_rate_hz, 0, mel.mels)
    image = _draw_log_mel(axes, log_mel, top_db=float(np.max(log_mel)), extent=extent)
    axes.set(title=title, xlabel="seconds", ylabel="mel band")
    figure.colorbar(image, label="dB")
    save_figure(path, figure)


def labels_on_the_plane(real: Array, synthetic: Array) -> Figure:
    """Labels of real songs [songs, 2] beside those of synthetic clips [clips, 2], which should be distributed alike."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    for axes, labels, title in zip(figure.subplots(1, 2), (real, synthetic), ("training songs", "synthetic clips"), strict=True):
        axes.scatter(labels[:, 0], labels[:, 1], s=8, alpha=0.5, linewidths=0)
        axes.set(title=f"labels of {len(labels)} {title}", xlabel="valence", ylabel="arousal")
        _square(axes, 1.05)
    return figure


def real_above_synthetic(real: Sequence[Array], synthetic: Sequence[Array]) -> Figure:
    """As many real clips in the upper row as synthetic ones in the lower, [frames, mels] in dB, on one colour scale."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    top_db = max(float(np.max(clip)) for clip in (*real, *synthetic))
    rows = figure.subplots(2, len(real), sharex=True, sharey=True, squeeze=False)
    for axes, clips, title in zip(rows, (real, synthetic), ("real", "synthetic"), strict=True):
        axes[0].set_ylabel(f"{title}\nmel band")
        for panel, clip in zip(axes, clips, strict=True):
            image = _draw_log_mel(panel, clip, top_db=top_db)
    figure.supxlabel("frame")
    figure.colorbar(image, ax=rows, label="dB")
    return figure


def _draw_log_mel(
    axes: Axes, log_mel: Array, *, top_db: float, extent: tuple[float, float, float, float] | None = None
) -> AxesImage:
    """[frames, mels] in the 80 dB below top_db."""
    image = axes.imshow(log_mel.T, origin="lower", aspect="auto", extent=extent, cmap="magma")
    image.set_clim(top_db - 80, top_db)
    return image


def _square(axes: Axes, edge: float) -> None:
    axes.set(xlim=(-edge, edge), ylim=(-edge, edge), aspect="equal")
