"""Grids of samples from a model in training, to watch it learn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import blobfile as bf
import numpy as np
import torch

from .. import logger
from ..compute.memory import explain_out_of_memory
from ..errors import UserError
from ..forward_backward import NoiseStreams, to_pixels
from ..gaussian_diffusion import GaussianDiffusion
from ..runs.pipeline import encode
from ..sampling import image_grid
from ..system.files import set_aside, write_whole


@dataclass
class SampleGrid:
    """Draws a grid of samples, always from the same noise: OUTPUT/samples_NNNNNN.png after NNNNNN steps.

    Samples are made by deterministic DDIM. If a grid cannot be made, there is a warning, and training continues.

    Attributes:
        diffusion: diffusion, respaced to the few steps of a sample.
        shape: (n, 3, H, W), shape of the samples.
        output: folder for the pictures.
        seed: seed of the noise.
        device: device of the model.
        model_kwargs: further arguments of the model: tensors on `device` with one row per sample.
        beside: (n, H, W, 3) uint8 images to show to the left of the samples.
    """

    diffusion: GaussianDiffusion
    shape: tuple[int, int, int, int]
    output: str
    seed: int
    device: torch.device
    model_kwargs: dict[str, torch.Tensor] | None = None
    beside: np.ndarray | None = None

    def __call__(self, model: Callable[..., torch.Tensor], step: int) -> None:
        """Sample from `model` and write the picture for `step`. One left by an earlier run is renamed."""
        noise = NoiseStreams(self.seed, [f"grid {i}" for i in range(self.shape[0])], 0, self.device)
        options = {"model_kwargs": self.model_kwargs, "device": self.device, "generator": noise}
        try:
            with explain_out_of_memory(self.shape[0], flag="--sample_grid"):
                start = noise.randn(self.shape, device=self.device)
                pixels = to_pixels(self.diffusion.ddim_sample_loop(model, self.shape, noise=start, **options))
            if self.beside is not None:
                pixels = np.concatenate([self.beside, pixels], axis=2)
            set_aside(self._path(step))  # its checkpoints have been moved away
            write_whole(self._path(step), encode(image_grid(pixels), "png", 100))
        except (UserError, OSError) as error:
            logger.warn(f"no sample grid at step {step} (--sample_grid): {error}")

    def draw_missing(self, model: Callable[..., torch.Tensor], step: int) -> None:
        """Write the picture for `step` if there is none, as after a kill between a checkpoint and its picture."""
        if not bf.exists(self._path(step)):
            self(model, step)

    def _path(self, step: int) -> str:
        return f"{self.output}/samples_{step:06d}.png"
