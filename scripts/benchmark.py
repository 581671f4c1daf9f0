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
from guided_diffusion.command_line.parser import ArgumentParser, whole_number
from guided_diffusion.command_line.stopping import run

# isort: split
from guided_diffusion import dist_util, logger
from guided_diffusion.compute.inference import compute_reproducibly, describe_machine
from guided_diffusion.errors import UserError, named_write_errors
from guided_diffusion.script_util import add_flags, bool_or_auto
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
    add = parser.add_argument_group("what to measure").add_argument
    count = {"default": 0, "type": whole_number(0), "metavar": "INT"}
    compile_help = "also measure the compiled network; auto: on a GPU (default: %(default)s)"
    output_help = "file for all results, rewritten after each part (default: %(default)s)"
    add("--parts", default="", metavar="NAMES", help="parts, separated by commas (default: all)")
    add("--output", default="benchmark.json", metavar="FILE", help=output_help)
    add("--batch_size", **count, help="images per forward pass; 0: 32 on a GPU, 1 on a CPU (default: 0)")
    add("--repeats", default=3, type=whole_number(1), metavar="INT", help="number of rounds (default: %(default)s)")
    add("--steps", **count, help="denoising steps in loop and processes; 0: 125 on a GPU, 2 or 4 on a CPU (default: 0)")
    add("--contender", default="", help=argparse.SUPPRESS)  # for the processes that `network` starts
    add("--compile", default="auto", type=bool_or_auto, metavar="True|False|auto", help=compile_help)
    add("--num_threads", **count, help="CPU threads; 0: one per core (default: 0)")
    add_flags(parser.add_argument_group("the network"), FLAGS)
    return parser


if __name__ == "__main__":
    run(main)
