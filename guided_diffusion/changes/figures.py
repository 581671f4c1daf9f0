"""Figures of changes: chi and the correlation length against time, C(r), and power spectra, with a CSV of the points.

Each function takes curves, the changes at all times by label, such as {"clip": ..., "pixels": ...}; intervals are 95%,
from the bootstrap over starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import logger
from ..classifier.figures import (
    BLUE,
    ERROR_BARS,
    GREEN,
    PAGE,
    TIME_LABEL,
    VERMILION,
    Rows,
    add_colorbar,
    add_legend,
    early_to_late,
    new_figure,
    wrapped,
)
from ..errors import UserError
from .statistics import TimeChanges, columns_of, measure_correlation, summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curves = Mapping[str, Sequence[TimeChanges]]
LOOKS = [("-", BLUE, "o"), ("--", VERMILION, "s"), ("-.", GREEN, "^"), (":", "0.3", "D")]  # line, colour, marker
MOST_CURVES = len(LOOKS)


def draw_susceptibility(curves: Curves, convention: str = "all") -> tuple[Figure, Rows]:
    """chi and the correlation length as functions of time."""
    rows = [{"tokens": label, **row} for label, times in curves.items() for row in summary(times, convention)]
    figure, (panels,) = new_figure(PAGE, 2.5, columns=2)
    pairs = "" if convention == "all" else r",$\ i \leq j$"
    for axes, column, words in (
        (panels[0], "chi", rf"susceptibility $\chi${pairs}"),
        (panels[1], "correlation_length", "correlation length,\n" + r"$C(\xi) = C(0)/e$"),
    ):
        for label, (line, colour, marker) in zip(curves, LOOKS, strict=False):
            own = [row for row in rows if row["tokens"] == label and row[column] != ""]
            if not own:
                continue
            times, values = [row["k/N"] for row in own], [row[column] for row in own]
            errors = np.array([_errors(row, column) for row in own]).reshape(-1, 2).T
            axes.errorbar(times, values, errors, ls=line, color=colour, marker=marker, label=label, **ERROR_BARS)
        axes.set(xlabel=TIME_LABEL, ylabel=words)
        axes.set_ylim(bottom=0)
        axes.locator_params(axis="x", nbins=6)
    add_legend(figure, panels[0].get_legend_handles_labels()[0], most=len(curves))
    return figure, rows


def _errors(row: Mapping[str, Any], column: str) -> list[float]:
    """The distances from a value to the ends of its interval; 0 for an end that is not known."""
    low, high = (_end_or_value(row, column, end) for end in ("_low", "_high"))
    return [max(0.0, row[column] - low), max(0.0, high - row[column])]


def draw_correlations(curves: Curves) -> tuple[Figure, Rows]:
    """C(r)/C(0) at every time, against the distance."""
    rows: Rows = []
    for label, times in curves.items():
        for time in times:
            measured = measure_correlation(time)
            covariance = time.correlation.mean(axis=0)
            about = {"tokens": label, "k": time.step_reverse, "N": time.num_steps, "k/N": time.time}
            for i, r in enumerate(time.distance.tolist()):
                point = columns_of("relative", type(measured)(*(values[i] for values in measured)))
                rows.append({**about, "r": r, "covariance": float(covariance[i]), **dict(point)})
    x = "r", r"distance $r$ of two tokens"
    return _draw_against(rows, len(curves) > 1, x, "relative", r"$C(r)\,/\,C(0)$", band=True), rows


def draw_spectra(curves: Curves) -> tuple[Figure, Rows]:
    """The power spectrum of the change at every time, relative to the starts, for curves that have spectra."""
    rows: Rows = []
    for label, times in curves.items():
        for time in times:
            if time.wavenumber is None or not any(map(_has_spectrum, times)):
                continue
            change, start = time.spectrum_change.mean(axis=0), time.spectrum_start.mean(axis=0)
            about = {"tokens": label, "k": time.step_reverse, "N": time.num_steps, "k/N": time.time}
            for number, of_change, of_start in zip(time.wavenumber.tolist(), change, start, strict=True):
                relative = float(of_change / of_start) if of_start > 0 else ""
                power = {"power_of_change": float(of_change), "power_of_start": float(of_start)}
                rows.append({**about, "wavenumber": number, **power, "relative": relative})
    x = "wavenumber", r"wave number $|k|$"
    return _draw_against(
        rows, len(curves) > 1, x, "relative", "power of the change\nrelative to the start", log_y=True
    ), rows


def _draw_against(
    rows: Rows, titled: bool, x: tuple[str, str], column: str, words: str, band: bool = False, log_y: bool = False
) -> Figure:
    """A panel per curve with data, with a line per time, coloured by the time; x is (column, label)."""
    colours, (x_column, x_label) = early_to_late(), x
    defined = [row for row in rows if row[column] != "" and row[x_column] > 0]
    labels = list(dict.fromkeys(row["tokens"] for row in defined))
    width = PAGE / 2 * min(2, len(labels))
    figure, (panels,) = new_figure(width, 2.5, columns=len(labels))
    first, last = min(row["k/N"] for row in rows), max(row["k/N"] for row in rows)
    for label, axes in zip(labels, panels, strict=True):
        own = [row for row in defined if row["tokens"] == label]
        for time in dict.fromkeys(row["k/N"] for row in own):
            points, colour = [row for row in own if row["k/N"] == time], colours((time - first) / (last - first or 1))
            at, values = [row[x_column] for row in points], [row[column] for row in points]
            if band:
                low, high = ([_end_or_value(row, column, end) for row in points] for end in ("_low", "_high"))
                axes.fill_between(at, low, high, color=colour, alpha=0.25, linewidth=0)
            axes.plot(at, values, color=colour, marker="." if len(at) < 30 else "")
        axes.set(xlabel=x_label, xscale="log", yscale="log" if log_y else "linear")
        _set_ticks(axes, sorted({row[x_column] for row in own}))
        if titled:
            axes.set_title(wrapped(label, (width - 1) / len(labels) - 0.2), fontsize=7)
    panels[0].set_ylabel(words)
    add_colorbar(figure, panels, first, max(last, first + 0.01), TIME_LABEL, pad=0.02)
    return figure


def _set_ticks(axes: Axes, at: Sequence[float]) -> None:
    """Ticks of a logarithmic axis as plain numbers: at the points, or at 1, 2, 5, 10, ... if these would be crowded."""
    if any(b < 1.4 * a for a, b in pairwise(at)):
        decades = range(math.floor(math.log10(at[0])), math.ceil(math.log10(at[-1])) + 1)
        at = [tick for e in decades for d in (1, 2, 5) if at[0] <= (tick := d * 10.0**e) <= at[-1]]
    axes.set_xticks(at, [f"{tick:g}" for tick in at])
    axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)


def _end_or_value(row: Mapping[str, Any], column: str, end: str) -> float:
    return row[column] if row[column + end] == "" else row[column + end]


def figures_of(curves: Curves, convention: str = "all") -> dict[str, Callable[[], tuple[Figure, Rows]]]:
    """The figures that can be drawn of these curves, by name. Raises UserError if there are none."""
    times = [time for of_curve in curves.values() for time in of_curve]
    if not any(time.chi_denominator.sum() > 0 for time in times):
        chosen = ", ".join(dict.fromkeys(str(time.step_reverse) for time in times))
        raise UserError(
            f"there is nothing to plot: the samples of every start change alike, at k = {chosen} (--changes)"
        )
    figures: dict[str, Callable[[], tuple[Figure, Rows]]] = {
        "change_correlations": lambda: draw_correlations(curves),
        "susceptibility": lambda: draw_susceptibility(curves, convention),
    }
    if any(map(_has_spectrum, times)):
        figures["change_spectra"] = lambda: draw_spectra(curves)
    elif any(time.wavenumber is not None for time in times):
        logger.info("no change_spectra: no start differs from its samples by more than a constant")
    return figures


def _has_spectrum(time: TimeChanges) -> bool:
    """Whether there are spectra, with power to draw on a logarithmic axis."""
    if time.wavenumber is None:
        return False
    change, start = time.spectrum_change.mean(axis=0), time.spectrum_start.mean(axis=0)
    return bool(((time.wavenumber > 0) & (change > 0) & (start > 0)).any())
