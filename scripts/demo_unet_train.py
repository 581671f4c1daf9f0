"""Train the demo's U-Net on images of a random hierarchy model, generated on the fly.

Flags, files and resuming are as in image_train.py, but there is no data_dir: the images depend on the flags of the
grammar, the seed and the position in the stream. The target is the optimal prediction, which is known exactly: the
minimum is the same as that of the usual loss, but less noisy, and a perfect model has a loss of 0. The defaults are
those of the demo's weights.

  python scripts/demo_unet_train.py --output results/demo_unet
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone's package, before any other
from guided_diffusion import dist_util
from guided_diffusion.checkpoints import DIFFUSION_MODEL, load_model
from guided_diffusion.command_line.flags import TRAINING, TRAINING_DIFFUSION, add_flags
from guided_diffusion.command_line.parser import ArgumentParser
from guided_diffusion.command_line.stopping import run
from guided_diffusion.compute.memory import to_device
from guided_diffusion.errors import UserError
from guided_diffusion.script_util import args_to_dict, model_and_diffusion_defaults
from guided_diffusion.training.setup import diffusion_and_sampler, loop_options, sample_grid, training_folder
from random_hierarchy_model.demo import GRAMMAR_FLAGS, MODEL_FLAGS, TRAINING_FLAGS
from random_hierarchy_model.flags import grammar_flags
from random_hierarchy_model.training import ExactTargetLoop, ImageStream, images_from_flags


def main(argv: list[str] | None = None) -> int:
    """Train. Returns 0; raises UserError."""
    args = create_argparser().parse_args(argv)
    if args.class_cond:
        raise UserError("--class_cond True: the images are generated without labels, expected False")
    with training_folder(args, "results/demo_unet") as folder:
        flags = args_to_dict(args, model_and_diffusion_defaults())
        images = dist_util.on_every_rank(images_from_flags, vars(args))
        if images.image_size != args.image_size:
            raise UserError(
                f"--image_size {args.image_size}: --depth {args.depth} and --patch_size {args.patch_size} make images "
                f"of {images.image_size}"
            )
        diffusion, schedule_sampler = diffusion_and_sampler(args)
        data = ImageStream(images, args.batch_size, args.seed)
        model = dist_util.on_every_rank(load_model, "untrained", flags, args.seed)
        loop = ExactTargetLoop(
            images=images,
            model=to_device(model, args.batch_size, args.microbatch),
            diffusion=diffusion,
            data=data,
            schedule_sampler=schedule_sampler,
            **sample_grid(args, flags, args.image_size, folder.path, data),
            **loop_options(args, folder, data, flags | args_to_dict(args, GRAMMAR_FLAGS), DIFFUSION_MODEL),
        )
        loop.run_loop()
        return 0


def create_argparser() -> argparse.ArgumentParser:
    """The flags of the script."""
    parser = ArgumentParser(usage="%(prog)s [flags]", description=__doc__)
    add_flags(parser.add_argument_group("the grammar and its images"), grammar_flags(**GRAMMAR_FLAGS))
    add_flags(parser.add_argument_group("training"), [*TRAINING, *TRAINING_DIFFUSION], **TRAINING_FLAGS)
    model = parser.add_argument_group("the model and the diffusion")
    add_flags(model, {**model_and_diffusion_defaults(), **MODEL_FLAGS})
    return parser


if __name__ == "__main__":
    run(main)
