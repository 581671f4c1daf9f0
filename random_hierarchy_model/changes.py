"""Which leaves of an image change together in its samples.

Source: Sclocchi, Favero, Levi and Wyart, J. Stat. Mech. 084005 (2025), arXiv:2410.13770.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .belief_propagation import image_posterior
from .grammar import Grammar
from .images import TreeImages


def tree_distance(grammar: Grammar) -> np.ndarray:
    """r = s^h - 1 of each pair of leaves, whose lowest common ancestor is at level h: (n, n)."""
    return grammar.branching ** grammar.ancestor_levels() - 1


def changes(leaves: Tensor, true: Tensor) -> Tensor:
    """sigma: +1 for leaves that have changed, -1 for the others. Float64 (B, M, n).

    Args:
        leaves: leaves of M samples of each image, (B, M, n).
        true: leaves of the images, (B, n).
    """
    return torch.where(leaves == true[:, None], -1.0, 1.0).double()


def sample_leaves(images: TreeImages, x: Tensor, signal: float, true: Tensor, generator: torch.Generator) -> Tensor:
    """The leaves of an exact sample of x_0 given each noised image: int64 (B, n).

    Args:
        images: rendering of the derivations.
        x: noised images, (B, 3, H, W).
        signal: their abar, in [0, 1].
        true: leaves of the original images, (B, n), which are the answer without noise.
        generator: source of the samples.
    """
    return true if signal == 1 else image_posterior(images, x, signal).sample(generator)[0]
