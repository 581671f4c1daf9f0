"""Measure which parts of an image change together in its samples.

For every starting image and time, two or more samples give the change of every token; C(r), the covariance of the
changes of two tokens at distance r; and the susceptibility chi = sum_ij C_ij / sum_i C_ii, the number of tokens that
change together. Rerun the same command to resume a run that was stopped; finished times are kept. Under mpiexec,
torchrun or srun, starting images are split across processes.

  python scripts/change_correlations.py --tokens clip --time_series 25 50 75 100 125 --timestep_respacing 250 \\
      --starting_data_dir datasets/ILSVRC2012/validation

This reads the samples in results/diffused_ILSVRC2012_validation, made by forward_backward_dataset_sample.py with
--num_trajectories, and writes changes_clip-t_K_N.npz and susceptibility_clip.csv to change_correlations/clip.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone's package, before any other
from guided_diffusion import dist_util, logger
from guided_diffusion.changes.measure import UnitSums
from guided_diffusion.changes.results import (
    changes_file,
    check_same_settings,
    default_folder,
    join_parts,
    parts_folder,
    result_arrays,
    times_in,
    write_summary,
)
from guided_diffusion.changes.samples import StartBatch, find_starts, samples_digest, start_batches
from guided_diffusion.changes.statistics import Spectrum
from guided_diffusion.changes.tokens import Tokens, open_tokens
from guided_diffusion.classifier.pairs import SAMPLES, STARTS, check_starts, read_sample
from guided_diffusion.classifier.repair import SampleResult, digest_for_parts
from guided_diffusion.command_line.flags import CONVENTION, REQUIRED, RUN, SAMPLES_DIR, TEXT, Flag, add_flags, flag
from guided_diffusion.command_line.parser import ArgumentParser
from guided_diffusion.command_line.stopping import run
from guided_diffusion.compute.memory import explain_out_of_memory
from guided_diffusion.compute.transfer import upload
from guided_diffusion.correlations import Pairs
from guided_diffusion.errors import NothingReadable, UserError
from guided_diffusion.forward_backward import SampleFolder, check_times, default_output
from guided_diffusion.images.io import Check, UnreadableImage, read_image
from guided_diffusion.runs.inputs import Inputs
from guided_diffusion.runs.records import Record, report_unreadable, write_result
from guided_diffusion.runs.resumable import Result, ResultRun, describe_batches, times_to_do
from guided_diffusion.runs.settings import digest_of
from guided_diffusion.runs.shards import shard_of
from guided_diffusion.script_util import number_of_steps

import numpy as np
import torch


def main(argv: list[str] | None = None) -> int:
    """Measure. Returns 0, or 1 if images could not be read; raises UserError."""
    args = create_argparser().parse_args(argv)
    dist_util.setup_dist(args.device)
    logger.make_dir()
    shard = dist_util.on_every_rank(shard_of, args)
    data_dir = args.data_dir or default_output(args.starting_data_dir)
    num_steps = dist_util.on_every_rank(number_of_steps, args.diffusion_steps, args.timestep_respacing)
    times = sorted(dist_util.on_every_rank(check_times, args.time_series, num_steps, "--time_series"))
    folders = {k: SampleFolder(data_dir, k, num_steps, args.diffusion_steps) for k in times}
    # samples[k][i] has the samples of starts[i]
    starts, samples = dist_util.on_main(find_starts, args.starting_data_dir, folders)
    dist_util.on_main(check_sizes, data_dir, samples, args.image_size)

    tokens, autocast, machine = open_tokens(args)
    pairs = tokens.pairs()
    spectrum = dist_util.on_every_rank(spectrum_of, tokens) if args.spectra else None
    output = args.output or default_folder(tokens.name)
    settings = decisive_settings(args, tokens, machine["precision"], starts)
    digests = dist_util.on_main(lambda: {k: samples_digest(data_dir, of_time) for k, of_time in samples.items()})
    results = {
        k: SampleResult(
            changes_file(output, tokens.name, k, num_steps),
            {**settings, "samples_digest": digests[k]},
            files={STARTS: starts, SAMPLES: [path for paths in samples[k] for path in paths]},
            data_dir=data_dir,
        )
        for k in times
    }
    inputs = {STARTS: Inputs(args.starting_data_dir, "--starting_data_dir"), SAMPLES: Inputs(data_dir, "--data_dir")}
    dist_util.on_main(check_starts, inputs[STARTS], starts, folders, data_dir)
    dist_util.on_main(check_other_times, output, tokens.name, {(k, num_steps): results[k].settings for k in times})
    folder = parts_folder(output, tokens.name, times, num_steps)
    with ResultRun(list(results.values()), folder, settings, machine, inputs, args, shard) as measurement:
        if not measurement.unfinished:
            logger.info(f"all {len(times)} times are done already, with the same settings, in {output}")
            dist_util.on_main(write_summary, output, tokens.name, args.convention)
            return 0
        to_do = dist_util.on_main(times_to_do, measurement, results, folder)
        measurement.unfinished = [results[k] for k in to_do]
        units = start_batches(starts, [samples[k] for k in to_do], starts_per_unit(samples, to_do, args.batch_size))
        digest = dist_util.on_main(digest_for_parts, folder, digests, results, to_do)
        left = measurement.remaining_units(units, times=to_do, batch_size=args.batch_size, samples_digest=digest)
        logger.info(
            f"{len(starts)} starting images from {args.starting_data_dir}, with "
            f"{', '.join(str(len(samples[k][0])) for k in to_do)} samples each of k = {', '.join(map(str, to_do))} of "
            f"N = {num_steps} from {data_dir}: {describe_batches(left, units, shard, len(times) - len(to_do))}"
        )
        grid = " x ".join(map(str, tokens.shape))
        measurement.log_machine(f", {grid} tokens of {tokens.name}; results in {output}")
        measure(tokens, pairs, spectrum, autocast, left, measurement, args)
        status = measurement.finish(
            len(units), partial(write_results, measurement, units, {k: results[k] for k in to_do}, pairs, spectrum)
        )
        dist_util.on_main(summarise, results, shard, output, tokens.name, args.convention)
        return status


def measure(
    tokens: Tokens,
    pairs: Pairs,
    spectrum: Spectrum | None,
    autocast: AbstractContextManager,
    units: Sequence[StartBatch],
    measurement: ResultRun,
    args: argparse.Namespace,
) -> None:
    """Measure the units that this rank takes and write their parts. Raises ResultError if features are not finite.

    The images of a unit pass through the network in batches, in order, and only sums over samples are kept.
    """
    blank = tokens.preprocess.blank(args.image_size)

    def read(function: Callable[..., np.ndarray], path: str, check: Check) -> torch.Tensor:
        return tokens.preprocess.on_cpu(function(path, args.image_size, check))

    readers = {STARTS: partial(read, read_image), SAMPLES: partial(read, read_sample)}
    reading = measurement.read(
        units,
        readers,
        blank,
        lambda unit: unit.images,
        "measuring",
        "image",
        pieces=lambda unit: unit.pieces(args.batch_size),
    )
    sums = None
    with torch.inference_mode():
        for piece, pictures in reading:
            sums = sums or UnitSums(piece.unit, tokens, pairs, spectrum)
            x = upload(torch.stack(pictures.values), dist_util.dev())  # (B, ...)
            with autocast, explain_out_of_memory(len(x)):
                features = tokens.features(tokens.preprocess.on_device(x))  # (B, h, w, channels)
            sums.add(piece, pictures, features)
            if piece.is_last:
                measurement.write(piece.unit, sums.pictures(), **sums.arrays())
                sums = None
            measurement.bar.update(len(x))
            dist_util.check_peers()


# Bookkeeping


def decisive_settings(
    args: argparse.Namespace, tokens: Tokens, precision: str, starts: Sequence[str]
) -> dict[str, Any]:
    """The settings that determine the bytes of the results, except for the samples."""
    output = {"the output of the layer": "copied before the network overwrites it"} if tokens.overwritten else {}
    return {
        **output,
        "tokens": args.tokens,
        "tokens_digest": tokens.digest,
        "image_size": args.image_size,
        "classifier_precision": precision,
        "spectra": args.spectra,
        "num_starts": len(starts),
        "starts_digest": digest_of(starts),
    }


def starts_per_unit(samples: Mapping[int, Sequence[Sequence[str]]], times: Sequence[int], batch_size: int) -> int:
    """As many starts as fit into a batch with all of their samples, one or more."""
    return max(1, batch_size // (1 + sum(len(samples[k][0]) for k in times)))


def check_sizes(data_dir: str, samples: Mapping[int, Sequence[Sequence[str]]], image_size: int) -> None:
    """Raise UserError unless the first sample of every time has the size given by --image_size."""
    for of_time in samples.values():
        with suppress(UnreadableImage):
            read_sample(f"{data_dir}/{of_time[0][0]}", image_size)


def check_other_times(output: str, name: str, settings: Mapping[tuple[int, int], Mapping[str, Any]]) -> None:
    """Raise UserError if the folder has other times (k, N) of other settings: the table would join them."""
    others = sorted(times_in(output, name) - settings.keys())
    check_same_settings(output, name, others, {time: {"settings": own} for time, own in settings.items()})


def spectrum_of(tokens: Tokens) -> Spectrum:
    """Power spectra on the grid of the tokens. Raises UserError if they are not on a grid."""
    if len(tokens.shape) != 2:
        raise UserError(
            f"--spectra needs tokens on a grid; those of {tokens.name} have distances of their own (--tokens)"
        )
    return Spectrum(*tokens.shape)


def write_results(
    measurement: ResultRun,
    units: Sequence[StartBatch],
    results: Mapping[int, Result],
    pairs: Pairs,
    spectrum: Spectrum | None,
    facts: Record,
) -> int:
    """Write the results, time by time. Returns the exit status; raises UserError if no start has two samples."""
    for t, (k, result) in enumerate(results.items()):
        joined = join_parts(measurement.parts, units, t, measurement.unreadable)
        if not joined.names:
            raise NothingReadable(
                f"no start has two readable samples of k = {k}: there is nothing to write (--data_dir)"
            )
        unreadable = {p: why for p in result.files[SAMPLES] if (why := measurement.unreadable.get(p))}
        record = {
            "finished": not joined.left_out and not unreadable,
            "num_shards": measurement.shard.count,
            "settings": result.settings,
            "images": {"chosen": len(result.files[STARTS]), "unreadable": {**joined.left_out, **unreadable}},
            "last_run": facts,
        }
        measurement.write_lists(result)
        write_result(result.path, result_arrays(joined, pairs, spectrum), record)
        logger.info(f"k = {k}: {len(joined.names)} of {len(result.files[STARTS])} starting images are in {result.path}")
    return report_unreadable(measurement.unreadable, "the results exclude them")


def summarise(results: Mapping[int, Result], shard: Any, output: str, name: str, convention: str) -> None:
    """Write the table of all times once all shards are done."""
    if shard.count == 1 or all(result.is_finished(shard) for result in results.values()):
        write_summary(output, name, convention)


def create_argparser() -> argparse.ArgumentParser:
    """The flags of the script."""
    parser = ArgumentParser(
        usage="%(prog)s --starting_data_dir FOLDER --time_series K [K ...] [flags]", description=__doc__
    )
    add_flags(
        parser.add_argument_group("the images"),
        ["starting_data_dir", "data_dir", "time_series", "timestep_respacing", "diffusion_steps", "image_size"],
        starting_data_dir=REQUIRED,
        data_dir=replace(SAMPLES_DIR, empty="results/diffused_STARTING_DATA_DIR"),
        timestep_respacing="250",
        image_size=256,
    )
    tokens = Flag(
        (str, "TOKENS"),
        "parts of an image: pixels; clip: the 7 x 7 patches of CLIP ViT-B/32; a layer of the classifier; or "
        "package.module:function of your own, returning (network, preprocess)",
        "pixels",
    )
    weights = Flag(
        TEXT,
        "open_clip's name of CLIP's weights, such as laion2b_s34b_b79k, needed with --classifier_path unless the file "
        "is OpenAI's own",
        empty="openai",
    )
    path = flag("classifier_path", help="weights of the classifier, of CLIP or of your network", empty="downloaded")
    group = parser.add_argument_group("the tokens")
    add_flags(
        group,
        ["tokens", "classifier_name", "classifier_path", "clip_weights", "classifier_use_fp16"],
        tokens=tokens,
        classifier_path=path,
        clip_weights=weights,
    )
    group.add_argument(
        "--spectra", action="store_true", help="also compute radial power spectra of the change and of the start"
    )
    output = flag("output", empty="change_correlations/TOKENS")
    add_flags(parser.add_argument_group("the run"), RUN, output=output, batch_size=128, convention=CONVENTION)
    return parser


if __name__ == "__main__":
    run(main)
