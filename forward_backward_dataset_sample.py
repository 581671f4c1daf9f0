"""Noise images to a chosen step and denoise them back, with a pretrained diffusion model.

Each image is noised by k = step_reverse of N = timestep_respacing steps, then denoised by the same k steps. k = 0 gives
the image itself, k = N an image made from pure noise. Rerun the same command to resume a run that was stopped. Under
mpiexec, torchrun or srun, images are split across processes.

--num_trajectories M makes M samples of each image, and --num_turns T repeats the experiment from its own samples, T
times in all. Both can be increased later: existing samples are kept. Trajectory 3 and turn 2 of NAME_t0500.JPEG are
NAME_t0500_s003.JPEG and NAME_t0500_u02.JPEG.

With the published model and 10 images of each class:

  python forward_backward_dataset_sample.py --data_dir datasets/ILSVRC2012/validation \\
      --model_path models/256x256_diffusion_uncond.pt --timestep_respacing 250 --step_reverse 125 \\
      --num_per_class 10 --num_classes 1000 --batch_size 32 "${MODEL_FLAGS[@]}"
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from guided_diffusion import dist_util, logger
from guided_diffusion.checkpoints import load_model
from guided_diffusion.command_line.flags import ANY_SEED, REQUIRED, RUN, add_flags, flag
from guided_diffusion.command_line.parser import ArgumentParser
from guided_diffusion.command_line.presets import preset_flag
from guided_diffusion.command_line.stopping import run
from guided_diffusion.compute.compilation import compile_network, should_compile
from guided_diffusion.compute.inference import prepare_network
from guided_diffusion.compute.memory import explain_out_of_memory
from guided_diffusion.compute.transfer import upload
from guided_diffusion.errors import UserError
from guided_diffusion.forward_backward import (
    Pixels,
    SampleFolder,
    Unit,
    check_times,
    default_output,
    from_pixels,
    in_order_of_starts,
    noised_image,
)
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, Model
from guided_diffusion.images.folder import LabelledImage, check_outside, find_images
from guided_diffusion.images.io import read_image
from guided_diffusion.runs.settings import digest_of, settings_of, weights_digest
from guided_diffusion.runs.shards import Shard, shard_of
from guided_diffusion.sample_folders import SampleRun, check_names, recorded_compilation
from guided_diffusion.script_util import diffusion_defaults, diffusion_from_flags, model_defaults

import numpy as np
import torch
from tqdm import tqdm

EXTENSIBLE = ("step_reverse", "num_trajectories", "num_turns")  # a later run of the same experiment may change these


def main(argv: list[str] | None = None) -> int:
    """Run the experiment. Returns 0 if every chosen image has a sample, else 1; raises UserError."""
    args = create_argparser().parse_args(argv)
    dist_util.setup_dist(args.device)
    logger.make_dir()
    diffusion = dist_util.on_every_rank(diffusion_from_flags, vars(args))
    num_steps = diffusion.num_timesteps
    times = dist_util.on_every_rank(check_times, args.step_reverse, num_steps)
    shard = dist_util.on_every_rank(shard_of, args)
    dist_util.on_every_rank(check_trajectories, args)
    images = in_order_of_starts(dist_util.on_main(find_images, args), args.data_dir)
    output = args.output or default_output(args.data_dir)
    folders = {k: SampleFolder(output, k, num_steps, args.diffusion_steps, args.image_format) for k in times}
    dist_util.on_main(check_names, folders, images, args.num_trajectories, args.num_turns)
    written = [folder.path for folder in folders.values()]
    dist_util.on_main(check_outside, written, args.data_dir, [image.path for image in images])

    model = dist_util.on_every_rank(load_model, args.model_path, vars(args), args.seed)
    recorded = dist_util.on_main(recorded_compilation, folders.values())
    total = len(images) * args.num_trajectories * args.num_turns
    steps = -(-total // args.batch_size) * sum(times) // shard.count
    compiled = should_compile(args.compile, model, args.batch_size, steps, recorded)
    batch_size = min(args.batch_size, len(images))  # of the first trajectory
    largest = batch_size if args.num_trajectories == 1 else args.batch_size
    machine = prepare_network(model, args.use_fp16, args.num_threads, compiled, largest)
    settings = decisive_settings(args, images, model, machine["precision"], compiled)
    with SampleRun(folders, images, settings, machine, args, shard) as experiment:
        logger.info(
            f"{len(images)} images from {args.data_dir}, at k = {', '.join(map(str, times))} of N = {num_steps}"
            f"{describe_samples(args)}: {describe_work(experiment, shard)}"
        )
        experiment.log_machine(f"; results in {output}")
        network = model
        if compiled and experiment.chains:
            network = dist_util.first_on_each_node(compile_network, model, diffusion, batch_size, args.image_size)
        sample(network, diffusion, experiment, args)
        return experiment.finish()


def sample(network: Model, diffusion: GaussianDiffusion, experiment: SampleRun, args: argparse.Namespace) -> None:
    """Take units of work forward and back, and write their samples, from which the next turn starts."""
    blank = np.zeros((args.image_size, args.image_size, 3), np.uint8)  # in place of an unreadable image
    for unit, pictures in experiment.read(lambda path, check: read_image(path, args.image_size, check), blank):
        pixels = np.stack(pictures.values)
        experiment.write(unit, pictures, forward_backward(network, diffusion, unit, pixels, args, experiment.bar))


def forward_backward(
    network: Model,
    diffusion: GaussianDiffusion,
    unit: Unit,
    pixels: np.ndarray,
    args: argparse.Namespace,
    bar: tqdm,
) -> Pixels:
    """Noise the images of a unit, uint8 (B, H, W, 3), by k steps and denoise them by k steps.

    Never waits for the GPU, which works on one unit while the next is prepared.
    """
    device, k = dist_util.dev(), unit.step_reverse
    x_start = upload(from_pixels(pixels), device)  # (B, 3, H, W)
    noise = unit.noise(args.seed, device)
    eps = noise.randn(x_start.shape, device=device)  # drawn in any case, so that --share_noise keeps trajectory 1
    if args.share_noise == "start":
        eps = unit.forward_noise(args.seed, device).randn(x_start.shape, device=device)
    x = noised_image(diffusion, x_start, k, eps)
    labels = {}
    if args.class_cond:
        labels["y"] = upload(torch.tensor([image.label for image in unit.images]), device)
    loop = diffusion.loop_of(args.sampler)
    options = {"noise": x, "clip_denoised": args.clip_denoised, "model_kwargs": labels}
    with explain_out_of_memory(len(x)):
        for step in loop(network, tuple(x.shape), k, device=device, generator=noise, **options):
            x = step["sample"]
            bar.update()
            dist_util.check_peers()
    return Pixels(x)


# Bookkeeping


def decisive_settings(
    args: argparse.Namespace, images: Sequence[LabelledImage], model: torch.nn.Module, precision: str, compiled: bool
) -> dict[str, Any]:
    """The settings that determine the bytes of the samples."""
    return settings_of(
        args,
        without=("num_classes", "num_per_class", "num_samples", "compile", *EXTENSIBLE),
        num_images=len(images),
        images_digest=digest_of(f"{image.path}\t{image.label if args.class_cond else ''}" for image in images),
        model_digest=dist_util.on_main(weights_digest, model),
        precision=precision,
        **({"compile": True} if compiled else {}),  # absent from the record of an uncompiled run
    )


def check_trajectories(args: argparse.Namespace) -> None:
    """Raise UserError if all samples of an image would be equal; warn if turns start from compressed samples."""
    if args.share_noise and args.sampler == "ddim":
        raise UserError(
            "--share_noise start with --sampler ddim: DDIM adds no noise, so all samples of an image would be equal.\n"
            "Give only one of the two"
        )
    if args.num_turns > 1 and args.image_format == "jpeg":
        logger.warn("each turn starts from the JPEG file that the previous one wrote: --image_format png is lossless")


def describe_samples(args: argparse.Namespace) -> str:
    """The numbers of trajectories and turns, in words; nothing if both are 1."""
    trajectories = f", {args.num_trajectories} trajectories" if args.num_trajectories > 1 else ""
    return trajectories + (f", {args.num_turns} turns" if args.num_turns > 1 else "")


def describe_work(experiment: SampleRun, shard: Shard) -> str:
    """The number of samples to make, in words."""
    if shard.count > 1:
        return f"{experiment.to_do} samples to make for {shard}"
    return f"{experiment.to_do} samples to make, {experiment.total - experiment.to_do} exist already"


def create_argparser() -> argparse.ArgumentParser:
    """The flags of the script."""
    parser = ArgumentParser(
        usage="%(prog)s --data_dir FOLDER --model_path FILE --step_reverse K [K ...] [flags]", description=__doc__
    )
    images = ("data_dir", "num_classes", "num_per_class", "num_samples", "labels_file", "class_order")
    add_flags(parser.add_argument_group("the images"), images, data_dir=REQUIRED, num_samples=None)
    add_flags(
        parser.add_argument_group("the experiment"),
        [
            *("model_path", "step_reverse", "num_trajectories", "share_noise", "num_turns"),
            *("seed", "clip_denoised", "sampler", "use_ddim"),
        ],
        model_path=REQUIRED,
        seed=flag("seed", kind=ANY_SEED),
    )
    add_flags(
        parser.add_argument_group("the run"),
        [*RUN, "compile", "image_format", "jpeg_quality"],
        output=flag("output", empty="results/diffused_DATA_DIR"),
    )
    model = parser.add_argument_group("the model, as it was trained")
    add_flags(model, {"preset": preset_flag("diffusion model"), **model_defaults()})
    add_flags(parser.add_argument_group("the diffusion"), diffusion_defaults())
    return parser


if __name__ == "__main__":
    run(main)
