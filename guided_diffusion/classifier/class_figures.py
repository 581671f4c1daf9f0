"""Figures of the classes of samples: transitions between classes, and statistics of several samples of each image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .class_statistics import agreement, agreement_between_images, class_entropy, largest_entropy
from .figures import (
    BLUE,
    CHANCE,
    COLUMN,
    ERROR_BARS,
    TIME_LABEL,
    VERMILION,
    Rows,
    add_legend,
    columns,
    early_to_late,
    errors_between,
    new_figure,
)
from .results import TimeResult
from .retention import fraction_interval

try:
    from matplotlib.colors import PowerNorm
except ModuleNotFoundError:  # optional: see figures.check_packages
    PowerNorm = None

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_CELLS = 100  # rows of a matrix of classes in the figure: more would be too small to see
NORMAL_95 = 1.96  # half the width of the 95% interval of a normal distribution, in standard deviations


def predicted_classes(result: TimeResult) -> tuple[np.ndarray, np.ndarray]:
    """The predicted classes of the starting images (n,), and of their samples (n, M)."""
    starts, samples = (result.by_start(result.logits[f"logits_{of}"].argmax(axis=1)) for of in ("start", "sample"))
    return starts[:, 0], samples


# Transitions between classes


def draw_class_transitions(series: Sequence[TimeResult]) -> tuple[Figure, Rows]:
    """The matrix of transitions from the class of the starting image to that of the sample, at each time.

    Classes are in the order of their indices. If there are more than `MOST_CELLS`, cells of the figure are blocks of
    consecutive classes; the rows of the CSV are single classes.
    """
    num_classes = series[0].logits["logits_start"].shape[1]
    beside = min(5, len(series))
    lines = -(-len(series) // beside)
    cell = max(1.33, 2.1 / beside)
    width = cell * beside + (0.35 if beside == 5 else 0.95)
    figure, panels = new_figure(width, cell * lines + 0.45, columns=beside, rows=lines)
    cells, rows = early_to_late().with_extremes(bad="0.9"), []
    for result, axes in zip(series, panels.flat, strict=False):
        starts, samples = predicted_classes(result)
        matrix = block_matrix(starts, samples, num_classes)
        extent = (-0.5, num_classes - 0.5, num_classes - 0.5, -0.5)
        image = axes.imshow(matrix, cmap=cells, norm=PowerNorm(0.5, 0, 1), extent=extent, interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"{result.step_reverse / result.num_steps:.3g}", fontsize=7, pad=2)
        rows += transition_rows(result, starts, samples, num_classes)
    for axes in panels.flat[len(series) :]:
        axes.set_axis_off()
    bar = figure.colorbar(image, ax=panels, pad=0.01, aspect=25)
    bar.set_label("fraction of samples")
    bar.outline.set_linewidth(0.6)
    words = f"predicted class of the sample (0 to {num_classes - 1}),", f"by {TIME_LABEL}"
    figure.supxlabel(("\n" if width < 4.5 else " ").join(words), fontsize=8)
    figure.supylabel("that of the starting image", fontsize=8)
    return figure, rows


def block_matrix(starts: np.ndarray, samples: np.ndarray, num_classes: int) -> np.ndarray:
    """The fraction of the samples in a block of classes, given the block of the starting image; NaN if there is none.

    Args:
        starts: classes of the starting images (n,).
        samples: classes of their samples (n, M).
        num_classes: number of classes, which are in blocks of one if they are at most `MOST_CELLS`.
    """
    block = -(-num_classes // MOST_CELLS)
    side = -(-num_classes // block)
    cells = (starts // block)[:, None] * side + samples // block
    counts = np.bincount(cells.ravel(), minlength=side**2).reshape(side, side).astype(np.float64)
    totals = counts.sum(axis=1, keepdims=True)
    return np.divide(counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)


def transition_rows(result: TimeResult, starts: np.ndarray, samples: np.ndarray, num_classes: int) -> Rows:
    """The transitions that occur, in the order of the classes."""
    pairs, counts = np.unique(starts[:, None] * num_classes + samples, return_counts=True)
    totals = np.bincount(starts, minlength=num_classes) * samples.shape[1]
    before, after = pairs // num_classes, pairs % num_classes
    found = zip(before.tolist(), after.tolist(), counts.tolist(), (counts / totals[before]).tolist(), strict=True)
    names = ("class_start", "class_sample", "samples", "fraction")
    return [result.time_columns | dict(zip(names, values, strict=True)) for values in found]


# Several samples of each image


def draw_agreement(series: Sequence[TimeResult]) -> tuple[Figure, Rows]:
    """The probability that two samples have the same class: of one image, with 95% intervals, and of two images."""
    rows = []
    for result in series:
        _, samples = predicted_classes(result)
        pairs = agreement(samples)
        low, high = fraction_interval(pairs, result.num_trajectories)
        other = agreement_between_images(samples)
        about = result.time_columns | {"images": len(samples), "samples": samples.size}
        same = {"same_class": float(pairs.mean()), "low": low, "high": high}
        rows.append(about | same | {"same_class_of_two_images": other if np.isfinite(other) else ""})
    figure, ((axes,),) = new_figure(COLUMN, 2.6)
    times, value, low, high, of_two = columns(rows, "k/N", "same_class", "low", "high", "same_class_of_two_images")
    errors = errors_between(value, low, high)
    label = "two samples of one image"
    handles = [axes.errorbar(times, value, errors, color=BLUE, marker="o", label=label, **ERROR_BARS)]
    if rows[0]["same_class_of_two_images"] != "":
        look = CHANCE | {"marker": ".", "label": "samples of two images"}
        handles += axes.plot(times, of_two, **look)
    axes.set(xlabel=TIME_LABEL, ylabel="probability of the same class", xlim=(-0.02, 1.02), ylim=(-0.04, 1.04))
    add_legend(figure, handles)
    return figure, rows


def draw_entropy(series: Sequence[TimeResult]) -> tuple[Figure, Rows]:
    """The entropy of the class of the samples of an image: its mean over images, with 95% intervals."""
    rows = []
    for result in series:
        _, samples = predicted_classes(result)
        plain, corrected = class_entropy(samples)
        n, value = len(samples), float(corrected.mean())
        error = NORMAL_95 * float(corrected.std(ddof=1)) / np.sqrt(n) if n > 1 else 0.0
        row = result.time_columns | {"images": n, "samples": samples.size, "entropy": value}
        row |= {"low": max(0.0, value - error), "high": value + error, "uncorrected": float(plain.mean())}
        largest = largest_entropy(samples.shape[1], result.logits["logits_sample"].shape[1])
        rows.append(row | {"largest": largest})
    figure, ((axes,),) = new_figure(COLUMN, 2.6)
    names = ("k/N", "entropy", "low", "high", "uncorrected", "largest")
    times, value, low, high, uncorrected, largest = columns(rows, *names)
    errors, look = errors_between(value, low, high), {"color": BLUE, "marker": "o", "label": "Miller-Madow"}
    handles = [axes.errorbar(times, value, errors, **look, **ERROR_BARS)]
    handles += axes.plot(times, uncorrected, color=VERMILION, linestyle="--", marker=".", label="uncorrected")
    handles += axes.plot(times, largest, **(CHANCE | {"marker": ".", "label": "largest possible"}))
    axes.set(xlabel=TIME_LABEL, ylabel="entropy of the class,\ngiven the image (nats)", xlim=(-0.02, 1.02))
    axes.set_ylim(-0.04 * largest.max(), 1.08 * largest.max())
    add_legend(figure, handles, most=3)
    return figure, rows
