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
from guided_diffusion.command_line.parser import ArgumentParser
from guided_diffusion.command_line.presets import add_preset
from guided_diffusion.command_line.stopping import run
from guided_diffusion.compute.memory import to_device
from guided_diffusion.images.classes import add_class_order
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.script_util import (
    add_flags,
    args_to_dict,
    classifier_and_diffusion_defaults,
    diffusion_from_flags,
    training_defaults,
)
from guided_diffusion.system.files import folder_name
from guided_diffusion.training.classifier import ClassifierTrainLoop
from guided_diffusion.training.setup import (
    TrainingFolder,
    classes_entry,
    fit_checker,
    image_stream,
    loop_options,
    record_classes,
    report_unreadable,
    settings_of,
    training_folder,
    training_images,
)


def main(argv: list[str] | None = None) -> int:
    """Train. Returns 0, or 1 where images could not be read; raises UserError."""
    args = create_argparser().parse_args(argv)

    with training_folder(args, f"results/classifier_train_{folder_name(args.data_dir)}") as folder:
        return train(args, folder)


def train(args: argparse.Namespace, folder: TrainingFolder) -> int:
    """Train with the script's flags in the folder of results; as `main`."""
    flags = args_to_dict(args, classifier_and_diffusion_defaults())
    diffusion = dist_util.on_every_rank(diffusion_from_flags, flags)
    schedule_sampler = dist_util.on_every_rank(create_named_schedule_sampler, args.schedule_sampler, diffusion)
    crops = {"random_crop": args.random_crop, "random_flip": args.random_flip}
    data = training_images(args, True, folder.path, image_size=args.image_size, **crops)
    folder.data["--data_dir"] = data
    streams = [data]
    if args.val_data_dir:
        options = {"image_size": args.image_size, "random_flip": False, "flag": "--val_data_dir"}
        streams.append(image_stream(args, args.val_data_dir, class_cond=True, recorded=data.classes, **options))
        folder.data["--val_data_dir"] = streams[1]
    model = dist_util.on_every_rank(load_noisy_classifier, "untrained", flags, args.seed)

    loop = ClassifierTrainLoop(
        model=to_device(model, args.batch_size, args.microbatch),
        diffusion=diffusion,
        data=data,
        val_data=streams[1] if args.val_data_dir else None,
        noised=args.noised,
        eval_interval=args.eval_interval,
        schedule_sampler=schedule_sampler,
        use_fp16=args.classifier_use_fp16,
        lr_anneal_steps=args.iterations if args.anneal_lr else 0,
        settings=settings_of(args, flags, data),
        check_fit=fit_checker(CLASSIFIER, flags),
        extra_state=classes_entry(data),
        **folder.options(),
        **loop_options(args),
    )
    record_classes(folder.path, data)
    loop.run_loop()
    return report_unreadable(*streams)


def create_argparser() -> argparse.ArgumentParser:
    """The flags of the script."""
    parser = ArgumentParser(usage="%(prog)s --data_dir FOLDER [flags]", description=__doc__)
    training = parser.add_argument_group("training")
    add_flags(training, classifier_training_defaults())
    add_class_order(training)
    network = parser.add_argument_group("the classifier and the diffusion")
    add_preset(network, "classifier")
    add_flags(network, classifier_and_diffusion_defaults())
    network.add_argument(
        "--channel_mult",
        dest="classifier_channel_mult",
        default=argparse.SUPPRESS,
        metavar="TEXT",
        help="another name of --classifier_channel_mult",
    )
    return parser


def classifier_training_defaults() -> dict[str, object]:
    """The flags of training, with the published defaults for a classifier."""
    flags = training_defaults()
    for absent in ("lr_anneal_steps", "ema_rate", "sample_grid", "sample_steps"):
        del flags[absent]
    published = {"val_data_dir": "", "noised": True, "iterations": 150000, "lr": 3e-4, "anneal_lr": False}
    return {**flags, **published, "batch_size": 4, "eval_interval": 5, "random_crop": True}


if __name__ == "__main__":
    run(main)
