"""Preprocessing of images for a classifier, in two steps, so that a GPU is sent 8-bit pixels instead of float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional


def _unchanged(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Preprocess:
    """The map from a uint8 image (H, W, 3) to a network's input, float32 (3, S, S).

    Attributes:
        on_cpu: the step before the upload, image by image; returns uint8 (3, S, S) if it can.
        on_device: the step after it, which also takes batches (B, 3, S, S).
    """

    on_cpu: Callable[[np.ndarray], Tensor]
    on_device: Callable[[Tensor], Tensor] = _unchanged

    def __call__(self, image: np.ndarray) -> Tensor:
        return self.on_device(self.on_cpu(image))


def as_preset(preset: Any) -> Preprocess:
    """The preprocessing of a preset of torchvision's weights, with the same bytes."""

    def resized(image: np.ndarray) -> Tensor:
        resize = {"interpolation": preset.interpolation, "antialias": preset.antialias}
        picture = functional.resize(Image.fromarray(image), preset.resize_size, **resize)
        return functional.pil_to_tensor(functional.center_crop(picture, preset.crop_size))

    return Preprocess(resized, standardize(preset.mean, preset.std))


def standardize(mean: list[float], std: list[float]) -> Callable[[Tensor], Tensor]:
    """A function that maps uint8 (..., 3, H, W) to (x / 255 - mean) / std, float32.

    It never waits for a GPU, as torchvision's functions do to check the deviation.
    """

    @cache
    def constants(device: torch.device) -> list[Tensor]:
        # Tensors on the device: PyTorch divides CUDA tensors by a number in another way, with other last digits.
        values = [[255.0], mean, std]
        return [torch.tensor(value, dtype=torch.float32)[:, None, None].to(device) for value in values]

    def on_device(x: Tensor) -> Tensor:
        scale, of_mean, of_std = constants(x.device)
        return x.float().div_(scale).sub_(of_mean).div_(of_std)

    return on_device
