"""Compute and plot the theory of the paper: exact inference on trees of the Random Hierarchy Model, and the mean field.

Writes each figure as PNG and PDF, with a CSV of its points:

  levels_epsilon, levels_gaussian, levels_masking   what is known of each level, against three kinds of noise
  map               the mean field's map from level to level, with fixed_points.csv
  phase_diagram     belief in the class, against noise and the rate sf at which noise spreads upwards
  depth             the class in trees of several depths: with a transition, and without
  correlations      of the changes of leaves, against their distance
  susceptibility    how many leaves change together
  steps             deviation of each sampler from the exact posterior, against the number of steps

The flags of the grammar apply to levels_*, correlations and susceptibility. Errors are standard errors over grammars
(over data, with --num_grammars 1). Susceptibility by masking, and the loop, use a quarter of the grammars, and
phase_diagram a fifth. In steps, errors are over the images of one grammar.

  python scripts/theory_figures.py
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone's package, before any other
from guided_diffusion import dist_util, logger
from guided_diffusion.classifier.figures import Rows, check_packages, render, style, to_csv
from guided_diffusion.command_line.flags import POSITIVE, Flag, add_flags, flag, whole_number
from guided_diffusion.command_line.parser import ArgumentParser
from guided_diffusion.command_line.stopping import run, when_stopped
from guided_diffusion.errors import UserError, named_write_errors
from guided_diffusion.system.files import write_whole
from random_hierarchy_model import Grammar, mean_field, theory, theory_plots, theory_tables
from random_hierarchy_model.flags import grammar_flags

import torch

SEED = (whole_number(0, 2**64 - 1), "INT")
TWO = (whole_number(2), "INT")
NUMBERS = {  # kind, help, number, and number with --quick
    "num_grammars": (POSITIVE, "number of grammars", 100, 16),
    "num_data": (POSITIVE, "data per grammar", 1, 1),
    "num_samples": (TWO, "samples per datum, whose changes are correlated", 64, 32),
    "num_images": (TWO, "images per grammar, in the figure steps", 500, 100),
}

FIGURES = {
    "levels_epsilon": (theory_tables.levels_epsilon, theory_plots.levels),
    "levels_gaussian": (theory_tables.levels_gaussian, theory_plots.levels),
    "levels_masking": (theory_tables.levels_masking, theory_plots.levels),
    "map": (theory_tables.cobweb, theory_plots.cobweb),
    "phase_diagram": (theory_tables.phase_diagram, theory_plots.phase_diagram),
    "depth": (theory_tables.depth, theory_plots.depth),
    "correlations": (theory_tables.correlations, theory_plots.correlations),
    "susceptibility": (theory_tables.susceptibility, theory_plots.susceptibility),
    "steps": (theory_tables.steps, theory_plots.steps),
}


def main(argv: list[str] | None = None) -> int:
    """Compute and plot. Returns 0; raises UserError."""
    args = create_argparser().parse_args(argv)
    grammar = check(args)
    torch.set_num_threads(1)  # per worker, so that results do not depend on their number
    when_stopped(lambda: f"the figures that are complete are in {args.output}")
    pool = ThreadPoolExecutor(args.num_threads or dist_util.cores_per_rank())
    work = theory_tables.Work(pool, args.seed, *(getattr(args, name) for name in NUMBERS))
    try:
        for name in args.figures or FIGURES:
            for file, data in make(name, work, grammar).items():
                with named_write_errors(f"{args.output}/{file}"):
                    write_whole(f"{args.output}/{file}", data)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    logger.info(f"{', '.join(args.figures or FIGURES)} (png, pdf, csv) are in {args.output}")
    return 0


def make(name: str, work: theory_tables.Work, grammar: Grammar) -> dict[str, bytes]:
    """The contents of a figure's files, by name."""
    rows_of, draw = FIGURES[name]
    work.figure = name
    rows = rounded(rows_of(work, grammar))
    with style():
        files = render(name, draw(rows, grammar), rows)
    return files | ({"fixed_points.csv": to_csv(rounded(theory_tables.fixed_points()))} if name == "map" else {})


def check(args: argparse.Namespace) -> Grammar:
    """The grammar of the flags. Fills in the numbers of data; raises UserError for what cannot be computed."""
    check_packages()
    for name, (*_, number, quick) in NUMBERS.items():
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else number)
    mean_field.check_parameters(args.num_symbols, args.num_synonyms, args.branching)
    grammar = Grammar(args.num_symbols, args.branching, args.depth, args.num_synonyms, args.grammar_seed)
    theory.check_size(grammar)
    if args.num_grammars * args.num_data < 2:
        raise UserError("--num_grammars 1 --num_data 1: one datum has no standard error, expected 2 or more of either")
    with named_write_errors(args.output):
        os.makedirs(args.output, exist_ok=True)
    return grammar


def rounded(rows: Rows) -> Rows:
    """The rows with 6 significant digits; undefined values are ""."""
    kinds = {float: lambda value: float(f"{value:.6g}"), type(None): lambda value: ""}
    return [{name: kinds.get(type(value), lambda same: same)(value) for name, value in row.items()} for row in rows]


def create_argparser() -> argparse.ArgumentParser:
    """The flags of the script."""
    parser = ArgumentParser(computes=False, usage="%(prog)s [flags]", description=__doc__)
    names = Flag((str, "NAME"), "figures to make", [], empty="all", nargs="+", choices=tuple(FIGURES))
    add_flags(parser, [], output=flag("output", default="results/theory"), figures=names)
    parser.add_argument("--quick", action="store_true", help="fewer data: 40 seconds instead of 4 minutes on two cores")
    numbers = {
        name: Flag(kind, text, None, empty=f"{number}; with --quick {quick}")
        for name, (kind, text, number, quick) in NUMBERS.items()
    }
    add_flags(parser, [], **numbers, seed=flag("seed", kind=SEED), num_threads=flag("num_threads", default=0))
    seeds = Flag(SEED, "seed of the rules of the first grammar; the others have the seeds that follow", 0)
    grammar = grammar_flags(num_symbols=32, num_synonyms=8, branching=2, depth=10, grammar_seed=seeds)
    add_flags(parser.add_argument_group("the grammar of levels_*, correlations and susceptibility"), grammar)
    return parser


if __name__ == "__main__":
    run(main)
