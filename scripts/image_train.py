"""Train a diffusion model on a folder of images.

Every save_interval steps the folder of results gets modelNNNNNN.pt, ema_RATE_NNNNNN.pt, optNNNNNN.pt and a picture of
samples. progress.csv contains the losses by quartile of t, and classes.json the classes, if there are any. Rerun the
same command to resume from the newest checkpoint. Under mpiexec, torchrun or srun, each process takes batch_size images
per step.

  python scripts/image_train.py --data_dir datasets/flowers --batch_size 32 --lr 1e-4 --save_interval 5000 \\
      --image_size 64 --num_channels 128 --num_res_blocks 3 --learn_sigma True --diffusion_steps 1000
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone's package, before any other
from guided_diffusion import dist_util
from guided_diffusion.checkpoints import DIFFUSION_MODEL, load_model
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
    model_and_diffusion_defaults,
    training_defaults,
)
from guided_diffusion.system.files import folder_name
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training.setup import (
    TrainingFolder,
    classes_entry,
    fit_checker,
    loop_options,
    record_classes,
    report_unreadable,
    sample_grid,
    settings_of,
    training_folder,
    training_images,
)


def main(argv: list[str] | None = None) -> int:
    """Train. Returns 0, or 1 where images could not be read; raises UserError."""
    args = create_argparser().parse_args(argv)

    with training_folder(args, f"results/image_train_{folder_name(args.data_dir)}") as folder:
        return train(args, folder)


def train(args: argparse.Namespace, folder: TrainingFolder) -> int:
    """Train with the script's flags in the folder of results; as `main`."""
    flags = args_to_dict(args, model_and_diffusion_defaults())
    diffusion = dist_util.on_every_rank(diffusion_from_flags, flags)
    schedule_sampler = dist_util.on_every_rank(create_named_schedule_sampler, args.schedule_sampler, diffusion)
    crops = {"random_crop": args.random_crop, "random_flip": args.random_flip}
    data = training_images(args, args.class_cond, folder.path, image_size=args.image_size, **crops)
    folder.data["--data_dir"] = data
    model = dist_util.on_every_rank(load_model, "untrained", flags, args.seed)

    loop = TrainLoop(
        model=to_device(model, args.batch_size, args.microbatch),
        diffusion=diffusion,
        data=data,
        schedule_sampler=schedule_sampler,
        settings=settings_of(args, flags, data),
        on_save=sample_grid(args, flags, args.image_size, folder.path, data),
        check_fit=fit_checker(DIFFUSION_MODEL, flags),
        extra_state=classes_entry(data),
        **folder.options(),
        **loop_options(args),
    )
    record_classes(folder.path, data)
    loop.run_loop()
    return report_unreadable(data)


def create_argparser() -> argparse.ArgumentParser:
    """The flags of the script."""
    parser = ArgumentParser(usage="%(prog)s --data_dir FOLDER [flags]", description=__doc__)
    training = parser.add_argument_group("training")
    add_flags(training, training_defaults())
    add_class_order(training)
    model = parser.add_argument_group("the model and the diffusion")
    add_preset(model, "diffusion model")
    add_flags(model, model_and_diffusion_defaults())
    return parser


if __name__ == "__main__":
    run(main)
