"""The demo's classifier: a small ConvNeXt that reads the class of an image of the grammar, level by level."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from .demo import GRAMMAR_FLAGS

# Stages for a tree with four levels of rules, one per level of symbols, leaves first. Smaller trees use the last ones.
WIDTHS = (24, 48, 96, 128, 192)  # channels
BLOCKS = (2, 2, 2, 1, 1)
STEM = 4  # side, in pixels, of the squares seen by torchvision's first layer; a multiple of the patch size


def small_convnext() -> tuple[ConvNeXt, Callable[[np.ndarray], Tensor]]:
    """The network, with random weights, and its preprocessing, as for --classifier_name.

    The first layer sees one leaf at a time, each later stage four symbols of the previous one, the last the whole
    image.
    """
    levels = GRAMMAR_FLAGS["depth"] + 1
    widths, blocks = WIDTHS[-levels:], BLOCKS[-levels:]
    stages = [CNBlockConfig(*stage) for stage in zip(widths, (*widths[1:], None), blocks, strict=True)]
    # A network this shallow need not start near the identity: layer scales start at 1, not at 1e-6.
    return ConvNeXt(stages, layer_scale=1.0, num_classes=GRAMMAR_FLAGS["num_symbols"]), preprocess


def preprocess(image: np.ndarray) -> Tensor:
    """The network's input, float32 (3, S, S) in [-1, 1], from uint8 pixels (H, W, 3); see `enlarge`."""
    return enlarge(torch.from_numpy(image).permute(2, 0, 1) / 127.5 - 1)


def enlarge(images: Tensor) -> Tensor:
    """Images (..., H, W) with every pixel repeated, so that the first layer sees one patch at a time."""
    factor = STEM // GRAMMAR_FLAGS["patch_size"]
    return images.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)
