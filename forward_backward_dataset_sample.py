"""Noise images up to a chosen time and denoise them back, with a pretrained diffusion model.

Every image is noised by k = step_reverse of N = timestep_respacing steps, and denoised by the k steps that lead back:
k = 0 gives the image itself, k = N an image made of pure noise. A run that was ended goes on where it was when it is
started again with the same flags. Under mpiexec, torchrun or srun, the processes share the images out.

The published model, with 10 images of each class:

  python forward_backward_dataset_sample.py --data_dir datasets/ILSVRC2012/validation \\
      --model_path models/256x256_diffusion_uncond.pt --timestep_respacing 250 --step_reverse 125 \\
      --num_per_class 10 --num_classes 1000 --batch_size 32 $MODEL_FLAGS
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from guided_diffusion.command_line import ArgumentParser, run, whole_number
from guided_diffusion.errors import UserError
from guided_diffusion.script_util import (
    NUM_CLASSES,
    add_dict_to_argparser,
    args_to_dict,
    bool_or_auto,
    diffusion_defaults,
    diffusion_from_flags,
    model_defaults,
    str2bool,
)

if TYPE_CHECKING:
    from tqdm import tqdm

    from guided_diffusion.forward_backward import Pixels, SampleFolder, Unit
    from guided_diffusion.gaussian_diffusion import GaussianDiffusion, Model
    from guided_diffusion.image_datasets import LabelledImage, UnreadableImage


def main(argv: list[str] | None = None) -> int:
    """Run the experiment. Returns 0 where every chosen image has its sample, else 1; raises UserError."""
    args = create_argparser().parse_args(argv)

    # Imported here and not above, so that --help and misspelt flags are answered without waiting for torch.
    from guided_diffusion import dist_util, logger
    from guided_diffusion.checkpoints import load_model
    from guided_diffusion.compilation import compile_network, decide
    from guided_diffusion.forward_backward import SampleFolder, check_times, default_output
    from guided_diffusion.inference import prepare
    from guided_diffusion.run_record import end_record, now, settings_of, weights_digest

    dist_util.setup_dist(args.device)
    logger.configure()
    flags = args_to_dict(args, [*model_defaults(), *diffusion_defaults()])
    diffusion = dist_util.on_every_rank(diffusion_from_flags, flags)
    num_steps = diffusion.num_timesteps
    times = dist_util.on_every_rank(check_times, args.step_reverse, num_steps)
    images = dist_util.on_main(find_images, args)

    model = dist_util.on_every_rank(load_model, args.model_path, flags, args.seed)
    weights = dist_util.on_main(weights_digest, model)
    compiled = decide(args.compile, len(images), args.batch_size, times)
    circumstances = prepare(model, args.use_fp16, args.num_threads, compiled)

    output = args.output or default_output(args.data_dir)
    folders = {k: SampleFolder(output, k, num_steps, args.diffusion_steps, args.image_format) for k in times}
    settings = settings_of(args, flags, images, weights, circumstances["precision"], compiled)
    records, units = dist_util.on_main(begin, folders, images, args.batch_size, settings, circumstances)
    processes = dist_util.get_world_size()
    to_do = sum(len(unit.todo) for unit in units)
    logger.info(
        f"{len(images)} images from {args.data_dir}, at k = {', '.join(map(str, times))} of N = {num_steps}: "
        f"{to_do} samples to make, {len(images) * len(times) - to_do} are there"
    )
    logger.info(
        f"{processes} process(es) of {circumstances['threads']} thread(s), {circumstances['hardware']}, "
        f"{circumstances['precision']}; results in {output}"
    )
    network = model
    if compiled and to_do:
        network = dist_util.on_every_rank(
            compile_network, model, diffusion, min(args.batch_size, len(images)), args.image_size
        )

    started, clock = now(), time.monotonic()
    written, unreadable = sample(network, diffusion, dist_util.share_of(units), folders, args)
    reports = dist_util.gather_objects((written, unreadable))
    lost = {path: why for _, by_time in reports for bad in by_time.values() for path, why in bad.items()}
    if not dist_util.is_main():
        return 1 if lost else 0

    facts = {"started": started, "ended": now(), "seconds": round(time.monotonic() - clock, 3), "processes": processes}
    facts |= {**circumstances, "arguments": vars(args)}
    for k, folder in folders.items():
        made = sum(written[k] for written, _ in reports)
        bad = {path: why for _, by_time in reports for path, why in by_time[k].items()}
        end_record(folder, records[k], {"samples_written": made, **facts}, len(images), bad)
        logger.info(f"k = {k}: {len(images) - len(bad)} of {len(images)} samples are in {folder.path}")
    for why in lost.values():
        logger.warn(why)
    if lost:
        logger.error(f"{len(lost)} of {len(images)} images could not be read: they have no sample")
    return 1 if lost else 0


def find_images(args: argparse.Namespace) -> list[LabelledImage]:
    """The images that the flags choose. Raises UserError where there are none, or where two would have one sample."""
    from guided_diffusion import logger
    from guided_diffusion.image_datasets import choose_images, label_images, list_images, shortage

    found = label_images(args.data_dir, list_images(args.data_dir), args.labels_file)
    images = choose_images(found, args.num_classes, args.num_per_class, args.num_samples)
    if args.class_cond and any(image.label is None for image in images):
        raise UserError(f"--class_cond True needs the classes of the images, and nothing in {args.data_dir} tells them")
    if args.class_cond and (most := max(image.label for image in images)) >= NUM_CLASSES:
        raise UserError(
            f"--class_cond True is for {NUM_CLASSES} classes, and {args.data_dir} has {most + 1} (--data_dir)"
        )
    if warning := shortage(images, args.num_classes, args.num_per_class, args.num_samples):
        logger.warn(warning)
    stems = Counter(os.path.splitext(image.path)[0] for image in images)
    if twice := [image.path for image in images if stems[os.path.splitext(image.path)[0]] > 1]:
        raise UserError(
            f"{twice[0]} and {twice[1]} would have samples of the same name: rename one of them (--data_dir)"
        )
    return images


def begin(
    folders: dict[int, SampleFolder],
    images: list[LabelledImage],
    batch_size: int,
    settings: dict[str, Any],
    circumstances: dict[str, Any],
) -> tuple[dict[int, dict[str, Any]], list[Unit]]:
    """Open the record of every folder and see what is left to do in it. Returns (records by k, units of work)."""
    from guided_diffusion import logger
    from guided_diffusion.files import remove_scratch, remove_scratch_of, walk
    from guided_diffusion.forward_backward import unfinished_units
    from guided_diffusion.run_record import begin_record, differences

    records = {k: begin_record(folder, settings, circumstances) for k, folder in folders.items()}
    units = []
    for k, folder in folders.items():
        remove_scratch(folder.path)
        remove_scratch_of(folder.record)
        present = set(walk(folder.path))
        done = {image.path for image in images if folder.sample(image.path) in present}
        left = list(unfinished_units(images, batch_size, k, done))
        if left and (changes := differences(records[k]["begun_with"], circumstances)):
            logger.warn(f"{folder.path}: {'; '.join(changes)}. Samples will agree to rounding, not to the byte")
        units += left
    return records, units


def sample(
    network: Model,
    diffusion: GaussianDiffusion,
    units: list[Unit],
    folders: dict[int, SampleFolder],
    args: argparse.Namespace,
) -> tuple[Counter[int], dict[int, dict[str, str]]]:
    """Take every unit forward and back, and write its samples.

    Returns:
        by k, the number of samples written, and the images that could not be read: path -> why.
    """
    from guided_diffusion import dist_util, logger
    from guided_diffusion.image_datasets import UnreadableImage
    from guided_diffusion.pipeline import ImageWriter, read_ahead

    written, unreadable = Counter(), {k: {} for k in folders}
    to_do = sum(len(unit.todo) for unit in units)
    processes = dist_util.get_world_size()
    steps = sum(unit.step_reverse for unit in units)
    described = "denoising" if processes == 1 else f"denoising (process 1 of {processes})"
    bar = logger.progress_bar(steps, described, "step")
    with ImageWriter(args.image_format, args.jpeg_quality) as writer, bar:
        for unit, pictures in read_ahead(units, lambda unit: readers(unit, args), args.num_workers):
            k, folder = unit.step_reverse, folders[unit.step_reverse]
            bad = {
                image.path: str(picture)
                for image, picture in zip(unit.images, pictures, strict=True)
                if isinstance(picture, UnreadableImage) and image.path in unit.todo
            }
            unreadable[k] |= bad
            if unit.todo == bad.keys():
                bar.total -= k
                continue
            samples = forward_backward(network, diffusion, unit, pictures, args, bar)
            for i, image in enumerate(unit.images):
                if image.path in unit.todo - bad.keys():
                    writer.submit(f"{folder.path}/{folder.sample(image.path)}", partial(samples.image, i))
                    written[k] += 1
            bar.set_postfix(images=f"{sum(written.values())}/{to_do}")
    return written, unreadable


def forward_backward(
    network: Model,
    diffusion: GaussianDiffusion,
    unit: Unit,
    pictures: list[np.ndarray | UnreadableImage],
    args: argparse.Namespace,
    bar: tqdm,
) -> Pixels:
    """Noise the images of a unit by k steps and denoise them by k steps.

    The place of a picture that cannot be read is left blank: the others keep theirs, and so their bytes. Nothing here
    waits for the GPU: it works on one unit while the next is prepared.
    """
    import torch

    from guided_diffusion import dist_util
    from guided_diffusion.forward_backward import NoiseStreams, Pixels, from_pixels, noised_image
    from guided_diffusion.inference import enough_memory
    from guided_diffusion.transfer import upload

    device, k = dist_util.dev(), unit.step_reverse
    blank = np.zeros((args.image_size, args.image_size, 3), np.uint8)
    pixels = np.stack([picture if isinstance(picture, np.ndarray) else blank for picture in pictures])
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


def readers(unit: Unit, args: argparse.Namespace) -> list[Callable[[], np.ndarray | UnreadableImage]]:
    """The calls that read a unit's images, one each; they return the exception for one that cannot be read."""
    from guided_diffusion.image_datasets import UnreadableImage, read_image

    def read(path: str) -> np.ndarray | UnreadableImage:
        try:
            return read_image(f"{args.data_dir}/{path}", args.image_size)
        except UnreadableImage as error:
            return error

    return [partial(read, image.path) for image in unit.images]


def create_argparser() -> argparse.ArgumentParser:
    """The flags of the script."""
    parser = ArgumentParser(
        usage="%(prog)s --data_dir FOLDER --model_path FILE --step_reverse K [K ...] [flags]", description=__doc__
    )
    add = parser.add_argument_group("the experiment").add_argument
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
        type=whole_number(0),
        metavar="K",
        help="the time at which to turn back, in steps: 0..N; several times may be given",
    )
    add("--output", default="", metavar="FOLDER", help="folder of results (default: results/diffused_ and data_dir)")
    add(
        "--num_classes",
        default=1000,
        type=whole_number(1),
        metavar="INT",
        help="classes to take, in the order of the class index (default: %(default)s)",
    )
    add(
        "--num_per_class",
        default=10,
        type=whole_number(1),
        metavar="INT",
        help="images to take of each class, in the order of their names (default: %(default)s)",
    )
    add("--num_samples", type=whole_number(1), metavar="INT", help="images to take in all (default: no limit)")
    add(
        "--labels_file",
        metavar="FILE",
        help="classes of the images where names do not tell: LOC_val_solution.csv, a wnid per line, or an "
        "ILSVRC2012_ID per line",
    )
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
        help="CPU threads per process that compute; 0: the cores, shared out among the processes (default: 0)",
    )
    add(
        "--compile",
        default="auto",
        type=bool_or_auto,
        metavar="True|False|auto",
        help="compile the network for speed; auto: on a GPU, for a run of many steps (default: %(default)s)",
    )
    add_dict_to_argparser(parser.add_argument_group("the model, as it was trained"), model_defaults())
    add_dict_to_argparser(parser.add_argument_group("the diffusion"), diffusion_defaults())
    return parser


if __name__ == "__main__":
    run(main)
