"""Train the demo's classifier, a small ConvNeXt, on intact and corrupted images of its grammar.

Images are generated on the fly, from the seed and the position in the stream. Rerun the same command to resume from
the newest checkpoint. The defaults are those of the demo's weights.

  python scripts/demo_classifier_train.py --output results/demo_classifier
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone's package, before any other
from guided_diffusion.command_line.flags import TRAINING, add_flags
from guided_diffusion.command_line.parser import ArgumentParser
from guided_diffusion.command_line.stopping import run
from guided_diffusion.compute.memory import to_device
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.training.setup import loop_options, training_folder
from random_hierarchy_model.classifier import small_convnext
from random_hierarchy_model.classifier_training import ReadingLoop
from random_hierarchy_model.demo import CLASSIFIER_TRAINING_FLAGS, GRAMMAR_FLAGS
from random_hierarchy_model.training import ImageStream, images_from_flags

import torch


def main(argv: list[str] | None = None) -> int:
    """Train. Returns 0; raises UserError."""
    args = create_argparser().parse_args(argv)
    with training_folder(args, "results/demo_classifier") as folder:
        images = images_from_flags(GRAMMAR_FLAGS)
        data = ImageStream(images, args.batch_size, args.seed)
        torch.manual_seed(args.seed)
        model, _ = small_convnext()
        loop = ReadingLoop(
            images=images,
            model=to_device(model, args.batch_size, args.microbatch),
            diffusion=create_gaussian_diffusion(),
            data=data,
            **loop_options(args, folder, data, GRAMMAR_FLAGS),
        )
        loop.run_loop()
        return 0


def create_argparser() -> argparse.ArgumentParser:
    """The flags of the script."""
    parser = ArgumentParser(usage="%(prog)s [flags]", description=__doc__)
    add_flags(parser, TRAINING, **CLASSIFIER_TRAINING_FLAGS, use_fp16=False)
    return parser


if __name__ == "__main__":
    run(main)
