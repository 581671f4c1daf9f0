"""Preprocessing of images for a classifier, in two steps, so that a GPU is sent 8-bit pixels instead of float32."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional

from ..errors import UserError, first_line


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

    def blank(self, image_size: int) -> Tensor:
        """What `on_cpu` returns, with zeros: a place holder for an image of this size that cannot be read."""
        return torch.zeros_like(self.on_cpu(trial_image(image_size)))


def trial_image(image_size: int) -> np.ndarray:
    """An image of noise, always the same: preprocessing may be undefined for one of a single colour."""
    return np.random.default_rng(0).integers(0, 256, (image_size, image_size, 3), dtype=np.uint8)


IMAGE_DTYPES = (torch.float32, torch.uint8)


def own_preprocess(function: Callable[[np.ndarray], Tensor], what: str, of_images: bool = True) -> Preprocess:
    """The preprocessing that a function of the user's does.

    Preprocessing raises UserError, which names `what`, if the function fails or returns something else than a tensor;
    if `of_images`, one of shape (3, S, S), float32 or uint8.
    """
    kind = "a tensor (3, S, S) of float32 or uint8" if of_images else "a tensor"
    expected = f"expected {kind}, given a uint8 array (H, W, 3)"

    def on_cpu(image: np.ndarray) -> Tensor:
        with named_failures(f"the preprocess of {what}", expected):
            x = function(image)
        if not isinstance(x, Tensor):
            raise UserError(f"the preprocess of {what} returned {type(x).__name__};\n{expected}")
        is_image = x.ndim == 3 and x.shape[0] == 3 and x.shape[1] == x.shape[2] and x.dtype in IMAGE_DTYPES
        if of_images and not is_image:
            dtype = str(x.dtype).removeprefix("torch.")
            raise UserError(f"the preprocess of {what} returned a tensor {list(x.shape)} of {dtype};\n{expected}")
        return x

    return Preprocess(on_cpu)


@contextmanager
def named_failures(what: str, expected: str = "") -> Iterator[None]:
    """Turn an exception in the user's own code `what` into a UserError that says where it was raised."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever that code raises
        place = error.__traceback__
        while place and place.tb_next:
            place = place.tb_next
        where = f"{os.path.basename(place.tb_frame.f_code.co_filename)}, line {place.tb_lineno}"
        more = f";\n{expected}" if expected else ""
        raise UserError(f"{what} failed with {type(error).__name__}: {first_line(error)} ({where}){more}") from error


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
