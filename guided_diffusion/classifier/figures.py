"""The style of figures, and their files: PNG, PDF and a CSV of the plotted points."""

from __future__ import annotations

import csv
import importlib.util
import io
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import blobfile as bf
import numpy as np

from ..errors import ResultError, UserError
from ..system.files import is_remote, write_whole

try:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Colormap, ListedColormap, Normalize
    from matplotlib.figure import Figure
    from matplotlib.textpath import TextPath
except ModuleNotFoundError:  # optional: see check_packages
    matplotlib = None

Rows = list[dict[str, Any]]  # rows of a CSV file: value by column

COLUMN, PAGE = 3.4, 7.0  # widths in inches: one column, and a page of two columns
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so figures look the same everywhere
    "font.size": 7,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "legend.columnspacing": 1.2,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.0,
    "lines.markersize": 3.0,
    "pdf.fonttype": 42,  # keeps text in the PDF as text
}
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"  # from the colour-blind-safe palette of Okabe and Ito
ERROR_BARS = {"markerfacecolor": "none", "elinewidth": 0.6, "capsize": 1.5}  # open markers keep overlaps visible
CHANCE = {"color": "0.45", "linestyle": ":", "linewidth": 0.8, "label": "chance level"}
TIME_LABEL = "time of reversal k/N"


def check_packages() -> None:
    """Raise UserError if matplotlib or scipy (the extra "figures") is not installed."""
    for package in ("matplotlib", "scipy"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f'figures need {package}: pip install -e ".[figures]"')


def check_output(folder: str) -> None:
    """Raise UserError if a file is in the way of the folder for figures."""
    path = "" if is_remote(folder) else folder
    while path and not bf.exists(path):
        path = os.path.dirname(path)
    if path and not bf.isdir(path):
        raise UserError(f"--output {folder}: {path} is a file, expected a folder")


def style() -> AbstractContextManager:
    """A context that sets `STYLE` on top of matplotlib's defaults, regardless of the user's settings."""
    return matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE})


def new_figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Figure, np.ndarray]:
    """A figure of this size in inches, and an array (rows, columns) of its Axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def new_mosaic(
    width: float, height: float, layout: Sequence[Sequence[str]], width_ratios: Sequence[float]
) -> tuple[Figure, dict[str, Any]]:
    """A figure of this size in inches, and its Axes by their name in the layout, as in `Figure.subplot_mosaic`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplot_mosaic(layout, width_ratios=width_ratios)


def early_to_late() -> Colormap:
    """Viridis without its last tenth, which is too pale for lines on white."""
    return ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.9, 256)))


def shades(count: int) -> list[Any]:
    """`count` colours, from dark to light."""
    return [early_to_late()(i / max(1, count - 1)) for i in range(count)]


def two_sided(below: int, above: int) -> list[Any]:
    """Colours on both sides of a critical value, darker nearer to it: `below` blue ones, then `above` orange ones."""
    blues, oranges = (matplotlib.colormaps[name](np.linspace(0.4, 0.95, 256)) for name in ("Blues", "Oranges"))
    nearer = [blues[255 * (i + 1) // below] for i in range(below)]
    return nearer + [oranges[255 * (above - i) // above] for i in range(above)]


def add_legend(figure: Figure, handles: Sequence[Any], most: int = 2) -> None:
    """Add a legend above the Axes, with at most `most` columns, or as many as fit its labels."""
    em = STYLE["legend.fontsize"] / 72  # inches
    beside, between = (STYLE["legend.handlelength"] + 0.8) * em, STYLE["legend.columnspacing"] * em
    width = figure.get_figwidth() - 2 * em
    labels = [shortened(handle.get_label(), width - beside) for handle in handles]
    widths = [text_width(label) + beside for label in labels]
    for columns in range(most, 0, -1):
        filled = [max(column) for column in np.array_split(widths, columns) if len(column)]  # as matplotlib does
        if sum(filled) + (len(filled) - 1) * between <= width:
            break
    figure.legend(handles, labels, loc="outside upper center", ncols=columns)


def text_width(text: str, size: float = STYLE["legend.fontsize"]) -> float:
    """The width of text in inches; `size` in points."""
    return TextPath((0, 0), text, size=size).get_extents().width / 72


def shortened(text: str, width: float) -> str:
    """Text that fits a width in inches: if it does not, without its middle."""
    for kept in range(len(text), 0, -1):
        short = text if kept == len(text) else f"{text[: -(-kept // 2)]}…{text[len(text) - kept // 2 :]}"
        if text_width(short) <= width:
            break
    return short


def wrapped(name: str, width: float) -> str:
    """A name in lines that fit a width in inches, broken after dots, hyphens and the like."""
    lines = [""]
    for piece in re.findall(r".+?(?:[-._/ ]|$)", name):
        if lines[-1] and text_width((lines[-1] + piece).rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(shortened(line.strip(), width) for line in lines)


def add_colorbar(figure: Figure, axes: Any, low: float, high: float, label: str, pad: float) -> Any:
    """Add a bar of the colours of `early_to_late`, labelled from `low` to `high`, next to one or several Axes."""
    bar = figure.colorbar(ScalarMappable(Normalize(low, high), early_to_late()), ax=axes, pad=pad, aspect=25)
    bar.set_label(label)
    bar.outline.set_linewidth(0.6)
    return bar


def add_shades_bar(figure: Figure, axes: Any, labels: Sequence[str], label: str) -> None:
    """Add a bar of `shades`, one for each of the labels, next to one or several Axes."""
    colours = ScalarMappable(Normalize(-0.5, len(labels) - 0.5), ListedColormap(shades(len(labels))))
    bar = figure.colorbar(colours, ax=axes, pad=0.02, aspect=25)
    bar.set_ticks(range(len(labels)), labels=labels)
    bar.ax.tick_params(length=0)
    bar.set_label(label, labelpad=-6)
    bar.outline.set_linewidth(0.6)


def columns(rows: Rows, *names: str, **chosen: Any) -> list[np.ndarray]:
    """Some columns of those rows that have the chosen values; NaN where undefined."""
    own = [row for row in rows if all(row[name] == value for name, value in chosen.items())]
    return [np.array([np.nan if row[name] == "" else row[name] for row in own]) for name in names]


def errors_between(value: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Distances from values to the ends of their intervals, (2, n); rounding may make one negative at 0 or 1."""
    return np.maximum([value - low, high - value], 0)


def write_figures(output: str, figures: Mapping[str, Callable[[], tuple[Figure, Rows]]]) -> None:
    """Draw figures, given by name, and write their files once all are drawn."""
    files: dict[str, bytes] = {}
    with style():
        for name, figure_and_rows in figures.items():
            files |= render(name, *figure_and_rows())
    for name, data in files.items():
        write_whole(f"{output}/{name}", data)


def render(name: str, figure: Figure, rows: Rows) -> dict[str, bytes]:
    """The contents of a figure's files, by name. Equal figures give equal bytes.

    Raises ResultError if a number in the rows is NaN or infinite; undefined values must be "".
    """
    for row in rows:
        for column, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                about = ", ".join(f"{key} {row[key]}" for key in list(row)[:4] if key != column)
                raise ResultError(f"{column} is {value} in the figure {name} ({about}): nothing was drawn")
    files = {f"{name}.csv": to_csv(rows)}
    for ending, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
        data = io.BytesIO()
        figure.savefig(data, format=ending, dpi=300, metadata=metadata)
        figure.set_layout_engine("none")  # the layout takes as long as drawing, and serves both files
        files[f"{name}.{ending}"] = data.getvalue()
    return files


def to_csv(rows: Rows) -> bytes:
    """The contents of a CSV file with a line for each row, and the first row's columns."""
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue().encode(errors="surrogateescape")
