"""Measure the speed and precision of this project on this machine, and compare them with alternatives.

Choose parts with --parts:

  network     a forward pass: this network, a plain one with the same weights, and diffusers' of the same architecture;
              also as a share of the speed of matrix products, measured at the same time
  small       the demo's U-Net, which may spend more time on calling operations than on computing
  precision   the error of a forward pass, and of a whole trajectory with the same noise, against float64
  loop        forward_backward_dataset_sample.py from images to samples, and the share of its time outside the network
  processes   two processes of one thread each, against one
  startup     from the command to the first denoising step
  classifier  evaluate_classifier.py for ten times k together, against one pair of images after the other

By default the network has the published model's flags. Its weights are random. Contenders take turns (A B A B), so
other load on the machine affects all of them. Ratios are taken within rounds: the median, with the minimum and the
maximum in brackets.

  python scripts/benchmark.py --output benchmark.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # this clone's packages, before any other
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from guided_diffusion import dist_util, logger
from guided_diffusion.command_line.flags import FILE, FLOAT, NATURAL, POSITIVE, TEXT, Flag, add_flags, flag
from guided_diffusion.command_line.parser import ArgumentParser
from guided_diffusion.command_line.stopping import run
from guided_diffusion.compute.inference import compute_reproducibly, describe_machine
from guided_diffusion.errors import UserError, named_write_errors
from guided_diffusion.system.files import write_json

import torch
from benchmarking.bench import FLAGS, Bench
from benchmarking.forward_passes import measure_contender, network, precision, small
from benchmarking.timing import table
from benchmarking.whole_scripts import classifier, loop, processes, startup

PARTS = {part.__name__: part for part in (network, small, precision, loop, processes, startup, classifier)}


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark. Returns 0; raises UserError."""
    args = create_argparser().parse_args(argv)
    parts = args.parts.split(",") if args.parts else list(PARTS)
    if unknown := [part for part in parts if part not in PARTS]:
        raise UserError(f"--parts {unknown[0]}: expected some of {','.join(PARTS)}")
    if args.seconds <= 0:
        raise UserError(f"--seconds {args.seconds:g}: expected a positive number")

    logger.make_dir()
    threads = compute_reproducibly(args.num_threads)
    device = dist_util.use_device(args.device)
    args.batch_size = args.batch_size or (32 if device.type == "cuda" else 1)
    if args.contender:
        sys.stdout.write(json.dumps(measure_contender(args, device, threads)))
        return 0
    circumstances = {"threads": threads, **describe_machine(device)}
    report: dict[str, Any] = {"circumstances": circumstances, "arguments": vars(args)}
    write_report(report, args.output)  # reports a wrong --output before measuring
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, device, threads, Path(folder))
        for part in parts:
            logger.info(f"{part} ...")
            report[part] = PARTS[part](bench)
            sys.stdout.write(f"\n{part}: {PARTS[part].__doc__}\n\n{table(report[part])}")
            sys.stdout.flush()
            write_report(report, args.output)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    sys.stdout.write(f"\n{circumstances}\n")
    logger.info(f"all results are in {args.output}")
    return 0


def write_report(report: dict[str, Any], path: str) -> None:
    """Write the JSON file. Raises UserError if it cannot be written, ResultError if a number is NaN or infinite."""
    with named_write_errors(path):
        write_json(path, report)


def create_argparser() -> argparse.ArgumentParser:
    """The flags of the script."""
    parser = ArgumentParser(usage="%(prog)s [flags]", description=__doc__)
    measuring = parser.add_argument_group("what to measure")
    measuring.add_argument("--contender", default="", help=argparse.SUPPRESS)  # for the processes that `network` starts
    add_flags(
        measuring,
        ["num_threads"],
        parts=Flag(TEXT, "parts, separated by commas", empty="all"),
        output=Flag(FILE, "file for all results, rewritten after each part", "benchmark.json"),
        batch_size=flag("batch_size", kind=NATURAL, help="images per batch; 0: 32 on a GPU, 1 on a CPU", default=0),
        repeats=Flag(POSITIVE, "number of rounds", 3),
        seconds=Flag(FLOAT, "least time per contender and round of network, in seconds", 2.0),
        steps=Flag(NATURAL, "denoising steps of loop and processes; 0: 125 on a GPU, 2 or 4 on a CPU", 0),
        compile=flag("compile", help="also measure the compiled network; auto: on a GPU"),
    )
    add_flags(parser.add_argument_group("the network"), FLAGS)
    return parser


if __name__ == "__main__":
    run(main)
