"""Figures of log-mels, training curves and predictions. The same data gives the same bytes."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from emotion.audio.decoding import Array
from emotion.config import MelConfig
from emotion.evaluation.metrics import DIMENSIONS
from emotion.files import write_bytes

Numbers = npt.NDArray[np.float64]

matplotlib.rcdefaults()  # a user's matplotlibrc would change the bytes, or ask for LaTeX


def png_bytes(figure: Figure) -> bytes:
    """The figure as PNG, without the metadata that would make equal figures differ."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100, metadata={"Software": None})
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


def predicted_against_true(actual: Numbers, predicted: Numbers) -> Figure:
    """Scatter plots of valence and arousal on -1..1, a point per song; actual, predicted: [songs, 2]."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    edge = _edge(actual, predicted)
    for column, (axes, dimension) in enumerate(zip(figure.subplots(1, 2), DIMENSIONS, strict=True)):
        axes.plot([-edge, edge], [-edge, edge], color="gray", linewidth=1, label="predicted = true")
        axes.scatter(actual[:, column], predicted[:, column], s=14, alpha=0.6, color=f"C{column}", linewidths=0)
        axes.set(title=dimension, xlabel=f"true {dimension}", ylabel=f"predicted {dimension}")
        axes.legend(loc="upper left")
        _square(axes, edge)
    return figure


def valence_arousal_plane(actual: Numbers, predicted: Numbers) -> Figure:
    """Label and prediction of each song on the plane, joined by a line.

    actual, predicted: [songs, 2] = (valence, arousal) on -1..1.
    """
    figure = Figure(figsize=(6.5, 6.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.axvline(0, color="gray", linewidth=0.8)
    joined = np.stack([actual, predicted])
    axes.plot(joined[:, :, 0], joined[:, :, 1], color="lightgray", linewidth=0.6, zorder=1)
    (true_x, true_y), (x, y) = actual.T, predicted.T
    axes.scatter(true_x, true_y, s=18, facecolors="none", edgecolors="black", linewidths=0.8, label="true", zorder=2)
    axes.scatter(x, y, s=14, alpha=0.7, color="C1", linewidths=0, label="predicted", zorder=3)
    axes.set(xlabel="valence (unpleasant to pleasant)", ylabel="arousal (calm to excited)")
    axes.legend(loc="upper left")
    _square(axes, _edge(actual, predicted))
    return figure


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


def gan_curves(records: Sequence[dict[str, Any]]) -> Figure:
    """Losses and accuracy over the steps. records: lines of metrics.jsonl with step, d_loss, g_loss and d_accuracy."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    losses, accuracy = figure.subplots(1, 2)
    steps = [record["step"] for record in records]
    marker = _marker(records)
    losses.plot(steps, [record["d_loss"] for record in records], marker, label="discriminator")
    losses.plot(steps, [record["g_loss"] for record in records], marker, label="generator")
    losses.set(title="GAN losses", xlabel="step", ylabel="loss")
    losses.legend()
    accuracy.axhline(0.5, color="gray", linewidth=1, linestyle="--", label="chance")
    accuracy.plot(steps, [record["d_accuracy"] for record in records], marker, color="C2")
    accuracy.set(title="discriminator accuracy", xlabel="step", ylabel="share of pairs ranked correctly", ylim=(-0.03, 1.03))
    accuracy.legend()
    return figure


def vit_curves(
    losses: Sequence[dict[str, Any]],
    epochs: Sequence[dict[str, Any]],
    best_epoch: int | None,
    others: Sequence[dict[str, Any]] = (),
) -> Figure:
    """Loss over the steps and validation CCC per epoch, from lines of metrics.jsonl with them; either list may be empty.

    others: epochs of a training that was compared with this one and is not published; their records name it.
    """
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    loss, agreement = figure.subplots(1, 2)
    steps = [record.get("training_step", record["step"]) for record in losses]
    loss.plot(steps, [record["loss"] for record in losses], _marker(losses))
    loss.set(title="ViT training loss", xlabel="step", ylabel="loss")
    numbers = [record["epoch"] for record in epochs]
    for column, dimension in enumerate(DIMENSIONS):
        values = [record[f"validation_ccc_{dimension}"] for record in epochs]
        agreement.plot(numbers, values, _marker(epochs), color=f"C{column}", label=dimension)
    if all("training_ccc" in record for record in epochs):
        values = [record["training_ccc"] for record in epochs]
        agreement.plot(numbers, values, ":", color="gray", label="training songs, mean")
    if others:
        values = [record["validation_ccc"] for record in others]
        label = f"not published, {others[0]['training']}: mean"
        agreement.plot([record["epoch"] for record in others], values, "-.", color="C2", label=label)
        values = [record["validation_ccc"] for record in epochs]
        agreement.plot(numbers, values, color="black", linewidth=1, label="mean")
    if best_epoch is not None:
        agreement.axvline(best_epoch, color="gray", linewidth=1, linestyle="--", label=f"published: epoch {best_epoch}")
    agreement.set(title="CCC on validation songs", xlabel="epoch", ylabel="CCC")
    agreement.xaxis.get_major_locator().set_params(integer=True)
    agreement.legend()
    return figure


def _draw_log_mel(
    axes: Axes, log_mel: Array, *, top_db: float, extent: tuple[float, float, float, float] | None = None
) -> AxesImage:
    """[frames, mels] in the 80 dB below top_db."""
    image = axes.imshow(log_mel.T, origin="lower", aspect="auto", extent=extent, cmap="magma")
    image.set_clim(top_db - 80, top_db)
    return image


def _marker(records: Sequence[dict[str, Any]]) -> str:
    """A line, with markers for few points: a single point has no line."""
    return ".-" if len(records) <= 40 else "-"


def _edge(actual: Numbers, predicted: Numbers) -> float:
    """Limit of both axes: a little more than 1, or than the largest value if a prediction lies outside -1..1."""
    return 1.05 * max(1.0, float(np.abs(actual).max()), float(np.abs(predicted).max()))


def _square(axes: Axes, edge: float) -> None:
    axes.set(xlim=(-edge, edge), ylim=(-edge, edge), aspect="equal")
