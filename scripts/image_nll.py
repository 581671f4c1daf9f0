"""Measure a diffusion model's variational bound on the negative log-likelihood of images, in bits per dimension.

Writes vb_terms.npz (terms of the bound), mse_terms.npz and xstart_mse_terms.npz (squared errors of the predicted noise
and of the predicted image). Each contains an array arr_0: means over the images, from the last timestep to the first.
image_nll.npz contains the names of the images, their total_bpd, and its model-independent part prior_bpd.

The images are the first of the folder, by name. The noise of an image depends only on the seed and its path. Rerun the
same command to resume a run that was stopped. Under mpiexec, torchrun or srun, images are split across processes; the
result does not depend on their number (on CPUs, with the same --num_threads).

  python scripts/image_nll.py --data_dir datasets/ILSVRC2012/validation --num_samples 1000 --batch_size 16 \\
      --model_path models/64x64_diffusion.pt "${MODEL_FLAGS[@]}"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone's package, before any other
from guided_diffusion import dist_util, logger
from guided_diffusion.checkpoints import load_model
from guided_diffusion.command_line.flags import add_flags
from guided_diffusion.command_line.parser import ArgumentParser
from guided_diffusion.command_line.presets import preset_flag
from guided_diffusion.command_line.stopping import run
from guided_diffusion.compute.inference import prepare_network
from guided_diffusion.compute.memory import explain_out_of_memory
from guided_diffusion.errors import NothingReadable, named_write_errors
from guided_diffusion.forward_backward import NoiseStreams, from_pixels
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, Model
from guided_diffusion.images.classes import read_classes
from guided_diffusion.images.folder import LabelledImage, check_labels, label_images, list_images
from guided_diffusion.images.io import read_image
from guided_diffusion.runs.inputs import Inputs
from guided_diffusion.runs.records import Record, check_finite, report_unreadable, write_result
from guided_diffusion.runs.resumable import IMAGES, ImageBatch, Result, ResultRun, image_batches
from guided_diffusion.runs.settings import digest_of, settings_of, weights_digest
from guided_diffusion.script_util import diffusion_defaults, diffusion_from_flags, model_defaults
from guided_diffusion.system.files import folder_name, whole_file

import blobfile as bf
import numpy as np
import torch
from tqdm import tqdm

TERMS = ("vb", "mse", "xstart_mse")


def main(argv: list[str] | None = None) -> int:
    """Measure. Returns 0, or 1 if images could not be read; raises UserError."""
    args = create_argparser().parse_args(argv)
    dist_util.setup_dist(args.device)
    logger.make_dir()
    diffusion = dist_util.on_every_rank(diffusion_from_flags, vars(args))
    images = dist_util.on_main(find_images, args)
    model = dist_util.on_every_rank(load_model, args.model_path, vars(args), args.seed)
    machine = prepare_network(model, args.use_fp16, args.num_threads, batch_size=min(args.batch_size, len(images)))
    settings = settings_of(
        args,
        model_digest=dist_util.on_main(weights_digest, model),
        images_digest=digest_of(f"{image.path}\t{image.label if args.class_cond else ''}" for image in images),
    )
    output = logger.choose_dir(args.output, f"results/image_nll_{folder_name(args.data_dir)}")
    result = Result(
        f"{output}/image_nll.npz",
        settings,
        files={IMAGES: [image.path for image in images]},
        companions=[f"{output}/{name}_terms.npz" for name in TERMS],
    )
    inputs = {IMAGES: Inputs(args.data_dir, "--data_dir")}
    with ResultRun([result], f"{output}/image_nll_parts", settings, machine, inputs, args) as nll:
        if not nll.unfinished:
            logger.info(f"{result.path} exists already, with the same settings: nothing to do")
            dist_util.on_main(report, result.path)
            return 0
        batches = image_batches(images, args.batch_size)
        left = nll.remaining_units(batches)
        logger.info(f"{len(images)} images from {args.data_dir}: {len(left)} of {len(batches)} batches to measure")
        nll.log_machine(f"; results in {output}")
        readers = {IMAGES: lambda path, check: read_image(path, args.image_size, check)}
        blank = np.zeros((args.image_size, args.image_size, 3), np.uint8)
        for batch, pictures in nll.read(left, readers, blank, lambda batch: diffusion.num_timesteps, "measuring"):
            pixels = np.stack(pictures.values)
            measured = bits_per_dimension(model, diffusion, batch.images, pixels, args, nll.bar)
            check_finite(measured, "the images")
            nll.write(batch, pictures, **measured)
        return nll.finish(len(batches), partial(write_results, nll, result, batches))


def find_images(args: argparse.Namespace) -> list[LabelledImage]:
    """The first images of the folder, with their classes if the model needs them. Raises UserError."""
    paths = list_images(args.data_dir)
    if len(paths) < args.num_samples:
        logger.warn(f"{args.num_samples} images asked for (--num_samples), {len(paths)} found in {args.data_dir}")
    if not args.class_cond:
        return [LabelledImage(path, None, "") for path in paths[: args.num_samples]]
    recorded = read_classes(args.model_path)
    images = label_images(args.data_dir, paths, args.labels_file, args.class_order, recorded)
    check_labels(images, args.data_dir)
    return images[: args.num_samples]


def bits_per_dimension(
    model: Model,
    diffusion: GaussianDiffusion,
    images: Sequence[LabelledImage],
    pixels: np.ndarray,
    args: argparse.Namespace,
    bar: tqdm,
) -> dict[str, np.ndarray]:
    """The results of `calc_bpd_loop` for a batch of images, by name; `pixels` is uint8 (B, H, W, 3).

    Raises UserError if the GPU is out of memory.
    """
    device = dist_util.dev()

    def counted(*inputs: Any, **labels: Any) -> torch.Tensor:
        answer = model(*inputs, **labels)
        bar.update()
        dist_util.check_peers()
        return answer

    labels = {"y": torch.tensor([image.label for image in images], device=device)} if args.class_cond else {}
    with explain_out_of_memory(len(images)):
        out = diffusion.calc_bpd_loop(
            counted,
            from_pixels(pixels).to(device),
            clip_denoised=args.clip_denoised,
            model_kwargs=labels,
            generator=NoiseStreams(args.seed, [image.path for image in images], 0, device),
        )
    return {name: values.cpu().numpy() for name, values in out.items()}


def write_results(nll: ResultRun, result: Result, batches: Sequence[ImageBatch], facts: Record) -> int:
    """Write the results of all parts. Returns the exit status; raises UserError if no image was readable."""
    names: list[str] = []
    bits: dict[str, list[np.ndarray]] = {"total_bpd": [], "prior_bpd": []}
    sums = dict.fromkeys(TERMS, 0.0)
    for batch in batches:
        part = nll.parts.read(batch.index)
        readable = part["readable"]
        names += [image.path for image, is_readable in zip(batch.images, readable, strict=True) if is_readable]
        for name, pieces in bits.items():
            pieces.append(part[name][readable])
        for name in TERMS:
            sums[name] = sums[name] + part[name][readable].sum(axis=0, dtype=np.float64)  # (N,)
    if not names:
        raise NothingReadable("none of the images could be read: there is nothing to write (--data_dir)")
    nll.write_lists(result)
    with named_write_errors():
        for name, path in zip(TERMS, result.companions, strict=True):
            with whole_file(path) as f:
                np.savez(f, sums[name] / len(names))
    chosen = sum(len(batch.images) for batch in batches)
    record = {"finished": not nll.unreadable, "settings": result.settings}
    record |= {"images": {"chosen": chosen, "unreadable": nll.unreadable}, "last_run": facts}
    arrays = {name: np.concatenate(pieces) for name, pieces in bits.items()}
    write_result(result.path, {"names": np.array(names), **arrays}, record)
    report(result.path)
    return report_unreadable(nll.unreadable, "the results exclude them", chosen)


def report(result: str) -> None:
    """Report the means of image_nll.npz."""
    with bf.BlobFile(result, "rb") as f, np.load(f, allow_pickle=False) as measured:
        bits_per_dimension = {name: measured[name].astype(np.float64) for name in ("total_bpd", "prior_bpd")}
    check_finite(bits_per_dimension, result)
    total, prior = bits_per_dimension.values()
    error = f" +- {total.std(ddof=1) / len(total) ** 0.5:.4f} (standard error)" if len(total) > 1 else ""
    logger.info(
        f"{total.mean():.4f}{error} bits per dimension over {len(total)} image(s), "
        f"{prior.mean():.2g} of them from the prior"
    )


def create_argparser() -> argparse.ArgumentParser:
    """The flags of the script."""
    parser = ArgumentParser(usage="%(prog)s --data_dir FOLDER --model_path FILE [flags]", description=__doc__)
    measuring = parser.add_argument_group("measuring")
    names = ("data_dir", "model_path", "clip_denoised", "num_samples", "batch_size", "labels_file", "class_order")
    add_flags(measuring, [*names, "output", "seed", "num_workers", "num_threads"], num_samples=1000, batch_size=1)
    model = parser.add_argument_group("the model, as it was trained")
    add_flags(model, {"preset": preset_flag("diffusion model"), **model_defaults()})
    add_flags(parser.add_argument_group("the diffusion"), diffusion_defaults())
    return parser


if __name__ == "__main__":
    run(main)
