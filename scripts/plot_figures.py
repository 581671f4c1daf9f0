"""Plot similarity and class retention as functions of time, distributions of the similarity, and a gallery.

Reads the results of evaluate_classifier.py and, for the gallery, the images. Writes each figure as PNG and PDF, with a
CSV of the plotted points:

  similarity_against_time   cosine similarity at every layer; the CSV has mode, mean, median and quartiles
  class_retention           fraction of images that keep their class, with 95% (Wilson) intervals
  distributions             distributions of the similarity at an early, a middle and the last layer
  class_transitions         fraction of samples in each class, given the class of the starting image
  class_agreement           probability that two samples of an image have the same class
  class_entropy             entropy of the class of the samples of an image (Miller-Madow)
  gallery                   starting images and their samples (needs --starting_data_dir and --data_dir)

transition.json has the time at which class retention falls fastest, and its uncertainty. class_agreement and
class_entropy need several samples of each image (--num_trajectories of forward_backward_dataset_sample.py). Then all
errors are those from drawing other images, each with its samples. The gallery shows the first sample.

  python scripts/plot_figures.py --classifier_name convnext_base --timestep_respacing 250 \\
      --starting_data_dir datasets/ILSVRC2012/validation --data_dir results/diffused_ILSVRC2012_validation
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone's package, before any other
from guided_diffusion import logger
from guided_diffusion.classifier.class_figures import draw_agreement, draw_class_transitions, draw_entropy
from guided_diffusion.classifier.figures import (
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
    check_packages,
    early_to_late,
    new_figure,
    render,
    style,
)
from guided_diffusion.classifier.results import (
    TimeResult,
    class_ranks,
    default_folder,
    differences_file,
    name_in_files,
    read_series,
)
from guided_diffusion.classifier.retention import (
    FEWEST_TIMES,
    STATISTICS,
    Estimate,
    Transition,
    fit_transition,
    fraction_interval,
)
from guided_diffusion.command_line.flags import FOLDER, NAME, SAMPLES_DIR, TEXT, Flag, add_flags, flag, whole_number
from guided_diffusion.command_line.parser import ArgumentParser
from guided_diffusion.command_line.stopping import run
from guided_diffusion.errors import UserError
from guided_diffusion.images.folder import list_images, without_extension
from guided_diffusion.images.io import open_image, read_image
from guided_diffusion.runs.inputs import Inputs, evenly_spaced, inputs_of, read_entries
from guided_diffusion.script_util import number_of_steps
from guided_diffusion.system.files import write_json, write_whole

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_SHOWN = 10  # times in the gallery and the distributions: more would be too small to see
LOGITS = re.compile(r"(classifier|fc|heads?)(\.|$)")  # last layer of torchvision's networks


def main(argv: list[str] | None = None) -> int:
    """Plot the results. Returns 0; raises UserError."""
    args = create_argparser().parse_args(argv)
    check_packages()
    if bool(args.starting_data_dir) != bool(args.data_dir):
        raise UserError("the gallery needs both --starting_data_dir and --data_dir; without a gallery, give neither")
    name = name_in_files(args.classifier_name)
    folder = args.results or default_folder(name)
    respacing = args.timestep_respacing  # may be N itself, whatever --diffusion_steps is
    num_steps = int(respacing) if respacing.isdecimal() else number_of_steps(args.diffusion_steps, respacing)
    series = find_series(folder, name, num_steps)
    count, several = len(series[0].starts), [result for result in series if result.num_trajectories > 1]
    logger.info(f"{count} images at k = {', '.join(str(t.step_reverse) for t in series)} of N = {num_steps}")

    shown = evenly_spaced(series, MOST_SHOWN)
    if len(shown) < len(series):
        logger.info(f"gallery, distributions and class_transitions show {len(shown)} of the {len(series)} times")

    draw: dict[str, Callable[[], tuple[Figure, Rows]]] = {}
    if args.data_dir:  # first, because most mistakes show here
        chosen = choose_names(series[0].starts.tolist(), args.gallery, args.gallery_count, args.seed)
        known = [recorded_files(args, differences_file(folder, name, t.step_reverse, t.num_steps)) for t in shown]
        draw["gallery"] = lambda: draw_gallery(shown, chosen, args.starting_data_dir, args.data_dir, known)
    retention, transition = measure_retention(series)
    draw["similarity_against_time"] = lambda: draw_similarity(series, args.statistic)
    draw["class_retention"] = lambda: draw_retention(retention, transition, series)
    draw["distributions"] = lambda: draw_distributions(shown, args.bins)
    draw["class_transitions"] = lambda: draw_class_transitions(shown)
    if several:
        draw["class_agreement"] = lambda: draw_agreement(several)
        draw["class_entropy"] = lambda: draw_entropy(several)

    files = {}
    with style():
        for name, figure_and_rows in draw.items():
            files |= render(name, *figure_and_rows())
    for name, data in files.items():  # after all figures are drawn
        write_whole(f"{args.output}/{name}", data)
    write_json(f"{args.output}/transition.json", transition and {"images": count, **asdict(transition)})

    logger.info(describe(transition, len(series)))
    if not args.data_dir:
        logger.info("no gallery: it needs --starting_data_dir and --data_dir")
    if not several:
        logger.info("no class_agreement and class_entropy: they need several samples of each image")
    logger.info(f"{', '.join(draw)} (png, pdf, csv) and transition.json are in {args.output}")
    return 0


def find_series(folder: str, name: str, num_steps: int) -> list[TimeResult]:
    """The results at all times k of N = `num_steps`, in order. Raises UserError if they do not belong together."""
    results = read_series(folder, name)
    series = [result for result in results if result.num_steps == num_steps]
    if not series:
        others = ", ".join(str(n) for n in sorted({result.num_steps for result in results}))
        raise UserError(f"{folder} has no results for N = {num_steps}, only for N = {others} (--timestep_respacing)")
    first = series[0]
    for result in series:
        layers = result.differences["layers"], first.differences["layers"]
        for found, expected, what in ((result.starts, first.starts, "images"), (*layers, "layers")):
            if not np.array_equal(found, expected):
                raise UserError(
                    f"k = {first.step_reverse} and k = {result.step_reverse} of N = {num_steps} in {folder} have "
                    f"different {what} ({len(expected)} and {len(found)}).\n"
                    "Evaluate all times together: evaluate_classifier.py --time_series"
                )
    if len({result.logits["logits_start"].shape[1] for result in series}) > 1:
        raise UserError(f"the results in {folder} are from classifiers with different numbers of classes (--results)")
    if not len(first.differences["names"]) or not len(first.differences["layers"]):
        raise UserError(f"the results in {folder} have no images or no layers (--results)")
    return series


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


def draw_similarity(series: Sequence[TimeResult], statistic: str) -> tuple[Figure, Rows]:
    """A statistic of each layer's similarity as a function of time, with bands of one standard error."""
    rows = measure_similarity(series)
    layers = series[0].differences["layers"].tolist()
    figure, ((axes,),) = new_figure(COLUMN, 2.6)
    colours, column = early_to_late(), STATISTICS[statistic].__name__
    times = times_of(series)
    for depth, layer in enumerate(layers):
        own = [row for row in rows if row["depth"] == depth]
        value, low, high = (np.array([row[column + end] for row in own]) for end in ("", "_low", "_high"))
        colour, look = colours(depth / max(1, len(layers) - 1)), {"linewidth": 0.7, "marker": "."}
        if depth == len(layers) - 1 and LOGITS.match(layer):
            colour, look = "black", {"linestyle": "--", "marker": "s", "zorder": 4, "label": "logits"}
        axes.fill_between(times, low, high, color=colour, alpha=0.3, linewidth=0)
        if len(times) == 1:  # too narrow for a band
            axes.vlines(times, low, high, color=colour, linewidth=0.5)
        axes.plot(times, value, color=colour, **look)
    axes.set(xlabel=TIME_LABEL, ylabel=f"cosine similarity,\n{column} over images", xlim=(-0.02, 1.02))
    axes.set_ylim(top=1.04)
    bar = add_colorbar(figure, axes, 1, max(2, len(layers)), "layer (early to late)", pad=0.02)
    bar.set_ticks([1, len(layers)] if len(layers) > 1 else [1])
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper center")
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
            for top in (1, 5):
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
        own = [row for row in rows if row["measure"] == measure]
        if own:
            value, low, high = (np.array([row[name] for row in own]) for name in ("fraction", "low", "high"))
            errors = np.maximum([value - low, high - value], 0)  # rounding may make one negative at 0 or 1
            handles.append(axes.errorbar(times_of(series), value, errors, label=measure, **ERROR_BARS, **look))
    for chance in sorted({row["chance"] for row in rows}):
        line = axes.axhline(chance, zorder=1, **CHANCE)
    handles.append(line)
    if transition:
        axes.axvspan(transition.low, transition.high, color="0.85", linewidth=0, zorder=0)
        label = f"transition {transition.time:.3f} ± {transition.error:.3f}"
        handles.append(axes.axvline(transition.time, color="0.3", linewidth=0.8, zorder=1, label=label))
    axes.set(xlabel=TIME_LABEL, ylabel=f"fraction of {counted(series)}", xlim=(-0.02, 1.02), ylim=(-0.04, 1.04))
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return figure, rows


def describe(transition: Transition | None, num_times: int) -> str:
    """The transition in one or two lines."""
    if num_times < FEWEST_TIMES:
        return f"no transition: the fit needs at least {FEWEST_TIMES} times, and there are {num_times}"
    if transition is None:
        return "no transition: class retention at the first and last time agree within their errors"
    remedy = "" if transition.resolved else ".\nThe whole fall is between two times: add times there to resolve it"
    return (
        f"class retention falls fastest at k/N = {transition.time:.4f} +- {transition.error:.4f} "
        f"(95%: {transition.low:.4f} to {transition.high:.4f}), over a width of {transition.width:.4f}{remedy}"
    )


# Distributions


def draw_distributions(series: Sequence[TimeResult], bins: int) -> tuple[Figure, Rows]:
    """Histograms over images of the similarity at an early, a middle and the last layer, one line per time."""
    layers = series[0].differences["layers"].tolist()
    depths = sorted({0, len(layers) // 2, len(layers) - 1})
    figure, (panels,) = new_figure(PAGE, 2.2, columns=len(depths))
    colours, rows = early_to_late(), []
    for depth, axes in zip(depths, panels, strict=True):
        values = [result.differences["cosine"][:, depth] for result in series]
        values = [v[np.isfinite(v)] for v in values]
        lowest = min((v.min() for v in values if len(v)), default=0)
        edges = np.linspace(min(np.floor(lowest * 20) / 20, 0.95), 1, bins + 1)
        for result, own in zip(series, values, strict=True):
            counts = np.histogram(np.minimum(own, 1), edges)[0]  # rounding may give a similarity above 1
            colour = colours(result.step_reverse / result.num_steps)
            axes.stairs(counts / max(1, len(own)), edges, color=colour, linewidth=0.9)
            ends = zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)
            about = {"layer": layers[depth], "depth": depth, **result.time_columns}
            rows += [{**about, "from": low, "to": high, counted(series): count} for low, high, count in ends]
        axes.set_title(f"{layers[depth]} ({depth + 1} of {len(layers)})", fontsize=7)
        axes.set(xlabel="cosine similarity", xlim=(edges[0], edges[-1]))
        axes.set_ylim(bottom=0)
        axes.locator_params(axis="x", nbins=5)
    panels[0].set_ylabel(f"fraction of {counted(series)}")
    add_colorbar(figure, panels, 0, 1, TIME_LABEL, pad=0.01)
    return figure, rows


# The gallery


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
    """Paths of the samples of starting images at one time. Raises UserError if one is missing."""
    folder = f"{data_dir}/t_{result.step_reverse}_{result.num_steps}_images"
    samples = {re.sub(r"_t\d{4,}$", "", without_extension(path)): path for path in list_images(folder)}
    if missing := [name for name in names if without_extension(name) not in samples]:
        raise UserError(f"{folder} (--data_dir) has no sample of {missing[0]}, which is in the results (--results)")
    return [f"{folder}/{samples[without_extension(name)]}" for name in names]


def recorded_files(args: argparse.Namespace, result: str) -> tuple[Inputs, Inputs]:
    """The recorded contents of the starting images and the samples that a result was computed from."""
    entries = read_entries(inputs_of(result)) or {}
    return (
        Inputs(args.starting_data_dir, "--starting_data_dir", entries.get("starting images")),
        Inputs(args.data_dir, "--data_dir", entries.get("samples")),
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


def create_argparser() -> argparse.ArgumentParser:
    """The flags of the script."""
    parser = ArgumentParser(computes=False, usage="%(prog)s --classifier_name NAME [flags]", description=__doc__)
    add_flags(
        parser.add_argument_group("what to read"),
        ["classifier_name", "results", "timestep_respacing", "diffusion_steps", "starting_data_dir", "data_dir"],
        results=Flag(FOLDER, "folder of the act_diff and logits files", empty="classifier_statistics/NAME"),
        timestep_respacing="250",
        starting_data_dir=flag("starting_data_dir", empty="no gallery"),
        data_dir=replace(SAMPLES_DIR, empty="no gallery"),
    )
    add_flags(
        parser.add_argument_group("what to plot"),
        ["output", "statistic", "bins", "gallery", "gallery_count", "seed"],
        output="figures",
        statistic=Flag(TEXT, "statistic over images, of their similarity", "max", choices=list(STATISTICS)),
        bins=Flag((whole_number(2, 1000), "INT"), "histogram bins", 40),
        gallery=Flag(NAME, "starting images of the gallery: paths or file names", [], "random ones", nargs="+"),
        gallery_count=Flag((whole_number(1, 20), "INT"), "number of random starting images, without --gallery", 4),
    )
    return parser


if __name__ == "__main__":
    run(main)
