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
from guided_diffusion.command_line.parser import ArgumentParser
from guided_diffusion.command_line.presets import add_preset
from guided_diffusion.command_line.stopping import run
from guided_diffusion.compute.memory import to_device
from guided_diffusion.images.classes import add_class_order
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.script_util import (
    add_flags,
    args_to_dict,
    diffusion_from_flags,
    sr_model_and_diffusion_defaults,
    training_defaults,
)
from guided_diffusion.system.files import folder_name
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training.data import DataStream
from guided_diffusion.training.setup import (
    TrainingFolder,
    classes_entry,
    downsample,
    fit_checker,
    loop_options,
    record_classes,
    report_unreadable,
    sample_grid,
    settings_of,
    training_folder,
    training_images,
)

import torch


def main(argv: list[str] | None = None) -> int:
    """Train. Returns 0, or 1 where images could not be read; raises UserError."""
    args = create_argparser().parse_args(argv)

    with training_folder(args, f"results/super_res_train_{folder_name(args.data_dir)}") as folder:
        return train(args, folder)


def train(args: argparse.Namespace, folder: TrainingFolder) -> int:
    """Train with the script's flags in the folder of results; as `main`."""
    flags = args_to_dict(args, sr_model_and_diffusion_defaults())
    diffusion = dist_util.on_every_rank(diffusion_from_flags, flags)
    schedule_sampler = dist_util.on_every_rank(create_named_schedule_sampler, args.schedule_sampler, diffusion)
    crops = {"random_crop": args.random_crop, "random_flip": args.random_flip}
    data = training_images(args, args.class_cond, folder.path, image_size=args.large_size, **crops)
    folder.data["--data_dir"] = data
    model = dist_util.on_every_rank(load_upsampler, "untrained", flags, args.seed)

    loop = TrainLoop(
        model=to_device(model, args.batch_size, args.microbatch),
        diffusion=diffusion,
        data=WithSmallImages(data, args.small_size),
        schedule_sampler=schedule_sampler,
        settings=settings_of(args, flags, data),
        on_save=sample_grid(args, flags, args.large_size, folder.path, data),
        check_fit=fit_checker(UPSAMPLER, flags),
        extra_state=classes_entry(data),
        **folder.options(),
        **loop_options(args),
    )
    record_classes(folder.path, data)
    loop.run_loop()
    return report_unreadable(data)


class WithSmallImages:
    """A stream of images, each with the small one that the upsampler is given: cond["low_res"], (B, 3, size, size)."""

    def __init__(self, data: DataStream, size: int):
        self.data, self.size = data, size

    def __iter__(self) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        return self

    def __next__(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        images, cond = next(self.data)
        return images, {**cond, "low_res": downsample(images, self.size)}

    @property
    def position(self) -> int:
        """Images that have been handed out, over all processes."""
        return self.data.position

    def seek(self, position: int) -> None:
        """Go on from the image at `position`."""
        self.data.seek(position)


def create_argparser() -> argparse.ArgumentParser:
    """The flags of the script."""
    parser = ArgumentParser(usage="%(prog)s --data_dir FOLDER [flags]", description=__doc__)
    training = parser.add_argument_group("training")
    add_flags(training, training_defaults())
    add_class_order(training)
    model = parser.add_argument_group("the model and the diffusion")
    add_preset(model, "upsampler")
    add_flags(model, sr_model_and_diffusion_defaults())
    return parser


if __name__ == "__main__":
    run(main)
