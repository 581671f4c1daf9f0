"""Train a classifier of noised images, whose gradient guides classifier_sample.py.

The classes are those of the image folder, as for forward_backward_dataset_sample.py: one subfolder each, or a labels
file. Every save_interval steps the folder of results gets modelNNNNNN.pt and optNNNNNN.pt. progress.csv contains
cross-entropy and accuracy by quartile of t, of training and validation images. Rerun the same command to resume from
the newest checkpoint.

  python scripts/classifier_train.py --data_dir datasets/flowers/train --val_data_dir datasets/flowers/val \\
      --iterations 300000 --batch_size 256 --lr 3e-4 --anneal_lr True --weight_decay 0.05 --image_size 64
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone's package, before any other
from guided_diffusion import dist_util
from guided_diffusion.checkpoints import CLASSIFIER, load_noisy_classifier
from guided_diffusion.command_line.flags import TRAINING, TRAINING_IMAGES, add_flags
from guided_diffusion.command_line.parser import ArgumentParser
from guided_diffusion.command_line.presets import preset_flag
from guided_diffusion.command_line.stopping import run
from guided_diffusion.compute.memory import to_device
from guided_diffusion.script_util import args_to_dict, classifier_and_diffusion_defaults
from guided_diffusion.system.files import folder_name
from guided_diffusion.training.classifier import ClassifierTrainLoop
from guided_diffusion.training.setup import (
    diffusion_and_sampler,
    image_stream,
    loop_options,
    run_to_end,
    training_folder,
    training_images,
)


def main(argv: list[str] | None = None) -> int:
    """Train. Returns 0, or 1 if images could not be read; raises UserError."""
    args = create_argparser().parse_args(argv)
    with training_folder(args, f"results/classifier_train_{folder_name(args.data_dir)}") as folder:
        flags = args_to_dict(args, classifier_and_diffusion_defaults())
        diffusion, schedule_sampler = diffusion_and_sampler(args)
        data = training_images(args, True, folder, args.image_size)
        if args.val_data_dir:
            options = {"image_size": args.image_size, "random_flip": False, "flag": "--val_data_dir"}
            validation = image_stream(args, args.val_data_dir, class_cond=True, recorded=data.classes, **options)
            folder.data["--val_data_dir"] = validation
        model = dist_util.on_every_rank(load_noisy_classifier, "untrained", flags, args.seed)
        loop = ClassifierTrainLoop(
            model=to_device(model, args.batch_size, args.microbatch),
            diffusion=diffusion,
            data=data,
            val_data=folder.data.get("--val_data_dir"),
            noised=args.noised,
            eval_interval=args.eval_interval,
            schedule_sampler=schedule_sampler,
            use_fp16=args.classifier_use_fp16,
            lr_anneal_steps=args.iterations if args.anneal_lr else 0,
            **loop_options(args, folder, data, flags, CLASSIFIER),
        )
        return run_to_end(loop, folder)


def create_argparser() -> argparse.ArgumentParser:
    """The flags of the script."""
    parser = ArgumentParser(usage="%(prog)s --data_dir FOLDER [flags]", description=__doc__)
    images = parser.add_argument_group("the images")
    add_flags(images, [*TRAINING_IMAGES, "val_data_dir"], random_crop=True, num_workers=2)
    add_flags(
        parser.add_argument_group("training"),
        [*TRAINING, "schedule_sampler", "anneal_lr", "noised", "eval_interval"],
        lr=3e-4,
        batch_size=4,
        iterations=150000,
    )
    network = parser.add_argument_group("the classifier and the diffusion")
    add_flags(network, {"preset": preset_flag("classifier"), **classifier_and_diffusion_defaults()})
    network.add_argument(
        "--channel_mult",
        dest="classifier_channel_mult",
        default=argparse.SUPPRESS,
        metavar="TEXT",
        help="same as --classifier_channel_mult",
    )
    return parser


if __name__ == "__main__":
    run(main)
