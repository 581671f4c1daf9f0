"""How figures look, and their files: each as PNG and PDF, with a CSV of the points that it shows."""

from __future__ import annotations

import csv
import io
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ResultError, UserError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

Rows = list[dict[str, Any]]  # of a CSV: value by column

COLUMN, PAGE = 3.4, 7.0  # inches: the width of one column, and of a page of two
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture everywhere
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
    "pdf.fonttype": 42,  # text in the PDF stays text
}
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"  # of Okabe and Ito's colours, told apart by everyone
TIME_LABEL = "time of reversal k/N"


def need_matplotlib() -> None:
    """Raise UserError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError('figures need matplotlib: pip install -e ".[figures]"') from error


def style() -> AbstractContextManager:
    """The context to draw in: `STYLE` upon matplotlib's own defaults, whatever the user's settings are."""
    import matplotlib

    return matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE})


def new_figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Figure, np.ndarray]:
    """A figure of this size in inches, and its panels, an array (rows, columns) of Axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def early_to_late() -> Colormap:
    """From dark to light, as evenly for the colour-blind; without viridis' last tenth, too pale for a line on white."""
    import matplotlib
    from matplotlib.colors import ListedColormap

    return ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.9, 256)))


def render(name: str, figure: Figure, rows: Rows) -> dict[str, bytes]:
    """The bytes of a figure's files, by name; the same for the same figure.

    Raises ResultError if a number in the rows is NaN or infinite. A value that is not defined is "".
    """
    for row in rows:
        for column, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                about = ", ".join(f"{key} {row[key]}" for key in list(row)[:4] if key != column)
                raise ResultError(f"{column} is {value} in the figure {name} ({about}): nothing is drawn")
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files = {f"{name}.csv": table.getvalue().encode(errors="surrogateescape")}
    for ending, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
        data = io.BytesIO()
        figure.savefig(data, format=ending, dpi=300, metadata=metadata)
        files[f"{name}.{ending}"] = data.getvalue()
    return files
