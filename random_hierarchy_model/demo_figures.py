"""The figure of what survives at each level, as scripts/demo.py finds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from guided_diffusion.classifier.figures import (
    BLUE,
    CHANCE,
    ERROR_BARS,
    GREEN,
    PAGE,
    TIME_LABEL,
    VERMILION,
    Rows,
    columns,
    new_mosaic,
    shades,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EXACT, LOOP, UNET, CONVNEXT = "exact posterior", "loop, exact denoiser", "loop, U-Net", "U-Net, seen by ConvNeXt"
MARKERS: dict[str, Any] = {"linestyle": "none", "clip_on": False}  # whole at k/N = 0 and 1
LOOKS: dict[str, dict[str, Any]] = {
    EXACT: {"color": "black", "linewidth": 1.2, "zorder": 2},
    LOOP: {"color": BLUE, "marker": "o", "markersize": 5, "zorder": 3, **MARKERS},
    UNET: {"color": VERMILION, "marker": "s", "markersize": 3, "zorder": 4, **MARKERS},
    CONVNEXT: {"color": GREEN, "marker": "^", "markersize": 7, "zorder": 1, **MARKERS},
}


def draw(rows: Rows) -> tuple[Figure, Rows]:
    """The fraction that survives as a function of time: of all levels together, and in a panel for each level."""
    levels = list(dict.fromkeys(row["level"] for row in rows))  # the class first
    beside = -(-len(levels) // 2)  # panels in each of two rows, to the right of the one of all levels
    places = [*levels, *"." * (2 * beside - len(levels))]
    layout = [["all levels", *places[:beside]], ["all levels", *places[beside:]]]
    figure, panels = new_mosaic(PAGE, 3.4, layout, width_ratios=[1.7, *[1] * beside])
    draw_together(panels["all levels"], rows, levels)
    handles: dict[str, Any] = {}
    for place, level in enumerate(levels):
        handles |= draw_level(panels[level], [row for row in rows if row["level"] == level])
        below = place + beside < len(levels)  # whether there is a panel below
        panels[level].tick_params(labelleft=place % beside == 0, labelbottom=not below)
    for name, axes in panels.items():
        axes.set_title(name, fontsize=8)
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.04, 1.04), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    fifths = [i / 5 for i in range(6)]
    panels["all levels"].set(ylabel="fraction that survives", xticks=fifths, yticks=fifths)
    figure.supxlabel(TIME_LABEL, fontsize=8)
    figure.legend(handles=list(handles.values()), loc="outside upper center", ncols=len(handles))
    return figure, rows


def draw_together(axes: Axes, rows: Rows, levels: Sequence[str]) -> None:
    """All levels in one panel, a colour each: the exact posterior as lines, the U-Net's samples as markers."""
    for level, colour in zip(levels, reversed(shades(len(levels))), strict=True):
        curves = {curve: [r for r in rows if (r["level"], r["curve"]) == (level, curve)] for curve in (EXACT, UNET)}
        times, exact = columns(curves[EXACT], "k/N", "kept")
        axes.plot(times, exact, color=colour, linewidth=1.2)
        axes.errorbar(*columns(curves[UNET], "k/N", "kept", "error"), **ERROR_BARS, **LOOKS[UNET] | {"color": colour})
        axes.plot([], [], color=colour, marker="s", markerfacecolor="none", linewidth=1.2, label=level)
    axes.legend(loc="upper right")  # free, because all curves fall


def draw_level(axes: Axes, rows: Rows) -> dict[str, Any]:
    """All curves of one level, and its chance level. Returns their handles for the legend, by label."""
    handles: dict[str, Any] = {}
    for curve, look in LOOKS.items():
        if own := [row for row in rows if row["curve"] == curve]:
            times, kept, errors = columns(own, "k/N", "kept", "error")
            bars = axes.errorbar(times, kept, None if curve == EXACT else errors, label=curve, **ERROR_BARS, **look)
            handles[curve] = bars
    return {**handles, "chance": axes.axhline(rows[0]["chance"], **CHANCE)}
