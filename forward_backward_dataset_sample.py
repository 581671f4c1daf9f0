"""Noise images to a chosen step and denoise them back, with a pretrained diffusion model.

Every image is noised by k = step_reverse of N = timestep_respacing steps, and then denoised by the same k steps: k = 0
gives the image itself, and k = N an image made from pure noise. Rerun the same command to resume a run that was
stopped. Under mpiexec, torchrun or srun, images are split across processes.

With the published model and 10 images of each class:

  python forward_backward_dataset_sample.py --data_dir datasets/ILSVRC2012/validation \\
      --model_path models/256x256_diffusion_uncond.pt --timestep_respacing 250 --step_reverse 125 \\
      --num_per_class 10 --num_classes 1000 --batch_size 32 "${MODEL_FLAGS[@]}"
"""

from __future__ import annotations

import argparse
import os
from collections import Counter

from guided_diffusion import dist_util, logger
from guided_diffusion.checkpoints import load_model
from guided_diffusion.command_line.parser import ArgumentParser, Flattened, time_list, whole_number
from guided_diffusion.command_line.presets import add_preset
from guided_diffusion.command_line.stopping import run
from guided_diffusion.compute.compilation import compile_network, should_compile
from guided_diffusion.compute.inference import prepare_network
from guided_diffusion.compute.memory import enough_memory
from guided_diffusion.compute.transfer import upload
from guided_diffusion.errors import UserError
from guided_diffusion.forward_backward import (
    NoiseStreams,
    Pixels,
    SampleFolder,
    Unit,
    check_times,
    default_output,
    from_pixels,
    noised_image,
)
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, Model
from guided_diffusion.images.classes import add_class_order, read_classes
from guided_diffusion.images.folder import (
    LabelledImage,
    check_labels,
    choose_images,
    label_images,
    label_where_known,
    list_images,
    shortage,
)
from guided_diffusion.images.io import read_image
from guided_diffusion.runs.settings import digest_of, settings_of, weights_digest
from guided_diffusion.runs.shards import Shard, add_shard_flags, shard_of
from guided_diffusion.sample_folders import SampleRun, recorded_compilation
from guided_diffusion.script_util import (
    HELP,
    add_flags,
    args_to_dict,
    bool_or_auto,
    diffusion_defaults,
    diffusion_from_flags,
    model_defaults,
    str2bool,
)

import numpy as np
import torch
from tqdm import tqdm

LONGEST_NAME = 255  # bytes of a file's name, on nearly every file system


def main(argv: list[str] | None = None) -> int:
    """Run the experiment. Returns 0 where every chosen image has its sample, else 1; raises UserError."""
    args = create_argparser().parse_args(argv)

    dist_util.setup_dist(args.device)
    logger.make_dir()
    flags = args_to_dict(args, [*model_defaults(), *diffusion_defaults()])
    diffusion = dist_util.on_every_rank(diffusion_from_flags, flags)
    num_steps = diffusion.num_timesteps
    times = dist_util.on_every_rank(check_times, args.step_reverse, num_steps)
    shard = dist_util.on_every_rank(shard_of, args)
    images = dist_util.on_main(find_images, args)
    output = args.output or default_output(args.data_dir)
    folders = {k: SampleFolder(output, k, num_steps, args.diffusion_steps, args.image_format) for k in times}
    dist_util.on_main(check_names, images, folders)

    model = dist_util.on_every_rank(load_model, args.model_path, flags, args.seed)
    compiled = should_compile(
        args.compile, len(images), args.batch_size, times, dist_util.on_main(recorded_compilation, folders.values())
    )
    batch_size = min(args.batch_size, len(images))
    machine = prepare_network(model, args.use_fp16, args.num_threads, compiled, batch_size)
    settings = settings_of(
        args,
        without=("step_reverse", "num_classes", "num_per_class", "num_samples", "compile"),
        num_images=len(images),
        images_digest=digest_of(f"{image.path}\t{image.label if args.class_cond else ''}" for image in images),
        model_digest=dist_util.on_main(weights_digest, model),
        precision=machine["precision"],
        **({"compile": True} if compiled else {}),  # a record without this is of a network that was not compiled
    )
    with SampleRun(folders, images, settings, machine, args, shard) as experiment:
        logger.info(
            f"{len(images)} images from {args.data_dir}, at k = {', '.join(map(str, times))} of N = {num_steps}: "
            f"{describe_work(experiment.units, len(images) * len(times), shard)}"
        )
        experiment.log_machine(f"; results in {output}")
        network = model
        if compiled and experiment.units:
            network = dist_util.on_every_rank(compile_network, model, diffusion, batch_size, args.image_size)
        sample(network, diffusion, experiment, args)
        return experiment.finish()


def find_images(args: argparse.Namespace) -> list[LabelledImage]:
    """The images that the flags choose. Raises UserError where there are none, or where two would have one sample."""
    paths, why_unknown = list_images(args.data_dir), None
    if args.class_cond:
        recorded = read_classes(args.model_path)
        found = label_images(args.data_dir, paths, args.labels_file, args.class_order, recorded)
    else:
        found, why_unknown = label_where_known(args.data_dir, paths, args.labels_file, args.class_order)
    images = choose_images(found, args.num_classes, args.num_per_class, args.num_samples)
    if args.class_cond:
        check_labels(images, args.data_dir)
    if why_unknown:
        logger.warn(
            f"{why_unknown}: --num_classes and --num_per_class do not apply, "
            f"{len(images)} of {len(found)} images are taken (--num_samples)"
        )
    if (classes := len({image.label for image in found})) > args.num_classes:
        logger.info(f"{args.num_classes} of {classes} classes are taken (--num_classes)")
    if warning := shortage(images, args.num_classes, args.num_per_class, args.num_samples):
        logger.warn(warning)
    stems = Counter(os.path.splitext(image.path)[0] for image in images)
    if twice := [image.path for image in images if stems[os.path.splitext(image.path)[0]] > 1]:
        raise UserError(
            f"{twice[0]} and {twice[1]} would have samples of the same name: rename one of them (--data_dir)"
        )
    return images


def check_names(images: list[LabelledImage], folders: dict[int, SampleFolder]) -> None:
    """Raise UserError where a sample's name would be longer than names of files can be."""
    for folder in folders.values():
        for image in images:
            for part in folder.sample(image.path).split("/"):
                if (length := len(os.fsencode(part))) > LONGEST_NAME:
                    raise UserError(
                        f"the sample of {image.path} would have a name of {length} bytes, {part}: expected at most "
                        f"{LONGEST_NAME}.\nGive the image a shorter name (--data_dir)"
                    )


def describe_work(units: list[Unit], total: int, shard: Shard) -> str:
    """How many of `total` samples are to be made, in words."""
    to_do = sum(len(unit.todo) for unit in units)
    if shard.count > 1:
        return f"{to_do} samples to make for {shard}"
    return f"{to_do} samples to make, {total - to_do} are there"


def sample(network: Model, diffusion: GaussianDiffusion, experiment: SampleRun, args: argparse.Namespace) -> None:
    """Take this process's units forward and back, and write their samples."""
    blank = np.zeros((args.image_size, args.image_size, 3), np.uint8)  # stands for an image that cannot be read
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

    Nothing here waits for the GPU: it works on one unit while the next is prepared.
    """
    device, k = dist_util.dev(), unit.step_reverse
    x_start = upload(from_pixels(pixels), device)  # (B, 3, H, W)
    noise = NoiseStreams(args.seed, [image.path for image in unit.images], k, device)
    x = noised_image(diffusion, x_start, k, noise.randn(x_start.shape, device=device))
    labels = {}
    if args.class_cond:
        labels["y"] = upload(torch.tensor([image.label for image in unit.images]), device)
    loops = (diffusion.p_sample_loop_forw_back_progressive, diffusion.ddim_sample_loop_forw_back_progressive)
    steps = loops[args.use_ddim](
        network,
        tuple(x.shape),
        k,
        noise=x,
        clip_denoised=args.clip_denoised,
        model_kwargs=labels,
        device=device,
        generator=noise,
    )
    with enough_memory(len(x)):
        for step in steps:
            x = step["sample"]
            bar.update()
            dist_util.check_peers()
    return Pixels(x)


def create_argparser() -> argparse.ArgumentParser:
    """The flags of the script."""
    parser = ArgumentParser(
        usage="%(prog)s --data_dir FOLDER --model_path FILE --step_reverse K [K ...] [flags]", description=__doc__
    )
    experiment = parser.add_argument_group("the experiment")
    add = experiment.add_argument
    add(
        "--data_dir", required=True, metavar="FOLDER", help="the starting images; subfolders are mirrored in the output"
    )
    add(
        "--model_path",
        required=True,
        metavar="FILE",
        help="the model's checkpoint; the word untrained gives a network with random weights, to try things out",
    )
    add(
        "--step_reverse",
        required=True,
        nargs="+",
        action=Flattened,
        type=time_list,
        metavar="K",
        help="the time at which to turn back, in steps: 0..N; or several times, separated by spaces or commas",
    )
    add("--output", default="", metavar="FOLDER", help="folder of results (default: results/diffused_ and data_dir)")
    add(
        "--num_classes",
        default=10,
        type=whole_number(1),
        metavar="INT",
        help="classes to take, in the order of the class index; does not apply if the classes are unknown (default: "
        "%(default)s)",
    )
    add(
        "--num_per_class",
        default=10,
        type=whole_number(1),
        metavar="INT",
        help="images to take of each class, in the order of their names; all if the classes are unknown (default: "
        "%(default)s)",
    )
    add("--num_samples", type=whole_number(1), metavar="INT", help="images to take in all (default: no limit)")
    add(
        "--labels_file",
        metavar="FILE",
        help=HELP["labels_file"],
    )
    add_class_order(experiment)
    add("--seed", default=0, type=int, metavar="INT", help="seed of all noise (default: %(default)s)")
    add(
        "--batch_size",
        default=16,
        type=whole_number(1),
        metavar="INT",
        help="images that are denoised together (default: %(default)s)",
    )
    add(
        "--clip_denoised",
        default=True,
        type=str2bool,
        metavar="True|False",
        help="keep the predicted image within the range of pixels at every step (default: %(default)s)",
    )
    add(
        "--use_ddim",
        default=False,
        type=str2bool,
        metavar="True|False",
        help="denoise with DDIM, without noise on the way back (default: %(default)s)",
    )
    add("--image_format", default="jpeg", choices=["jpeg", "png"], help="format of the samples (default: %(default)s)")
    add(
        "--jpeg_quality",
        default=95,
        type=whole_number(1, 100),
        metavar="INT",
        help="quality of the samples as JPEG, 1..100 (default: %(default)s)",
    )
    add(
        "--num_workers",
        default=4,
        type=whole_number(0),
        metavar="INT",
        help="threads per process that read images ahead (default: %(default)s)",
    )
    add(
        "--num_threads",
        default=0,
        type=whole_number(0),
        metavar="INT",
        help="CPU threads per process that compute; 0: the cores, divided among the processes (default: 0)",
    )
    add(
        "--compile",
        default="auto",
        type=bool_or_auto,
        metavar="True|False|auto",
        help="compile the network for speed; auto: on a GPU that can, for a run of many steps (default: %(default)s)",
    )
    add_shard_flags(add)
    model = parser.add_argument_group("the model, as it was trained")
    add_preset(model, "diffusion model")
    add_flags(model, model_defaults())
    add_flags(parser.add_argument_group("the diffusion"), diffusion_defaults())
    return parser


if __name__ == "__main__":
    run(main)
