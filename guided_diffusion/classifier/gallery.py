"""The gallery of plot_figures.py: starting images and their samples."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UserError
from ..images.folder import list_images, parse_sample, without_extension
from ..images.io import open_image, read_image
from ..runs.inputs import Inputs, inputs_of, read_entries
from .figures import COLUMN, PAGE, TIME_LABEL, Rows, new_figure
from .pairs import SAMPLES, STARTS
from .results import TimeResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def choose_names(names: list[str], requested: Sequence[str], count: int, seed: int) -> list[str]:
    """Starting images for the gallery: those `requested` by path or file name, or else random ones."""
    if not requested:
        chosen = np.random.default_rng(seed).choice(len(names), size=min(count, len(names)), replace=False)
        return [names[i] for i in sorted(chosen)]
    matches = []
    for request in requested:
        matching = [name for name in names if request in aliases(name)]
        if len(matching) != 1:
            close = matching[:3] or difflib.get_close_matches(request, names, n=3, cutoff=0.3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise UserError(
                f"--gallery {request}: {len(matching) or 'none'} of the {len(names)} images match, expected one{hint}"
            )
        matches += matching
    return matches


def aliases(name: str) -> set[str]:
    """The names of a starting image: with and without folders, with and without extension."""
    return {form for path in (name, without_extension(name)) for form in (path, os.path.basename(path))}


def find_samples(data_dir: str, result: TimeResult, names: Sequence[str]) -> list[str]:
    """Paths of the first samples of starting images at one time. Raises UserError if one is missing."""
    folder = f"{data_dir}/t_{result.step_reverse}_{result.num_steps}_images"
    samples = {}
    for path in list_images(folder):
        sample = parse_sample(without_extension(path))
        if sample and (sample.trajectory, sample.turn) == (1, 1):
            samples[sample.start] = path
    if missing := [name for name in names if without_extension(name) not in samples]:
        raise UserError(f"{folder} (--data_dir) has no sample of {missing[0]}, which is in the results (--results)")
    return [f"{folder}/{samples[without_extension(name)]}" for name in names]


def recorded_files(args: argparse.Namespace, result: str) -> tuple[Inputs, Inputs]:
    """The recorded contents of the starting images and the samples that a result was computed from."""
    entries = read_entries(inputs_of(result)) or {}
    return (
        Inputs(args.starting_data_dir, "--starting_data_dir", entries.get(STARTS)),
        Inputs(args.data_dir, "--data_dir", entries.get(SAMPLES)),
    )


def draw_gallery(
    series: Sequence[TimeResult],
    names: Sequence[str],
    starting_data_dir: str,
    data_dir: str,
    known: Sequence[tuple[Inputs, Inputs]] | None = None,
) -> tuple[Figure, Rows]:
    """One row per starting image, with its sample at each time.

    `known` is the result of `recorded_files` for each time. Raises UserError if a file has changed since.
    """
    known = known or [(Inputs(starting_data_dir, ""), Inputs(data_dir, "")) for _ in series]
    paths = [find_samples(data_dir, result, names) for result in series]  # by time, then image
    columns, count = 1 + len(series), len(names)
    width = COLUMN if columns <= 4 else PAGE
    cell = width / columns
    figure, panels = new_figure(width, cell * count + 0.32, columns=columns, rows=count)
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)
    rows = []
    for row, name in enumerate(names):
        samples = [
            np.asarray(open_image(of_time[row], inputs.digest_check(of_time[row].removeprefix(f"{data_dir}/"))))
            for of_time, (_, inputs) in zip(paths, known, strict=True)
        ]
        start = read_image(f"{starting_data_dir}/{name}", len(samples[0]), known[0][0].digest_check(name))
        rows.append({"row": row, "name": name, "k": "", "N": "", "k/N": "", "path": f"{starting_data_dir}/{name}"})
        of_times = zip(series, paths, strict=True)
        rows += [{"row": row, "name": name, **r.time_columns, "path": p[row]} for r, p in of_times]
        for axes, pixels in zip(panels[row], [start, *samples], strict=True):
            axes.imshow(pixels)
            axes.set_axis_off()
    panels[0, 0].set_title("start", fontsize=7, pad=2)
    for axes, result in zip(panels[0, 1:], series, strict=True):
        axes.set_title(f"{result.step_reverse / result.num_steps:.3g}", fontsize=7, pad=2)
    figure.supxlabel("samples, by " + TIME_LABEL, fontsize=8)
    return figure, rows
