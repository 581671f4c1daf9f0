"""Pictures of what a model in training samples, to watch it learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from . import logger
from .errors import UserError
from .files import set_aside, write_whole
from .forward_backward import to_pixels
from .gaussian_diffusion import GaussianDiffusion
from .memory import enough_memory
from .noise import NoiseStreams
from .pipeline import encode
from .sampling import image_grid, magnified


class SampleGrid:
    """Draws a grid of samples, always from the same noise: OUTPUT/samples_NNNNNN.png after NNNNNN steps.

    The samples are made by deterministic DDIM. A grid that cannot be made is a warning, and does not end the training.

    Args:
        diffusion: on the few steps that a sample is to take.
        shape: (n, 3, H, W).
        output: folder of the pictures.
        seed: of the noise.
        device: where to work.
        model_kwargs: what the model is given besides, on the device, a row per sample.
        beside: pictures (n, H, W, 3) of uint8 to show to the left of the samples.
    """

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        shape: tuple[int, int, int, int],
        output: str,
        seed: int,
        device: torch.device,
        model_kwargs: dict[str, torch.Tensor] | None = None,
        beside: np.ndarray | None = None,
    ):
        self.diffusion, self.shape, self.output = diffusion, shape, output
        self.seed, self.device, self.model_kwargs, self.beside = seed, device, model_kwargs, beside

    def __call__(self, model: Callable[..., torch.Tensor], step: int) -> None:
        """Sample from `model` and write the picture of `step`."""
        noise = NoiseStreams(self.seed, [f"grid {i}" for i in range(self.shape[0])], 0, self.device)
        options: dict[str, Any] = {"model_kwargs": self.model_kwargs, "device": self.device, "generator": noise}
        try:
            with enough_memory(self.shape[0], flag="--sample_grid"):
                options["noise"] = noise.randn(self.shape, device=self.device)
                pixels = to_pixels(self.diffusion.ddim_sample_loop(model, self.shape, **options))
            if self.beside is not None:
                pixels = np.concatenate([self.beside, pixels], axis=2)
            path = f"{self.output}/samples_{step:06d}.png"
            set_aside(path)  # of an earlier run, whose checkpoints are elsewhere now
            write_whole(path, encode(image_grid(magnified(pixels)), "png", 100))
        except (UserError, OSError) as error:
            logger.warn(f"no sample grid at step {step} (--sample_grid): {error}")
