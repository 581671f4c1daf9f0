"""Sample images from a diffusion model.

Writes samples_NxHxWx3.npz, with the images as arr_0 and, if the model is class-conditional, their classes as arr_1; a
picture of the first images; and a record of the settings. Rerun the same command to resume a run that was stopped.
Under mpiexec, torchrun or srun, samples are split across processes; the file does not depend on their number (on CPUs,
with the same --num_threads).

  python scripts/image_sample.py --model_path models/64x64_diffusion.pt --num_samples 50000 --batch_size 64 \\
      --timestep_respacing 250 "${MODEL_FLAGS[@]}"
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone's package, before any other
from guided_diffusion import dist_util, logger
from guided_diffusion.checkpoints import load_model
from guided_diffusion.command_line.flags import SAMPLING, add_flags
from guided_diffusion.command_line.parser import ArgumentParser
from guided_diffusion.command_line.presets import preset_flag
from guided_diffusion.command_line.stopping import run
from guided_diffusion.compute.inference import prepare_network
from guided_diffusion.images.classes import classes_to_sample, sampled_classes_setting
from guided_diffusion.runs.settings import settings_of, weights_digest
from guided_diffusion.sampling import Samples, denoise, draw_classes, write_samples
from guided_diffusion.script_util import diffusion_defaults, diffusion_from_flags, model_defaults

import torch
from tqdm import tqdm


def main(argv: list[str] | None = None) -> int:
    """Sample the images. Returns 0; raises UserError."""
    args = create_argparser().parse_args(argv)
    dist_util.setup_dist(args.device)
    logger.make_dir()
    diffusion = dist_util.on_every_rank(diffusion_from_flags, vars(args))
    model = dist_util.on_every_rank(load_model, args.model_path, vars(args), args.seed)
    networks = [args.model_path] if args.class_cond else []
    classes, record = dist_util.on_main(classes_to_sample, args.classes, networks)
    digest = dist_util.on_main(weights_digest, model)
    settings = settings_of(args, model_digest=digest, **sampled_classes_setting(classes))
    machine = prepare_network(model, args.use_fp16, args.num_threads, batch_size=min(args.batch_size, args.num_samples))
    labels = draw_classes(args.seed, args.num_samples, classes) if args.class_cond else None

    def make(indices: range, bar: tqdm) -> torch.Tensor:
        conditions = {} if labels is None else {"y": torch.from_numpy(labels[indices])}
        return denoise(model, diffusion, indices, args.image_size, args, bar, conditions)

    samples = Samples(make, args.image_size, diffusion.num_timesteps, labels, record and record.names)
    write_samples(samples, args, "results/image_sample", settings, machine)
    return 0


def create_argparser() -> argparse.ArgumentParser:
    """The flags of the script."""
    parser = ArgumentParser(usage="%(prog)s --model_path FILE [flags]", description=__doc__)
    add_flags(parser.add_argument_group("sampling"), [*SAMPLING, "classes"])
    model = parser.add_argument_group("the model, as it was trained")
    add_flags(model, {"preset": preset_flag("diffusion model"), **model_defaults()})
    add_flags(parser.add_argument_group("the diffusion"), diffusion_defaults())
    return parser


if __name__ == "__main__":
    run(main)
