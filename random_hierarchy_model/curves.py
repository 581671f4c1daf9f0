"""What is left of an image's symbols, level by level, after the way forward and back: exactly, and in samples.

Given the noised image x_k, the image that exact reverse time makes of it is a sample of the posterior of x_0. So the
exact curve of the forward-backward experiment is the probability, under that posterior, of the symbols that were there:
Sclocchi, Favero and Wyart, PNAS 122, e2408799121 (2025).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .belief_propagation import image_posterior, read_symbols
from .images import TreeImages


def probability_kept(images: TreeImages, x: Tensor, signal: float, true: Sequence[Tensor]) -> Tensor:
    """The probability that an exact posterior sample has the true symbols, a mean over each level: float64 (B, L + 1).

    Args:
        images: how derivations look.
        x: noised images, (B, 3, H, W).
        signal: their abar, in [0, 1].
        true: the symbols of what was noised, level 0 first: int64 (B, 4^L), ..., (B, 1).

    Returns:
        per image, the class first, the leaves last.
    """
    if signal == 1:
        return torch.ones(len(x), len(true), dtype=torch.float64)
    return image_posterior(images, x, signal).probability_of(true).flip(1)


def fraction_kept(images: TreeImages, x: Tensor, true: Sequence[Tensor]) -> Tensor:
    """The fraction of each level's symbols that images x (B, 3, H, W), not noised, have: float64 (B, L + 1).

    `true` and the order of the result are those of `probability_kept`.
    """
    read = read_symbols(images, x)
    kept = [(found == symbols).double().mean(1) for found, symbols in zip(read, true, strict=True)]
    return torch.stack(kept[::-1], dim=1)
