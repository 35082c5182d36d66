"""The picture of curves over time: a row per song."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from emotion.errors import printable
from emotion.evaluation.metrics import DIMENSIONS
from emotion.evaluation.plots import png_bytes

MOST_SONGS = 12  # in one picture: more rows are too low to read
LONGEST_NAME = 80  # of a title, in characters

Song = tuple[str, npt.NDArray[np.float64], npt.NDArray[np.floating[Any]]]


def curves_png(songs: Sequence[Song], window: float, title: str | None = None) -> bytes:
    """PNG of the first MOST_SONGS songs. songs: name, seconds [points] and values [points, 2] = (valence, arousal) on -1..1 each;
    at least one. window: seconds of sound behind each value. title: one in the metadata. Equal curves give equal bytes."""
    shown = songs[:MOST_SONGS]
    figure = Figure(figsize=(9, 0.6 + 2.2 * len(shown)), layout="constrained")
    rows = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for axes, (name, seconds, values) in zip(rows, shown, strict=True):
        axes.axhline(0, color="gray", linewidth=0.8)
        for column, dimension in enumerate(DIMENSIONS):
            # A song that is shorter than two windows may have a single value.
            axes.plot(seconds, values[:, column], color=f"C{column}", label=dimension, marker="." if len(seconds) == 1 else "")
        shown_name = printable(name)
        shown_name = shown_name if len(shown_name) <= LONGEST_NAME else f"…{shown_name[1 - LONGEST_NAME :]}"
        axes.set_title(shown_name, parse_math=False, fontsize="medium", loc="left")
        axes.set(ylim=(-1.05, 1.05), ylabel="-1 to 1", xlim=(0, float(seconds[-1]) + window / 2))
    rows[0].legend(loc="upper right", ncols=2, fontsize="small")
    rest = f"; the first {len(shown)} of {len(songs)} songs" if len(songs) > len(shown) else ""
    rows[-1].set_xlabel(f"seconds (each value is for {window:.1f} s of sound around its time{rest})")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # a name in a script that the font does not have
        return png_bytes(figure, title)
