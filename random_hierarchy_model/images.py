"""Images of the Random Hierarchy Model: leaves as patches of pixels, the tree as a tree of quadrants.

The grammar has branching s = 4. The four children of a symbol are the quadrants of its square: top left, top right,
bottom left, bottom right. So the class spans the whole image, of 2^L by 2^L patches, and a leaf is one patch: p by p
pixels of three channels, +1 or -1, a row of the palette.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from guided_diffusion.errors import UserError

import numpy as np
import torch
from torch import Tensor

from .grammar import PALETTE, Grammar, random_words

CHANNELS = 3


@dataclass(frozen=True)
class TreeImages:
    """Renders derivations of a grammar.

    Attributes:
        grammar: grammar of branching 4.
        patch_size: p, side of a patch in pixels.

    Raises UserError if the grammar has another branching, or more symbols than there are patches.
    """

    grammar: Grammar
    patch_size: int

    def __post_init__(self) -> None:
        if self.grammar.branching != 4:
            raise UserError(f"a square has 4 quadrants: found a grammar of branching {self.grammar.branching}")
        if self.patch_size < 1:
            raise UserError(f"patches of {self.patch_size} pixels: expected 1 or more")
        if (bits := CHANNELS * self.patch_size**2) < 64 and self.grammar.num_symbols > 2**bits:
            raise UserError(
                f"there are {2**bits} patches of {self.patch_size}x{self.patch_size} pixels, too few for "
                f"{self.grammar.num_symbols} symbols"
            )

    @property
    def image_size(self) -> int:
        """Side of an image in pixels, 2^L p."""
        return 2**self.grammar.depth * self.patch_size

    @cached_property
    def palette(self) -> Tensor:
        """Pixels of each leaf symbol, float32 (v, 3 p^2), +1 or -1: distinct random patches. Do not modify."""
        size = CHANNELS * self.patch_size**2
        per_patch = -(-size // 64)  # words
        patches: list[np.ndarray] = []
        attempt = 0
        while len(patches) < self.grammar.num_symbols:
            words = random_words(self.grammar.seed, PALETTE, attempt * per_patch, per_patch)
            patch = np.unpackbits(words.astype("<u8").view(np.uint8))[:size]
            if not any(np.array_equal(patch, other) for other in patches):
                patches.append(patch)
            attempt += 1
        return 2 * torch.from_numpy(np.stack(patches)).float() - 1

    @cached_property
    def _row_major(self) -> Tensor:
        """Row-major index of each leaf's patch: int64 (4^L,)."""
        leaf = np.arange(self.grammar.num_leaves)
        row, column = np.zeros_like(leaf), np.zeros_like(leaf)
        for level in range(self.grammar.depth):  # two bits per level, the smallest square's last
            row |= (leaf >> (2 * level + 1) & 1) << level
            column |= (leaf >> 2 * level & 1) << level
        return torch.from_numpy(row * 2**self.grammar.depth + column)

    def render(self, leaves: np.ndarray | Tensor) -> Tensor:
        """Images (n, 3, H, W), float32, +1 or -1, from leaves (n, 4^L); on their device."""
        leaves = torch.as_tensor(leaves)
        return self.from_patches(self.palette.to(leaves.device)[leaves])

    def from_patches(self, patches: Tensor) -> Tensor:
        """Images (n, 3, H, W) from patches (n, 4^L, 3 p^2), one per leaf."""
        side, p = 2**self.grammar.depth, self.patch_size
        in_rows = torch.empty_like(patches)
        in_rows[:, self._row_major.to(patches.device)] = patches
        grid = in_rows.reshape(-1, side, side, CHANNELS, p, p)
        return grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, CHANNELS, side * p, side * p)

    def patches(self, images: Tensor) -> Tensor:
        """Patches (n, 4^L, 3 p^2), in the order of leaves, of images (n, 3, H, W). Raises UserError for other sizes."""
        side, p = 2**self.grammar.depth, self.patch_size
        if images.shape[1:] != (CHANNELS, side * p, side * p):
            raise UserError(
                f"found images of shape {tuple(images.shape[1:])}, expected {(CHANNELS, side * p, side * p)}: "
                f"{side}x{side} patches of {p}x{p} pixels"
            )
        grid = images.reshape(-1, CHANNELS, side, p, side, p).permute(0, 2, 4, 1, 3, 5)
        return grid.reshape(len(images), side * side, -1)[:, self._row_major.to(images.device)]

    def read_leaves(self, images: Tensor) -> Tensor:
        """Symbol of the nearest patch of the palette, for each leaf of images (n, 3, H, W): int64 (n, 4^L).

        The leaves need not be those of a derivation.
        """
        # Palette patches have equal norms, so the nearest has the largest inner product.
        return (self.patches(images) @ self.palette.to(images).T).argmax(dim=2)
