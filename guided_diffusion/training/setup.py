"""What the training scripts share: output folder, images, settings, sample grids, exit status."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from .. import dist_util, logger
from ..checkpoints import Network, check_fit
from ..command_line.stopping import when_stopped
from ..compute.inference import compute_exactly
from ..errors import UserError, first_line
from ..forward_backward import from_pixels, to_pixels
from ..fp16_util import half_precision_dtype
from ..gaussian_diffusion import GaussianDiffusion
from ..images.classes import OtherClasses, read_classes, write_classes
from ..images.folder import check_outside, list_images
from ..images.io import read_image
from ..resample import ScheduleSampler, create_named_schedule_sampler
from ..runs.locks import Locks, locked_by_main
from ..script_util import diffusion_from_flags
from ..system.checkpoint_files import Shapes
from ..system.files import remove_file
from ..train_util import TrainLoop
from .checkpoints import newest_model
from .data import DataStream, training_stream
from .sample_grid import SampleGrid
from .start import describe_newest

# Flags that determine the course of a training run, in addition to those of the network and the diffusion.
# --iterations matters only with --anneal_lr, --fp16_scale_growth only in half precision.
DECISIVE_FLAGS = (
    *("lr", "weight_decay", "lr_anneal_steps", "anneal_lr", "ema_rate", "schedule_sampler"),
    *("seed", "random_crop", "random_flip", "noised", "use_fp16"),
)


@dataclass
class TrainingFolder:
    """The output folder of a run, locked until the run ends.

    Attributes:
        path: folder.
        lock: lock of the folder, acquired by rank 0 for all ranks.
        data: image streams, by flag; a resumed run must have the same files.
    """

    path: str
    lock: Locks
    data: dict[str, DataStream] = field(default_factory=dict)

    def options(self) -> dict[str, Any]:
        """The arguments of `TrainLoop` that protect the folder."""
        return {"output": self.path, "on_start": self.compare_data, "before_save": self.lock.check}

    def compare_data(self, resumed: bool) -> None:
        """Record the content of the images; if the run is resumed, compare it. Raises UserError if they differ."""
        for flag, stream in self.data.items():
            record = f"{self.path}/{flag.strip('-').removesuffix('_dir')}_inputs.json"
            if not resumed:  # left by a run that ended before its first checkpoint
                remove_file(record)
            recorded = stream.compare_with_record(record, f"the training in {self.path}")
            if resumed and not recorded:
                logger.warn(f"{self.path} had no record of the content of the images ({flag}): recorded now")


@contextmanager
def training_folder(args: argparse.Namespace, default: str) -> Iterator[TrainingFolder]:
    """Join the other processes, lock the output folder (--output, or `default`), and open the log there.

    Raises UserError if a flag is out of range, or if another run is using the folder.
    """
    if getattr(args, "data_dir", None) == "":  # scripts that generate their images lack the flag
        raise UserError("no folder of images was given: --data_dir FOLDER")
    if not (0 < args.lr < math.inf and 0 <= args.weight_decay < math.inf):
        raise UserError(f"--lr {args.lr} --weight_decay {args.weight_decay}: expected lr > 0 and weight_decay >= 0")
    if not 0 < args.fp16_scale_growth < math.inf:
        raise UserError(f"--fp16_scale_growth {args.fp16_scale_growth}: expected a number above 0, such as 0.001")
    if args.half_precision != "auto" and not _uses_half_precision(args):
        flag = "--classifier_use_fp16" if hasattr(args, "classifier_use_fp16") else "--use_fp16"
        raise UserError(f"--half_precision {args.half_precision}: expected half precision as well ({flag} True)")
    if getattr(args, "anneal_lr", False) and not args.iterations:
        raise UserError(
            f"--anneal_lr True --iterations {args.iterations}: expected the number of steps in which the learning rate "
            "falls to 0,\nor --anneal_lr False"
        )
    for name in ("labels_file", "class_order"):
        if getattr(args, name, "") and not getattr(args, "class_cond", True):
            raise UserError(f"--{name} is for a class-conditional model: give --class_cond True, or omit it")
    if args.microbatch == 0 or args.microbatch < -1:
        raise UserError(f"--microbatch {args.microbatch}: expected a number of images (1 or more), or -1 for all")
    dist_util.setup_dist(args.device)
    dist_util.on_every_rank(half_precision_setting, args)
    output = logger.choose_dir(args.output, default)
    when_stopped(partial(describe_newest, output, args.resume_checkpoint))
    with locked_by_main({f"{output}/training.lock": f"the training folder {output}"}) as lock:
        # The progress bar shows the loss, so metrics are not printed by default.
        formats = None if os.environ.get("OPENAI_LOG_FORMAT") else ("csv", "json")
        dist_util.on_every_rank(logger.configure, output, formats)
        torch.set_num_threads(args.num_threads or dist_util.cores_per_rank())
        compute_exactly()
        torch.backends.cudnn.benchmark = True  # all images of a run have one size
        yield TrainingFolder(output, lock)


def training_images(args: argparse.Namespace, class_cond: bool, folder: TrainingFolder, image_size: int) -> DataStream:
    """The stream of images in --data_dir, whose classes are numbered as in the checkpoint that the run starts from."""
    data = _training_images(args, class_cond, folder.path, image_size)
    folder.data["--data_dir"] = data
    return data


def _training_images(args: argparse.Namespace, class_cond: bool, output: str, image_size: int) -> DataStream:
    options = {"image_size": image_size, "random_crop": args.random_crop, "random_flip": args.random_flip}
    if not class_cond:
        return image_stream(args, args.data_dir, False, **options)
    own = dist_util.on_main(newest_model, output)
    recorded = dist_util.on_main(read_classes, own or args.resume_checkpoint)
    try:
        return image_stream(args, args.data_dir, True, recorded=recorded, **options)
    except OtherClasses as error:
        if own:
            raise
        if not args.class_order:
            raise OtherClasses(f"{error}. --class_order text renumbers the folder's classes") from error
        logger.warn(f"{first_line(error).removesuffix('.')}: renumbered (--class_order)")
        return image_stream(args, args.data_dir, True, **options)


def image_stream(args: argparse.Namespace, data_dir: str, class_cond: bool, **options: Any) -> DataStream:
    """The stream of training images that the flags describe."""
    return dist_util.on_every_rank(
        partial(
            training_stream,
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


def diffusion_and_sampler(args: argparse.Namespace) -> tuple[GaussianDiffusion, ScheduleSampler]:
    """The diffusion to learn, and the sampler of its timesteps, from the flags. Raises UserError."""
    diffusion = dist_util.on_every_rank(diffusion_from_flags, vars(args))
    return diffusion, dist_util.on_every_rank(create_named_schedule_sampler, args.schedule_sampler, diffusion)


def loop_options(
    args: argparse.Namespace,
    folder: TrainingFolder,
    data: DataStream,
    flags: Mapping[str, Any],
    network: Network | None = None,
) -> dict[str, Any]:
    """The arguments of `TrainLoop` that all training scripts have in common.

    Args:
        args: flags of the script.
        folder: folder of the run.
        data: stream of images.
        flags: flags of the network and the diffusion.
        network: kind of the network, for messages about checkpoints that do not fit.
    """
    names = ("ema_rate", "use_fp16", "lr_anneal_steps", "batch_size", "microbatch", "lr", "weight_decay")
    names += ("log_interval", "save_interval", "resume_checkpoint", "fp16_scale_growth", "compile")
    names += ("iterations", "seed")
    classes = getattr(data, "classes", None)
    return {
        "settings": training_settings(args, flags, data),
        "half_precision": half_precision_setting(args),
        "check_fit": fit_checker(network, flags) if network else None,
        "extra_state": {"classes": classes.as_json()} if classes else {},
        **folder.options(),
        **{name: getattr(args, name) for name in names if hasattr(args, name)},
    }


def run_to_end(loop: TrainLoop, folder: TrainingFolder) -> int:
    """Run a training loop on the streams of images of its folder. Returns the exit status of the script."""
    data = folder.data["--data_dir"]
    if data.classes:
        dist_util.on_main(write_classes, folder.path, data.classes)
    loop.run_loop()
    return report_unreadable(*folder.data.values())


def training_settings(args: argparse.Namespace, flags: Mapping[str, Any], data: DataStream) -> dict[str, Any]:
    """Settings that must not change when the run is resumed, by flag; `flags` are those of network and diffusion."""
    names = [name for name in DECISIVE_FLAGS if hasattr(args, name)]
    if getattr(args, "anneal_lr", False):
        names.append("iterations")
    if _uses_half_precision(args):
        names.append("fp16_scale_growth")
    settings = {f"--{name}": value for name, value in flags.items() if name != "use_checkpoint"}
    settings |= {f"--{name}": getattr(args, name) for name in names}
    if (half := half_precision_setting(args)) != "auto":
        settings["--half_precision"] = half
    settings["images per step (--batch_size times processes)"] = args.batch_size * dist_util.get_world_size()
    if hasattr(args, "data_dir"):
        settings["the images (--data_dir)"] = data.digest
    return settings


def half_precision_setting(args: argparse.Namespace) -> str:
    """--half_precision, or "auto" if it names the dtype that auto would choose.

    Raises UserError if this rank's device does not support it.
    """
    name, device = args.half_precision, dist_util.dev()
    if name == "float16" and device.type == "cpu":
        raise UserError("--half_precision float16: expected a GPU; a CPU trains in bfloat16 (--half_precision auto)")
    if name == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError("--half_precision bfloat16: this GPU does not support it, use --half_precision float16")
    return "auto" if name != "auto" and getattr(torch, name) == half_precision_dtype(device) else name


def _uses_half_precision(args: argparse.Namespace) -> bool:
    return getattr(args, "use_fp16", False) or getattr(args, "classifier_use_fp16", False)


def fit_checker(network: Network, flags: Mapping[str, Any]) -> Callable[[str, Shapes, Shapes], None]:
    """`check_fit` of `TrainLoop`: compares --resume_checkpoint with the network that the flags describe."""
    return partial(check_fit, network, flags=flags, path_flag="--resume_checkpoint")


def sample_grid(
    args: argparse.Namespace, flags: Mapping[str, Any], image_size: int, output: str, data: DataStream
) -> dict[str, Any]:
    """The arguments of `TrainLoop` that draw a sample grid after each checkpoint; none if --sample_grid is 0.

    Raises UserError if the grids would be among the training images.
    """
    count = args.sample_grid
    if not count:
        return {}
    if "data_dir" in vars(args):  # grids would become training images
        dist_util.on_main(check_outside, [output], args.data_dir, data.paths, "--data_dir", "the sample grids")
    steps = min(args.sample_steps, args.diffusion_steps)
    diffusion = dist_util.on_every_rank(diffusion_from_flags, {**flags, "timestep_respacing": str(steps)})
    device = dist_util.dev()
    model_kwargs: dict[str, torch.Tensor] = {}
    if args.class_cond:
        classes = sorted(data.classes.names)
        model_kwargs["y"] = torch.tensor([classes[i % len(classes)] for i in range(count)], device=device)
    beside = None
    if hasattr(args, "small_size"):
        small = dist_util.on_main(low_resolution_images, args.data_dir, count, args.large_size, args.small_size)
        model_kwargs["low_res"] = from_pixels(small).to(device)
        side = (args.large_size, args.large_size)
        beside = np.stack([np.asarray(Image.fromarray(i).resize(side, Image.Resampling.NEAREST)) for i in small])
    shape = (count, 3, image_size, image_size)
    grid = SampleGrid(diffusion, shape, output, args.seed, device, model_kwargs, beside)
    return {"on_save": grid, "on_resume": grid.draw_missing}


def low_resolution_images(data_dir: str, count: int, large_size: int, small_size: int) -> np.ndarray:
    """The first images of a folder, downsampled as in training: (count, small_size, small_size, 3) uint8."""
    paths = list_images(data_dir)
    readable = []
    for path in paths:
        if len(readable) < count:
            with suppress(UserError):  # training reports it
                readable.append(read_image(f"{data_dir}/{path}", large_size))
    if not readable:
        raise UserError(f"none of the {len(paths)} images in {data_dir!r} (--data_dir) can be read")
    pixels = to_pixels(downsample(from_pixels(np.stack(readable)), small_size))
    return pixels[np.arange(count) % len(pixels)]


def downsample(images: torch.Tensor, size: int) -> torch.Tensor:
    """The low-resolution input (B, 3, size, size) of an upsampler, from images (B, 3, H, W), by area averaging."""
    return torch.nn.functional.interpolate(images, (size, size), mode="area")


def report_unreadable(*streams: DataStream) -> int:
    """Report unreadable images of all processes. Returns the script's exit status: 1 if there were any, else 0."""
    gathered = dist_util.gather_objects([stream.unreadable for stream in streams])
    paths = sorted({path for of_rank in gathered for unreadable in of_rank for path in unreadable})
    if paths and dist_util.is_main():
        logger.error(f"{len(paths)} images could not be read and were replaced by others: {', '.join(paths)}")
    return 1 if paths else 0
