"""What the training scripts have in common: how they begin, which settings make a run what it is, how they end."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import blobfile as bf
import numpy as np
import torch
from PIL import Image

from . import dist_util, logger
from .classes import OtherClasses, read_classes, write_classes
from .errors import UserError, first_line
from .forward_backward import from_pixels
from .image_datasets import list_images, read_image
from .inference import compute_exactly
from .sample_grid import SampleGrid
from .script_util import diffusion_from_flags
from .training_data import load_data

if TYPE_CHECKING:
    import argparse

    from .training_data import DataStream

# The flags that decide, with those of the network and the diffusion, the course of a training run.
DECISIVE_FLAGS = (
    "lr",
    "weight_decay",
    "lr_anneal_steps",
    "anneal_lr",
    "ema_rate",
    "schedule_sampler",
    "seed",
    "random_crop",
    "random_flip",
    "noised",
)
# Flags that change how numbers are computed, but not which.
WITHOUT_EFFECT = ("use_checkpoint",)


def begin(args: argparse.Namespace, otherwise: str) -> str:
    """Join the other processes and open the log. Returns the folder of results: by the flags, else `otherwise`."""
    if getattr(args, "data_dir", None) == "":  # some scripts make their images themselves
        raise UserError("no folder of images was given: --data_dir FOLDER")
    if not (0 < args.lr < math.inf and 0 <= args.weight_decay < math.inf):
        raise UserError(f"--lr {args.lr} --weight_decay {args.weight_decay}: expected lr > 0 and weight_decay >= 0")
    if not 0 < args.fp16_scale_growth < math.inf:
        raise UserError(f"--fp16_scale_growth {args.fp16_scale_growth}: expected a number above 0, such as 0.001")
    if args.microbatch == 0 or args.microbatch < -1:
        raise UserError(f"--microbatch {args.microbatch}: expected a number of images from 1 on, or -1 for all")
    dist_util.setup_dist(args.device)
    output = logger.choose_dir(args.output, otherwise)
    # The progress bar tells the loss: no lines of metrics among the messages, unless they are asked for.
    formats = None if os.environ.get("OPENAI_LOG_FORMAT") else ("csv", "json")
    dist_util.on_every_rank(logger.configure, output, formats)
    torch.set_num_threads(args.num_threads or dist_util.cores_per_rank())
    compute_exactly()
    torch.backends.cudnn.benchmark = True  # the images of a run are all of one size
    return output


def training_images(args: argparse.Namespace, class_cond: bool, output: str, **options: Any) -> DataStream:
    """The stream of images in --data_dir; if the run is resumed from a checkpoint, its record numbers the classes."""
    if not class_cond:
        return images_for(args, args.data_dir, False, **options)
    own = dist_util.on_main(_newest_model, output)
    recorded = dist_util.on_main(read_classes, own or args.resume_checkpoint)
    try:
        return images_for(args, args.data_dir, True, recorded=recorded, **options)
    except OtherClasses as error:
        if own:
            raise
        if not args.class_order:
            raise OtherClasses(f"{error}. --class_order text numbers the folder's classes anew") from error
        logger.warn(f"{first_line(error).removesuffix('.')}: they are numbered anew (--class_order)")
        return images_for(args, args.data_dir, True, **options)


def _newest_model(folder: str) -> str | None:
    names = bf.listdir(folder) if bf.isdir(folder) else ()
    steps = [int(match[1]) for match in (re.fullmatch(r"model(\d{6,})\.pt", name) for name in names) if match]
    return bf.join(folder, f"model{max(steps):06d}.pt") if steps else None


def more_state(data: DataStream) -> dict[str, Any]:
    """What the optimizer's file records besides the loop's own state: the classes, where the images have any."""
    return {"classes": data.classes.as_json()} if data.classes else {}


def record_classes(output: str, data: DataStream) -> None:
    """Write the classes of a run into its folder, where the images have any."""
    if data.classes:
        dist_util.on_main(write_classes, output, data.classes)


def images_for(args: argparse.Namespace, data_dir: str, class_cond: bool, **options: Any) -> DataStream:
    """The stream of training images that the flags describe."""
    return dist_util.on_every_rank(
        partial(
            load_data,
            data_dir=data_dir,
            batch_size=args.batch_size,
            class_cond=class_cond,
            labels_file=args.labels_file or None,
            class_order=args.class_order,
            seed=args.seed,
            num_workers=args.num_workers,
            **options,
        )
    )


def loop_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `TrainLoop` that are flags of a training script; the classifier's lacks the first three."""
    names = ("ema_rate", "use_fp16", "lr_anneal_steps", "batch_size", "microbatch", "lr", "weight_decay")
    names += ("log_interval", "save_interval", "resume_checkpoint", "fp16_scale_growth", "iterations", "seed")
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def settings_of(args: argparse.Namespace, flags: Mapping[str, Any], data: DataStream) -> dict[str, Any]:
    """What decides the course of a run, by the names that the user knows."""
    settings = {f"--{name}": value for name, value in flags.items() if name not in WITHOUT_EFFECT}
    settings |= {f"--{name}": getattr(args, name) for name in DECISIVE_FLAGS if hasattr(args, name)}
    settings["images per step (--batch_size times processes)"] = args.batch_size * dist_util.get_world_size()
    settings["the images (--data_dir)"] = data.digest
    return settings


def sample_grid(
    args: argparse.Namespace, flags: Mapping[str, Any], image_size: int, output: str, data: DataStream
) -> SampleGrid | None:
    """What draws samples after every checkpoint; None where no samples are wanted."""
    count = args.sample_grid
    if not count:
        return None
    steps = min(args.sample_steps, args.diffusion_steps)
    diffusion = dist_util.on_every_rank(diffusion_from_flags, {**flags, "timestep_respacing": str(steps)})
    device = dist_util.dev()
    model_kwargs: dict[str, torch.Tensor] = {}
    if args.class_cond:
        classes = sorted(data.class_names)
        model_kwargs["y"] = torch.tensor([classes[i % len(classes)] for i in range(count)], device=device)
    beside = None
    if hasattr(args, "small_size"):
        small = dist_util.on_main(small_images, args.data_dir, count, args.large_size, args.small_size)
        model_kwargs["low_res"] = from_pixels(small).to(device)
        side = (args.large_size, args.large_size)
        beside = np.stack([np.asarray(Image.fromarray(i).resize(side, Image.Resampling.NEAREST)) for i in small])
    return SampleGrid(diffusion, (count, 3, image_size, image_size), output, args.seed, device, model_kwargs, beside)


def small_images(data_dir: str, count: int, large_size: int, small_size: int) -> np.ndarray:
    """The first images of a folder, reduced as in training: (count, small_size, small_size, 3) of uint8."""
    paths = list_images(data_dir)
    readable = []
    for path in paths:
        if len(readable) < count:
            try:
                readable.append(read_image(f"{data_dir}/{path}", large_size))
            except UserError:  # it is named in training
                continue
    if not readable:
        raise UserError(f"none of the {len(paths)} images in {data_dir!r} (--data_dir) can be read")
    small = reduce(from_pixels(np.stack(readable)), small_size)
    pixels = ((small + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return pixels[np.arange(count) % len(pixels)]


def reduce(images: torch.Tensor, size: int) -> torch.Tensor:
    """The images (B, 3, H, W) that an upsampler is given for these: (B, 3, size, size), means over areas."""
    return torch.nn.functional.interpolate(images, (size, size), mode="area")


def end(*streams: DataStream) -> int:
    """Say which images could not be read. Returns the script's status: 1 where there were such, else 0."""
    of_all_ranks = dist_util.gather_objects([stream.unreadable for stream in streams])
    unreadable = {path: why for of_rank in of_all_ranks for stream in of_rank for path, why in stream.items()}
    if unreadable and dist_util.is_main():
        logger.error(f"{len(unreadable)} images could not be read, others stood in: {', '.join(sorted(unreadable))}")
    return 1 if unreadable else 0
