"""Fraction of an image's symbols that survive noising to step k and denoising back, by level: exact, and of samples.

Exact denoising of the noised image x_k gives a sample of the posterior of x_0. So the exact curve of the
forward-backward experiment is the posterior probability of the original symbols: Sclocchi, Favero and Wyart, PNAS 122,
e2408799121 (2025).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .belief_propagation import image_posterior, read_symbols
from .images import TreeImages


def probability_kept(images: TreeImages, x: Tensor, signal: float, true: Sequence[Tensor]) -> Tensor:
    """Posterior probability of the true symbols, averaged over each level: float64 (B, L + 1), the class first.

    Args:
        images: rendering of the derivations.
        x: noised images, (B, 3, H, W).
        signal: their abar, in [0, 1].
        true: symbols of the original images, level 0 first: int64 (B, 4^L), ..., (B, 1).
    """
    if signal == 1:
        return torch.ones(len(x), len(true), dtype=torch.float64)
    return image_posterior(images, x, signal).probability_of(true).flip(1)


def fraction_kept(images: TreeImages, x: Tensor, true: Sequence[Tensor]) -> Tensor:
    """Fraction of the true symbols that clean images x (B, 3, H, W) show, by level: float64 (B, L + 1), class first.

    `true` is as in `probability_kept`.
    """
    return fraction_equal(read_symbols(images, x), true).flip(1)


def fraction_equal(found: Sequence[Tensor], true: Sequence[Tensor]) -> Tensor:
    """Fraction of equal symbols, by level: float64 (B, L + 1), of symbols (B, nodes) of each level, in their order."""
    return torch.stack([(a == b).double().mean(1) for a, b in zip(found, true, strict=True)], dim=1)
