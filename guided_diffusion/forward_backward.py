"""The forward-backward experiment: noised images, noise streams, units of work.

An image x_0 is noised up to step k of N, and denoised by the k steps that lead back: Sclocchi, Favero and Wyart, "A
phase transition in diffusion models reveals the hierarchical nature of data", PNAS 122 (2025), arXiv:2402.16991.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .compute.transfer import download
from .errors import ResultError
from .gaussian_diffusion import GaussianDiffusion, check_step_reverse
from .images.folder import LabelledImage
from .images.io import to_float
from .runs.shards import cut
from .system.files import folder_name


def noised_image(
    diffusion: GaussianDiffusion, x_start: torch.Tensor, step_reverse: int, noise: torch.Tensor
) -> torch.Tensor:
    """Take k = `step_reverse` noising steps at once: x_k = sqrt(abar[k-1]) x_0 + sqrt(1 - abar[k-1]) eps.

    After k steps the signal that is left is abar[k-1], since step 1 has index 0. k = 0 gives the image itself. k = N
    gives the noise alone, as the paper does: nothing of the image is left.

    Args:
        diffusion: the (respaced) diffusion, of N steps.
        x_start: starting images, (B, 3, H, W) in [-1, 1].
        step_reverse: k, 0..N.
        noise: standard normal eps, of the shape of `x_start`.

    Returns:
        x_k, of the shape of `x_start`.
    """
    if step_reverse == 0:
        return x_start
    if step_reverse == diffusion.num_timesteps:
        return noise
    last = torch.full((len(x_start),), step_reverse - 1, device=x_start.device)
    return diffusion.q_sample(x_start, last, noise=noise)


class NoiseStreams:
    """One stream of standard normal numbers per image of a batch.

    A stream depends on the run's seed, the image's name and the step alone, never on the batch that the image is in or
    on the process that it meets. Handed to a sampling loop as its `generator`.

    Args:
        seed: the run's seed.
        names: one per row of the batch: paths of images relative to the data folder, or numbers of samples.
        step: the time k to which images are noised; the step of a training.
        device: where the numbers are drawn. Different kinds of device draw different numbers.
    """

    def __init__(self, seed: int, names: Sequence[str], step: int, device: torch.device | str):
        self.generators = [torch.Generator(device).manual_seed(noise_seed(seed, name, step)) for name in names]

    def randn(self, shape: Sequence[int], device=None, dtype=None) -> torch.Tensor:
        """Draw the next numbers of every stream: a tensor of `shape` = (B, ...), row b from stream b."""
        if shape[0] != len(self.generators):
            raise ValueError(f"{len(self.generators)} noise streams cannot fill a batch of {shape[0]}")
        rows = torch.empty(tuple(shape), device=self.generators[0].device, dtype=dtype)
        for row, generator in zip(rows, self.generators, strict=True):
            row.normal_(generator=generator)
        return rows.to(device)


def noise_seed(seed: int, name: str, step: int) -> int:
    """The 64-bit seed of one image's noise at one step: a hash, so that no two of them are related."""
    words = b"\0".join([str(seed).encode(), os.fsencode(name), str(step).encode()])
    return int.from_bytes(hashlib.sha256(words).digest()[:8], "little", signed=True)


def check_times(steps: Sequence[int], num_steps: int, flag: str = "--step_reverse") -> list[int]:
    """The times k, each once. Raises UserError, which names `flag`, unless all are in 0..N = `num_steps`."""
    return list(dict.fromkeys(check_step_reverse(k, num_steps, flag) for k in steps))


def from_pixels(pixels: np.ndarray) -> torch.Tensor:
    """Images in [-1, 1] of shape (B, 3, H, W), float32, from (B, H, W, 3) of uint8."""
    return torch.from_numpy(to_float(pixels)).permute(0, 3, 1, 2).contiguous()


def to_pixels(images: torch.Tensor) -> np.ndarray:
    """Pixels (B, H, W, 3) of uint8, rounded and cut to 0..255, from images in [-1, 1] of shape (B, 3, H, W).

    Raises ResultError if an image contains NaN or infinity.
    """
    return Pixels(images).numpy()


class Pixels:
    """The result of `to_pixels` on its way from the GPU, which may go on with other work meanwhile.

    Args:
        images: (B, 3, H, W), in [-1, 1].
    """

    def __init__(self, images: torch.Tensor):
        pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        self._wait = download(pixels.permute(0, 2, 3, 1).contiguous(), torch.isfinite(images).all())

    def numpy(self) -> np.ndarray:
        """All of them, (B, H, W, 3), once they are here. Raises ResultError if an image contains NaN or infinity."""
        pixels, finite = self._wait()
        if not finite:
            raise ResultError(
                "the model gave NaN or infinity, which cannot be written as an image: its weights may be damaged\n"
                "(--model_path), or too large for half precision (--use_fp16 False)"
            )
        return pixels

    def image(self, i: int) -> np.ndarray:
        """The i-th, (H, W, 3); otherwise as `numpy`."""
        return self.numpy()[i]


@dataclass(frozen=True)
class Unit:
    """A batch of fixed composition, taken to one time and back.

    Sums in a network may depend, in their last digit, on the size of the batch and on an image's place in it. So a
    batch is computed as it was cut, even if some of its samples are there already: only `todo` is written.

    Attributes:
        step_reverse: k.
        index: number of the batch in the list of images.
        images: the images of the batch.
        todo: paths of the images whose sample is missing.
    """

    step_reverse: int
    index: int
    images: tuple[LabelledImage, ...]
    todo: frozenset[str]

    @property
    def files(self) -> dict[str, list[str]]:
        """Paths of the images, for `runs.Run`."""
        return {"images": [image.path for image in self.images]}


def cut_units(
    images: Sequence[LabelledImage], batch_size: int, step_reverse: int, done: Collection[str] = ()
) -> list[Unit]:
    """Cut the list of images, in order, every `batch_size` images.

    Args:
        images: the chosen images.
        batch_size: images per unit; the last has what is left.
        step_reverse: k.
        done: paths of the images whose sample is there.
    """
    return [
        Unit(step_reverse, index, tuple(batch), frozenset(image.path for image in batch if image.path not in done))
        for index, batch in enumerate(cut(images, batch_size))
    ]


def default_output(data_dir: str) -> str:
    """results/diffused_ILSVRC2012_validation, for datasets/ILSVRC2012/validation."""
    return f"results/diffused_{folder_name(data_dir)}"


@dataclass(frozen=True)
class SampleFolder:
    """Where the samples of one time k are, and what they are called.

    Attributes:
        output: the folder of results.
        step_reverse: k.
        num_steps: N.
        diffusion_steps: steps that the model was trained with, in whose units file names give the time.
        image_format: "jpeg" or "png".
    """

    output: str
    step_reverse: int
    num_steps: int
    diffusion_steps: int
    image_format: str = "jpeg"

    @property
    def unit(self) -> str:
        """Start of the paths of everything that belongs to this time: OUTPUT/t_K_N."""
        return f"{self.output}/t_{self.step_reverse}_{self.num_steps}"

    @property
    def path(self) -> str:
        """The folder itself: OUTPUT/t_K_N_images."""
        return f"{self.unit}_images"

    @property
    def record(self) -> str:
        """The record of the run: OUTPUT/t_K_N_run.json."""
        return f"{self.unit}_run.json"

    @property
    def inputs(self) -> str:
        """The list of the starting images, with sizes and digests: OUTPUT/t_K_N_inputs.json."""
        return f"{self.unit}_inputs.json"

    @property
    def inputs_parts(self) -> str:
        """The folder of the same lists for single units of work, until they are joined."""
        return f"{self.unit}_inputs_parts"

    def sample(self, image_path: str) -> str:
        """The sample of an image, relative to the folder: [sub/folders/]NAME_t0500.JPEG."""
        time = self.step_reverse * self.diffusion_steps // self.num_steps
        ending = {"jpeg": "JPEG", "png": "png"}[self.image_format]
        return f"{os.path.splitext(image_path)[0]}_t{time:04d}.{ending}"
