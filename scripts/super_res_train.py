"""Train an upsampler: a diffusion model of large images, conditioned on small ones.

The small images are the large ones, reduced to small_size. Files and resuming are as in image_train.py; the picture of
samples shows each small image beside the sample made from it.

  python scripts/super_res_train.py --data_dir datasets/flowers --batch_size 8 --large_size 256 --small_size 64
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone's package, before any other
from guided_diffusion import dist_util
from guided_diffusion.checkpoints import UPSAMPLER, load_upsampler
from guided_diffusion.command_line.flags import TRAINING, TRAINING_DIFFUSION, TRAINING_IMAGES, add_flags
from guided_diffusion.command_line.parser import ArgumentParser
from guided_diffusion.command_line.presets import preset_flag
from guided_diffusion.command_line.stopping import run
from guided_diffusion.compute.memory import to_device
from guided_diffusion.script_util import args_to_dict, sr_model_and_diffusion_defaults
from guided_diffusion.system.files import folder_name
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training.data import DataStream
from guided_diffusion.training.setup import (
    diffusion_and_sampler,
    downsample,
    loop_options,
    run_to_end,
    sample_grid,
    training_folder,
    training_images,
)

import torch


def main(argv: list[str] | None = None) -> int:
    """Train. Returns 0, or 1 if images could not be read; raises UserError."""
    args = create_argparser().parse_args(argv)
    with training_folder(args, f"results/super_res_train_{folder_name(args.data_dir)}") as folder:
        flags = args_to_dict(args, sr_model_and_diffusion_defaults())
        diffusion, schedule_sampler = diffusion_and_sampler(args)
        data = training_images(args, args.class_cond, folder, args.large_size)
        model = dist_util.on_every_rank(load_upsampler, "untrained", flags, args.seed)
        loop = TrainLoop(
            model=to_device(model, args.batch_size, args.microbatch),
            diffusion=diffusion,
            data=WithSmallImages(data, args.small_size),
            schedule_sampler=schedule_sampler,
            **sample_grid(args, flags, args.large_size, folder.path, data),
            **loop_options(args, folder, data, flags, UPSAMPLER),
        )
        return run_to_end(loop, folder)


class WithSmallImages:
    """A stream of images with their small versions, the upsampler's input, in cond["low_res"]: (B, 3, size, size)."""

    def __init__(self, data: DataStream, size: int):
        self.data, self.size = data, size

    def __iter__(self) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        return self

    def __next__(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        images, cond = next(self.data)
        return images, {**cond, "low_res": downsample(images, self.size)}

    @property
    def position(self) -> int:
        """Number of images returned so far, on all processes."""
        return self.data.position

    def seek(self, position: int) -> None:
        """Start the next batch at `position`."""
        self.data.seek(position)


def create_argparser() -> argparse.ArgumentParser:
    """The flags of the script."""
    parser = ArgumentParser(usage="%(prog)s --data_dir FOLDER [flags]", description=__doc__)
    add_flags(parser.add_argument_group("the images"), TRAINING_IMAGES, num_workers=2)
    add_flags(parser.add_argument_group("training"), [*TRAINING, *TRAINING_DIFFUSION], batch_size=1)
    model = parser.add_argument_group("the upsampler and the diffusion")
    add_flags(model, {"preset": preset_flag("upsampler"), **sr_model_and_diffusion_defaults()})
    return parser


if __name__ == "__main__":
    run(main)
