"""What the measurements share: flags, networks, a checkpoint and pictures."""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guided_diffusion.checkpoints import load_model
from guided_diffusion.compute.inference import prepare_network
from guided_diffusion.script_util import args_to_dict, model_defaults
from guided_diffusion.unet import UNetModel

import numpy as np
import torch
from PIL import Image

FLAGS = {  # the published model's network
    **model_defaults(),
    "image_size": 256,
    "num_channels": 256,
    "num_res_blocks": 2,
    "attention_resolutions": "32,16,8",
    "num_head_channels": 64,
    "learn_sigma": True,
    "resblock_updown": True,
    "use_scale_shift_norm": True,
    "use_fp16": True,
}
N = 250  # denoising steps after respacing


@dataclass
class Bench:
    """The environment of a measurement.

    Attributes:
        args: flags of the benchmark.
        device: device to compute on.
        threads: number of CPU threads.
        folder: folder for temporary files.
    """

    args: argparse.Namespace
    device: torch.device
    threads: int
    folder: Path

    @property
    def flags(self) -> dict[str, Any]:
        """The flags of the network."""
        return args_to_dict(self.args, FLAGS)

    @property
    def compiles(self) -> bool:
        """Whether the compiled network is measured, too."""
        return self.device.type == "cuda" if self.args.compile == "auto" else self.args.compile

    def checkpoint(self) -> str:
        """A checkpoint file of random weights; those initialised to zero are random, too."""
        path = self.folder / "model.pt"
        if not path.exists():
            model = load_network("untrained", self.flags)
            generator = torch.Generator().manual_seed(0)
            for w in model.parameters():
                if not w.any():
                    w.normal_(0, 0.02, generator=generator)
            torch.save(model.state_dict(), path)
        return str(path)

    def pictures(self, count: int) -> str:
        """A folder of JPEG images of the network's size; they are smooth, because noise is slow to decode."""
        folder, size = self.folder / f"pictures_{count}" / "class_0", self.args.image_size
        folder.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(0)
        for i in range(count):
            coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            coarse.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{i:04d}.JPEG", quality=90)
        return str(folder.parent)


def load_network(path: str, flags: dict[str, Any]) -> UNetModel:
    """The network of a checkpoint, in float32 on the CPU, for inference."""
    model = load_model(path, flags).eval().requires_grad_(False)
    model.convert_to_fp32()
    return model


def half_copy(model: UNetModel, dtype: torch.dtype) -> UNetModel:
    """A copy with its torso in half precision."""
    model = copy.deepcopy(model)
    model.convert_to_fp16(dtype)
    return model


def optimized_copy(model: UNetModel, use_fp16: bool, threads: int, compiled: bool = False) -> UNetModel:
    """A copy in the precision and memory layout that the scripts use."""
    model = copy.deepcopy(model)
    prepare_network(model, use_fp16, threads, compiled)
    return model
