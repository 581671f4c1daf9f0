"""Ridgeline plots: histograms above each other, a row for each time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .figures import early_to_late

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PEAK = 1.3  # height of the peak of a row, in distances between rows


def height_of(rows: int) -> float:
    """The height, in inches, of a figure with that many rows: they are closer, the more there are."""
    distance = max(0.15, min(0.3, 2.5 / rows))  # labels need 0.15
    return max(1.6, 0.8 + distance * (rows + PEAK - 1))


def histograms_of(values: Sequence[np.ndarray], bins: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """The edges of bins up to 1 that cover all similarities, (bins + 1,), and the counts of each array, (bins,)."""
    values = [v[np.isfinite(v)] for v in values]
    lowest = min((v.min() for v in values if len(v)), default=0)
    edges = np.linspace(min(np.floor(lowest * 20) / 20, 0.95), 1, bins + 1)
    return edges, [np.histogram(np.minimum(v, 1), edges)[0] for v in values]  # rounding may give more than 1


def draw_ridges(axes: Axes, edges: np.ndarray, histograms: Sequence[np.ndarray], times: np.ndarray) -> None:
    """Filled histograms in rows, the first on top, the later ones in front, each with its time on the y axis."""
    rows = -np.arange(len(histograms), dtype=float)
    for row, counts, time in zip(rows, histograms, times, strict=True):
        ridge = row + PEAK * counts / max(1, counts.max())
        colour = np.array(early_to_late()(time))
        pale = 0.5 + 0.5 * colour  # and opaque, so that the rows behind do not shine through
        axes.stairs(ridge, edges, baseline=row, fill=True, color=pale, zorder=1 - row)
        axes.stairs(ridge, edges, baseline=row, color=colour, linewidth=0.7, zorder=1 - row, clip_on=False)
    axes.set_yticks(rows, [f"{time:.3g}" for time in times])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set(xlim=(edges[0], edges[-1]), ylim=(rows[-1] - 0.1, PEAK))
    axes.locator_params(axis="x", nbins=5)
