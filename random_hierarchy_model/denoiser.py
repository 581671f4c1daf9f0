"""The optimal denoiser of images of a grammar, which is known exactly.

Among all functions of x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, the posterior mean has the least squared error.
Patch by patch it is E[x_0 | x_t] = sum_a P(a | x_t) c_a, with P the posterior of the leaf and c_a the patch of symbol
a. The optimal prediction of the noise follows,

    E[eps | x_t] = (x_t - sqrt(abar_t) E[x_0 | x_t]) / sqrt(1 - abar_t),

which is -sqrt(1 - abar_t) times the score, the gradient of log p(x_t).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from .belief_propagation import image_posterior
from .images import TreeImages

T = TypeVar("T")


def posterior_mean(images: TreeImages, x: Tensor, signal: Tensor | float, dtype: torch.dtype = torch.float64) -> Tensor:
    """E[x_0 | x_t], in `dtype`, for noised images x (B, 3, H, W) with signal abar, one number or (B,), in [0, 1)."""
    leaves = image_posterior(images, x, signal, dtype).marginals()[0]  # (B, 4^L, v)
    return images.from_patches(leaves @ images.palette.to(leaves))


def optimal_eps(images: TreeImages, x: Tensor, signal: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """E[eps | x_t], in the shape and dtype of the noised images x (B, 3, H, W), with signal abar (B,) in [0, 1)."""
    abar = signal.double().view(-1, 1, 1, 1)
    mean = posterior_mean(images, x, signal, dtype)
    return ((x.double() - abar.sqrt() * mean) / (1 - abar).sqrt()).to(x.dtype)


class Denoiser(Generic[T]):
    """A model for the diffusion loops, model(x, t), which knows what noised data are made of.

    Args:
        source: what the data are made of.
        alphas_cumprod: abar by timestep, (diffusion_steps,); those of the original diffusion, not of a respaced one.
        dtype: dtype of the computation, see `infer`.
    """

    def __init__(self, source: T, alphas_cumprod: Sequence[float] | np.ndarray, dtype: torch.dtype = torch.float64):
        self.source, self.dtype = source, dtype
        self.alphas_cumprod = torch.as_tensor(np.asarray(alphas_cumprod), dtype=torch.float64)

    def signal(self, t: Tensor) -> Tensor:
        """abar at timesteps t (B,), whole numbers: float64 (B,)."""
        return self.alphas_cumprod.to(t.device)[t.long()]


class ExactDenoiser(Denoiser[TreeImages]):
    """The optimal noise prediction for images; `source` is their rendering."""

    def __call__(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        """E[eps | x_t], in the shape and dtype of x (B, 3, H, W), at timesteps t (B,), whole numbers.

        Other arguments, such as a class, are ignored.
        """
        return optimal_eps(self.source, x, self.signal(t), self.dtype)
