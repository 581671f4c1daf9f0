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
from guided_diffusion.command_line.parser import ArgumentParser, whole_number
from guided_diffusion.command_line.stopping import run
from guided_diffusion.compute.memory import to_device
from guided_diffusion.errors import UserError
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.script_util import (
    add_flags,
    args_to_dict,
    diffusion_from_flags,
    model_and_diffusion_defaults,
    training_defaults,
)
from guided_diffusion.training.setup import fit_checker, loop_options, sample_grid, settings_of, training_folder
from random_hierarchy_model.demo import GRAMMAR_FLAGS, MODEL_FLAGS, TRAINING_FLAGS
from random_hierarchy_model.training import ExactTargetLoop, ImageStream, images_from_flags

HELP = {
    "num_symbols": "v, the symbols of every level of the grammar, and the classes",
    "num_synonyms": "m, the tuples of four that each symbol may produce",
    "depth": "L, the levels of rules: an image is 2^L by 2^L patches",
    "patch_size": "side of a patch, in pixels",
    "grammar_seed": "seed of the rules and of the patches",
}


def main(argv: list[str] | None = None) -> int:
    """Train. Returns 0; raises UserError."""
    args = create_argparser().parse_args(argv)
    with training_folder(args, "results/demo_unet") as folder:
        flags = args_to_dict(args, model_and_diffusion_defaults())
        images = dist_util.on_every_rank(images_from_flags, vars(args))
        if images.image_size != args.image_size:
            raise UserError(
                f"--image_size {args.image_size}: --depth {args.depth} and --patch_size {args.patch_size} make images "
                f"of {images.image_size}"
            )
        diffusion = dist_util.on_every_rank(diffusion_from_flags, flags)
        schedule_sampler = dist_util.on_every_rank(create_named_schedule_sampler, args.schedule_sampler, diffusion)
        data = ImageStream(images, args.batch_size, args.seed)
        model = dist_util.on_every_rank(load_model, "untrained", flags, args.seed)

        loop = ExactTargetLoop(
            images=images,
            model=to_device(model, args.batch_size, args.microbatch),
            diffusion=diffusion,
            data=data,
            schedule_sampler=schedule_sampler,
            settings=settings_of(args, flags | args_to_dict(args, GRAMMAR_FLAGS), data),
            on_save=sample_grid(args, flags, args.image_size, folder.path, data),
            check_fit=fit_checker(DIFFUSION_MODEL, flags),
            **folder.options(),
            **loop_options(args),
        )
        loop.run_loop()
    return 0


def create_argparser() -> argparse.ArgumentParser:
    """The flags of the script."""
    parser = ArgumentParser(usage="%(prog)s [flags]", description=__doc__)
    grammar = parser.add_argument_group("the grammar and its images")
    for name, default in GRAMMAR_FLAGS.items():
        least = 0 if name == "grammar_seed" else 1
        words = f"{HELP[name]} (default: {default})"
        grammar.add_argument(f"--{name}", default=default, type=whole_number(least), metavar="INT", help=words)
    flags = {**training_defaults(), **TRAINING_FLAGS}
    for absent in ("data_dir", "labels_file", "random_crop", "random_flip", "num_workers"):
        del flags[absent]
    add_flags(parser.add_argument_group("training"), flags)
    add_flags(
        parser.add_argument_group("the model and the diffusion"), {**model_and_diffusion_defaults(), **MODEL_FLAGS}
    )
    return parser


if __name__ == "__main__":
    run(main)
