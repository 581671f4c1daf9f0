"""Plot similarity and class retention as functions of time, distributions of the similarity, and a gallery.

Reads the results of evaluate_classifier.py and, for the gallery, the images. Writes each figure as PNG and PDF, with a
CSV of the plotted points:

  similarity_against_time   cosine similarity at every layer; the CSV has mode, mean, median and quartiles
  class_retention           fraction of images that keep their class, with 95% (Wilson) intervals
  distributions             histograms of the similarity at an early, a middle and the last layer, a row per time
  class_transitions         fraction of samples in each class, given the class of the starting image
  class_agreement           probability that two samples of an image have the same class
  class_entropy             entropy of the class of the samples of an image (Miller-Madow)
  gallery                   starting images and their samples (needs --starting_data_dir and --data_dir)

transition.json has the time at which class retention falls fastest, and its uncertainty. class_agreement and
class_entropy need several samples of each image (--num_trajectories of forward_backward_dataset_sample.py). Then all
errors come from resampling images, each with all its samples. The gallery shows the first sample.

With --changes, reads the results of change_correlations.py instead, and plots how parts of an image change together:

  change_correlations       C(r)/C(0), the covariance of the changes of two tokens, against their distance
  susceptibility            chi, the number of tokens that change together, and the correlation length, against time
  change_spectra            power spectrum of the change relative to the start's, if it was computed

  python scripts/plot_figures.py --classifier_name convnext_base --timestep_respacing 250 \\
      --starting_data_dir datasets/ILSVRC2012/validation --data_dir results/diffused_ILSVRC2012_validation
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone's package, before any other
from guided_diffusion import logger
from guided_diffusion.changes.figures import MOST_CURVES, figures_of
from guided_diffusion.changes.results import names_in, read_changes
from guided_diffusion.classifier.class_figures import draw_agreement, draw_class_transitions, draw_entropy
from guided_diffusion.classifier.figures import Rows, check_output, check_packages, write_figures
from guided_diffusion.classifier.gallery import choose_names, draw_gallery, recorded_files
from guided_diffusion.classifier.result_figures import (
    draw_distributions,
    draw_retention,
    draw_similarity,
    measure_retention,
)
from guided_diffusion.classifier.results import (
    TimeResult,
    check_settings,
    default_folder,
    differences_file,
    incomplete,
    name_in_files,
    read_series,
    unreadable_in,
)
from guided_diffusion.classifier.retention import (
    FEWEST_TIMES,
    STATISTICS,
    Transition,
)
from guided_diffusion.command_line.flags import (
    CONVENTION,
    FOLDER,
    NAME,
    SAMPLES_DIR,
    TEXT,
    Flag,
    add_flags,
    flag,
    whole_number,
)
from guided_diffusion.command_line.parser import ArgumentParser
from guided_diffusion.command_line.stopping import run
from guided_diffusion.errors import UserError
from guided_diffusion.images.folder import check_outside
from guided_diffusion.runs.inputs import evenly_spaced
from guided_diffusion.script_util import number_of_steps
from guided_diffusion.system.files import write_json

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_SHOWN = {"gallery": 10, "distributions": 25, "class_transitions": 10}  # times: more would be too small to see


def main(argv: list[str] | None = None) -> int:
    """Plot the results. Returns 0; raises UserError."""
    args = create_argparser().parse_args(argv)
    check_packages()
    check_output(args.output)
    if args.changes:
        return plot_changes(args)
    if bool(args.starting_data_dir) != bool(args.data_dir):
        raise UserError("the gallery needs both --starting_data_dir and --data_dir; without a gallery, give neither")
    if args.starting_data_dir:
        check_outside([args.output], args.starting_data_dir, [], "--starting_data_dir", "the figures")
    name = name_in_files(args.classifier_name)
    folder = args.results or default_folder(name)
    num_steps = steps_of(args)
    series = find_series(folder, name, num_steps)
    count, several = len(series[0].starts), [result for result in series if result.num_trajectories > 1]
    logger.info(f"{count} images at k = {', '.join(str(t.step_reverse) for t in series)} of N = {num_steps}")

    shown = {figure: evenly_spaced(series, most) for figure, most in MOST_SHOWN.items()}

    draw: dict[str, Callable[[], tuple[Figure, Rows]]] = {}
    if args.data_dir:  # first, because most mistakes show here
        chosen = choose_names(series[0].starts.tolist(), args.gallery, args.gallery_count, args.seed)
        known = [
            recorded_files(args, differences_file(folder, name, t.step_reverse, t.num_steps)) for t in shown["gallery"]
        ]
        draw["gallery"] = lambda: draw_gallery(shown["gallery"], chosen, args.starting_data_dir, args.data_dir, known)
    retention, transition = measure_retention(series)
    draw["similarity_against_time"] = lambda: draw_similarity(series, args.statistic)
    draw["class_retention"] = lambda: draw_retention(retention, transition, series)
    draw["distributions"] = lambda: draw_distributions(shown["distributions"], args.bins)
    draw["class_transitions"] = lambda: draw_class_transitions(shown["class_transitions"])
    if several:
        draw["class_agreement"] = lambda: draw_agreement(several)
        draw["class_entropy"] = lambda: draw_entropy(several)
    for figure, of_figure in shown.items():
        if figure in draw and len(of_figure) < len(series):
            logger.info(f"{figure}: {len(of_figure)} of the {len(series)} times are shown")

    write_figures(args.output, draw)
    write_json(f"{args.output}/transition.json", transition and {"images": count, **asdict(transition)})

    logger.info(describe(transition, len(series)))
    if not args.data_dir:
        logger.info("no gallery: it needs --starting_data_dir and --data_dir")
    if not several:
        logger.info("no class_agreement and class_entropy: they need several samples of each image")
    logger.info(f"{', '.join(draw)} (png, pdf, csv) and transition.json are in {args.output}")
    return 0


def plot_changes(args: argparse.Namespace) -> int:
    """Plot the results of change_correlations.py. Returns 0; raises UserError."""
    labels = [(label, folder) for folder in args.changes for label in names_in(folder)]
    names = [label for label, _ in labels]
    if len(set(names)) < len(names) or len(names) > MOST_CURVES:
        raise UserError(f"--changes has changes of {', '.join(names)}: expected at most {MOST_CURVES} different tokens")
    curves = {label: read_changes(folder, label, steps_of(args)) for label, folder in labels}
    figures = figures_of(curves, args.convention)
    write_figures(args.output, figures)
    logger.info(f"{', '.join(figures)} (png, pdf, csv) of {', '.join(names)} are in {args.output}")
    return 0


def steps_of(args: argparse.Namespace) -> int:
    """N. Raises UserError."""
    respacing = args.timestep_respacing  # may be N itself, whatever --diffusion_steps is
    return int(respacing) if respacing.isdecimal() else number_of_steps(args.diffusion_steps, respacing)


def find_series(folder: str, name: str, num_steps: int) -> list[TimeResult]:
    """The results at all times k of N = `num_steps`, in order. Raises UserError if they do not belong together."""
    results = read_series(folder, name)
    series = [result for result in results if result.num_steps == num_steps]
    if not series:
        others = ", ".join(str(n) for n in sorted({result.num_steps for result in results}))
        raise UserError(f"{folder} has no results for N = {num_steps}, only for N = {others} (--timestep_respacing)")
    check_settings({(t.step_reverse, t.num_steps): t.record for t in series}, folder, "evaluate_classifier.py")
    first = series[0]
    everything = set().union(*(result.starts.tolist() for result in series))
    for result in series:
        lacking = everything.difference(result.starts.tolist())
        if lacking and lacking <= unreadable_in(result):
            raise incomplete(differences_file(folder, name, result.step_reverse, num_steps), lacking)
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


def describe(transition: Transition | None, num_times: int) -> str:
    """The transition in one or two lines."""
    if num_times < FEWEST_TIMES:
        return f"no transition: the fit needs at least {FEWEST_TIMES} times, and there are {num_times}"
    if transition is None:
        return "no transition: class retention at the first and last time agree within their errors"
    problems = {0: "The whole fall is between two times", 1: "A single time lies on the fall"}
    problem = problems.get(transition.times_on_fall, "The fall is steep for the distance between times")
    remedy = "" if transition.resolved else f".\n{problem}: add times there to resolve it"
    return (
        f"class retention falls fastest at k/N = {transition.time:.4f} +- {transition.error:.4f} "
        f"(95%: {transition.low:.4f} to {transition.high:.4f}), over a width of {transition.width:.4f}{remedy}"
    )


def create_argparser() -> argparse.ArgumentParser:
    """The flags of the script."""
    parser = ArgumentParser(computes=False, usage="%(prog)s --classifier_name NAME [flags]", description=__doc__)
    add_flags(
        parser.add_argument_group("what to read"),
        ["classifier_name", "results", "timestep_respacing", "diffusion_steps", "starting_data_dir", "data_dir"],
        changes=Flag(FOLDER, "folders of change_correlations.py, to plot instead", [], empty="none", nargs="+"),
        results=Flag(FOLDER, "folder of the act_diff and logits files", empty="classifier_statistics/NAME"),
        timestep_respacing="250",
        starting_data_dir=flag("starting_data_dir", empty="no gallery"),
        data_dir=replace(SAMPLES_DIR, empty="no gallery"),
    )
    add_flags(
        parser.add_argument_group("what to plot"),
        ["output", "statistic", "bins", "gallery", "gallery_count", "seed", "convention"],
        output="figures",
        statistic=Flag(TEXT, "statistic over images, of their similarity", "max", choices=list(STATISTICS)),
        bins=Flag((whole_number(2, 1000), "INT"), "histogram bins", 40),
        gallery=Flag(NAME, "starting images of the gallery: paths or file names", [], "random ones", nargs="+"),
        convention=CONVENTION,
        gallery_count=Flag((whole_number(1, 20), "INT"), "number of random starting images, without --gallery", 4),
    )
    return parser


if __name__ == "__main__":
    run(main)
