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
from guided_diffusion.command_line.flags import TRAINING, TRAINING_DIFFUSION, TRAINING_IMAGES, add_flags
from guided_diffusion.command_line.parser import ArgumentParser
from guided_diffusion.command_line.presets import preset_flag
from guided_diffusion.command_line.stopping import run
from guided_diffusion.compute.memory import to_device
from guided_diffusion.script_util import args_to_dict, model_and_diffusion_defaults
from guided_diffusion.system.files import folder_name
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training.setup import (
    diffusion_and_sampler,
    loop_options,
    run_to_end,
    sample_grid,
    training_folder,
    training_images,
)


def main(argv: list[str] | None = None) -> int:
    """Train. Returns 0, or 1 if images could not be read; raises UserError."""
    args = create_argparser().parse_args(argv)
    with training_folder(args, f"results/image_train_{folder_name(args.data_dir)}") as folder:
        flags = args_to_dict(args, model_and_diffusion_defaults())
        diffusion, schedule_sampler = diffusion_and_sampler(args)
        data = training_images(args, args.class_cond, folder, args.image_size)
        model = dist_util.on_every_rank(load_model, "untrained", flags, args.seed)
        loop = TrainLoop(
            model=to_device(model, args.batch_size, args.microbatch),
            diffusion=diffusion,
            data=data,
            schedule_sampler=schedule_sampler,
            **sample_grid(args, flags, args.image_size, folder.path, data),
            **loop_options(args, folder, data, flags, DIFFUSION_MODEL),
        )
        return run_to_end(loop, folder)


def create_argparser() -> argparse.ArgumentParser:
    """The flags of the script."""
    parser = ArgumentParser(usage="%(prog)s --data_dir FOLDER [flags]", description=__doc__)
    add_flags(parser.add_argument_group("the images"), TRAINING_IMAGES, num_workers=2)
    add_flags(parser.add_argument_group("training"), [*TRAINING, *TRAINING_DIFFUSION], batch_size=1)
    model = parser.add_argument_group("the model and the diffusion")
    add_flags(model, {"preset": preset_flag("diffusion model"), **model_and_diffusion_defaults()})
    return parser


if __name__ == "__main__":
    run(main)
