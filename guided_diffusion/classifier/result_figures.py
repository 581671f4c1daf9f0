"""Figures of similarities and class retention as functions of time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .figures import (
    BLUE,
    CHANCE,
    COLUMN,
    ERROR_BARS,
    GREEN,
    PAGE,
    TIME_LABEL,
    VERMILION,
    Rows,
    add_colorbar,
    add_legend,
    columns,
    early_to_late,
    errors_between,
    new_figure,
    wrapped,
)
from .results import TimeResult, class_ranks
from .retention import STATISTICS, Estimate, Transition, fit_transition, fraction_interval
from .ridgeline import draw_ridges, height_of, histograms_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOGITS = re.compile(r"(classifier|fc|heads?)(\.|$)")  # last layer of torchvision's networks, if it is not on record


def times_of(series: Sequence[TimeResult]) -> np.ndarray:
    """The times k/N: (T,)."""
    return np.array([result.step_reverse / result.num_steps for result in series])


def counted(series: Sequence[TimeResult]) -> str:
    """What fractions count: images, or samples if there are several of an image."""
    return "samples" if any(result.num_trajectories > 1 for result in series) else "images"


# Similarity against time


def measure_similarity(series: Sequence[TimeResult]) -> Rows:
    """Statistics of the cosine similarity over the images for which it is defined, at each layer and time.

    An image with several samples counts only if it is defined for all of them.
    """
    rows, several = [], any(result.num_trajectories > 1 for result in series)
    for result in series:
        for depth, layer in enumerate(result.differences["layers"].tolist()):
            values = result.by_start(result.differences["cosine"][:, depth])
            values = values[np.isfinite(values).all(axis=1)]  # undefined if all activations of the layer are 0
            row = {"layer": layer, "depth": depth, **result.time_columns, "images": len(values)}
            row |= {"samples": values.size} if several else {}
            for statistic in STATISTICS.values():
                estimate = statistic(values) if len(values) else Estimate(np.nan, np.nan, np.nan)
                column = statistic.__name__
                row |= {column: estimate.value, f"{column}_low": estimate.low, f"{column}_high": estimate.high}
            quartiles = np.quantile(values, [0.25, 0.75]).tolist() if len(values) else [np.nan, np.nan]
            rows.append({**row, "quartile_1": quartiles[0], "quartile_3": quartiles[1]})
    return rows


def ends_with_logits(result: TimeResult) -> bool:
    """Whether the last layer of a result is the classifier's logits."""
    last = result.differences["layers"].tolist()[-1]
    known = (result.record or {}).get("logits_layers")
    return last in known if isinstance(known, list) else LOGITS.match(last) is not None


def draw_similarity(series: Sequence[TimeResult], statistic: str) -> tuple[Figure, Rows]:
    """A statistic of each layer's similarity as a function of time, with bands of one standard error."""
    rows = measure_similarity(series)
    layers = series[0].differences["layers"].tolist()
    figure, ((axes,),) = new_figure(COLUMN, 2.6)
    colours, column = early_to_late(), STATISTICS[statistic].__name__
    times = times_of(series)
    for depth, layer in enumerate(layers):
        value, low, high = columns(rows, *(column + end for end in ("", "_low", "_high")), depth=depth)
        colour, look = colours(depth / max(1, len(layers) - 1)), {"linewidth": 0.7, "marker": "."}
        look |= {"label": layer} if len(layers) == 1 else {}
        if depth == len(layers) - 1 and ends_with_logits(series[0]):
            colour, look = "black", {"linestyle": "--", "marker": "s", "zorder": 4, "label": "logits"}
        axes.fill_between(times, low, high, color=colour, alpha=0.3, linewidth=0)
        if len(times) == 1:  # too narrow for a band
            axes.vlines(times, low, high, color=colour, linewidth=0.5)
        axes.plot(times, value, color=colour, **look)
    axes.set(xlabel=TIME_LABEL, ylabel=f"cosine similarity,\n{column} over images", xlim=(-0.02, 1.02))
    axes.set_ylim(top=1.04)
    if len(layers) > 1:
        bar = add_colorbar(figure, axes, 1, len(layers), "layer (early to late)", pad=0.02)
        bar.set_ticks([1, len(layers)])
    if handles := axes.get_legend_handles_labels()[0]:
        add_legend(figure, handles)
    # No statistic is defined for a layer whose activations are all 0.
    return figure, [row if row["images"] else {k: "" if v != v else v for k, v in row.items()} for row in rows]


# Class retention


def measure_retention(series: Sequence[TimeResult]) -> tuple[Rows, Transition | None]:
    """The fractions of images that keep their class, with 95% intervals and chance levels; and the transition."""
    classes = series[0].logits["logits_start"].shape[1]
    rows, kept, most = [], [], max(result.num_trajectories for result in series)
    for result in series:
        logits, labels = result.logits["logits_sample"], result.logits["labels"]
        known = (labels >= 0) & (labels < classes)
        same = result.by_start(result.logits["logits_start"].argmax(axis=1) == logits.argmax(axis=1))
        kept.append(same.mean(axis=1))
        measures = {"predicted class kept": (same, 1)}
        if known.any():
            for top in (1, 5) if classes > 5 else (1,):
                is_kept = class_ranks(logits[known], labels[known]) < top
                measures[f"true class in top {top}"] = (result.by_start(is_kept), top)
        for measure, (is_kept, top) in measures.items():  # (images, samples of each)
            count, total = int(is_kept.sum()), is_kept.size
            low, high = fraction_interval(is_kept.mean(axis=1), result.num_trajectories)
            row = {"measure": measure, **result.time_columns, "images": len(is_kept)}
            row |= {"samples": total} if most > 1 else {}
            row |= {"count": count, "fraction": count / total, "low": low, "high": high}
            rows.append(row | {"chance": min(1, top / classes)})
    return rows, fit_transition(times_of(series), np.stack(kept), num_samples=most)


def draw_retention(rows: Rows, transition: Transition | None, series: Sequence[TimeResult]) -> tuple[Figure, Rows]:
    """The fractions as functions of time, the chance levels, and the transition."""
    figure, ((axes,),) = new_figure(COLUMN, 2.6)
    handles = []  # in the order of the legend
    looks = {
        "predicted class kept": {"color": BLUE, "marker": "o", "zorder": 5},
        "true class in top 1": {"color": VERMILION, "marker": "s", "zorder": 4, "linestyle": "--", "markersize": 4.5},
        "true class in top 5": {"color": GREEN, "marker": "^", "zorder": 3, "linestyle": "-.", "markersize": 6},
    }
    for measure, look in looks.items():
        value, low, high = columns(rows, "fraction", "low", "high", measure=measure)
        if len(value):
            errors = errors_between(value, low, high)
            handles.append(axes.errorbar(times_of(series), value, errors, label=measure, **ERROR_BARS, **look))
    for chance in sorted({row["chance"] for row in rows}):
        line = axes.axhline(chance, zorder=1, **CHANCE)
    handles.append(line)
    if transition:
        axes.axvspan(transition.low, transition.high, color="0.85", linewidth=0, zorder=0)
        label = f"transition {transition.time:.3f} ± {transition.error:.3f}"
        handles.append(axes.axvline(transition.time, color="0.3", linewidth=0.8, zorder=1, label=label))
    axes.set(xlabel=TIME_LABEL, ylabel=f"fraction of {counted(series)}", xlim=(-0.02, 1.02), ylim=(-0.04, 1.04))
    add_legend(figure, handles)
    return figure, rows


# Distributions


def draw_distributions(series: Sequence[TimeResult], bins: int) -> tuple[Figure, Rows]:
    """Histograms over images of the similarity at an early, a middle and the last layer: a row per time, early on top.

    Peaks become lower and broader with time by more than a figure can show, so each row is scaled to its own peak.
    """
    layers = series[0].differences["layers"].tolist()
    depths = sorted({0, len(layers) // 2, len(layers) - 1})
    figure, (panels,) = new_figure(PAGE, height_of(len(series)), columns=len(depths))
    rows = []
    for depth, axes in zip(depths, panels, strict=True):
        edges, histograms = histograms_of([result.differences["cosine"][:, depth] for result in series], bins)
        draw_ridges(axes, edges, histograms, times_of(series))
        axes.set_xlabel("cosine similarity")
        for result, counts in zip(series, histograms, strict=True):
            ends = zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)
            about = {"layer": layers[depth], "depth": depth, **result.time_columns}
            rows += [{**about, "from": low, "to": high, counted(series): count} for low, high, count in ends]
        title = f"{layers[depth]} ({depth + 1} of {len(layers)})"
        axes.set_title(wrapped(title, PAGE / len(depths) - 0.4), fontsize=7)
    for axes in panels[1:]:
        axes.tick_params(labelleft=False)
    panels[0].set_ylabel(TIME_LABEL)
    return figure, rows
