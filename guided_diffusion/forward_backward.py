"""The forward-backward experiment: noised images, noise streams, units of work.

An image x_0 is noised up to step k of N, then denoised by k steps: Sclocchi, Favero and Wyart, "A phase transition in
diffusion models reveals the hierarchical nature of data", PNAS 122 (2025), arXiv:2402.16991.
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
    """Noise images to step k = `step_reverse`: x_k = sqrt(abar[k-1]) x_0 + sqrt(1 - abar[k-1]) eps.

    abar has index k-1 because step 1 has index 0. k = 0 returns the images, k = N the noise alone, as in the paper.

    Args:
        diffusion: (respaced) diffusion of N steps.
        x_start: starting images, (B, 3, H, W) in [-1, 1].
        step_reverse: k, 0..N.
        noise: standard normal eps, shaped like `x_start`.

    Returns:
        x_k, shaped like `x_start`.
    """
    if step_reverse == 0:
        return x_start
    if step_reverse == diffusion.num_timesteps:
        return noise
    last = torch.full((len(x_start),), step_reverse - 1, device=x_start.device)
    return diffusion.q_sample(x_start, last, noise=noise)


class NoiseStreams:
    """One stream of standard normal numbers per image of a batch; the `generator` of a sampling loop.

    A stream depends only on the seed, the image's name and the step, not on the batch or the process.

    Args:
        seed: seed of the run.
        names: names of the images in the batch: paths relative to the data folder, or numbers of samples.
        step: time k to which images are noised, or training step.
        device: device that draws the numbers; CPUs and GPUs draw different ones.
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
    """The 64-bit seed of an image's noise at one step: a hash, so that streams are independent."""
    words = b"\0".join([str(seed).encode(), os.fsencode(name), str(step).encode()])
    return int.from_bytes(hashlib.sha256(words).digest()[:8], "little", signed=True)


def check_times(steps: Sequence[int], num_steps: int, flag: str = "--step_reverse") -> list[int]:
    """The times k without duplicates. Raises UserError naming `flag` unless all are in 0..N = `num_steps`."""
    return list(dict.fromkeys(check_step_reverse(k, num_steps, flag) for k in steps))


def from_pixels(pixels: np.ndarray) -> torch.Tensor:
    """Convert uint8 (B, H, W, 3) to float32 (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(to_float(pixels)).permute(0, 3, 1, 2).contiguous()


def to_pixels(images: torch.Tensor) -> np.ndarray:
    """Convert images (B, 3, H, W) in [-1, 1] to uint8 (B, H, W, 3), rounded and clipped.

    Raises ResultError if an image contains NaN or infinity.
    """
    return Pixels(images).numpy()


class Pixels:
    """`to_pixels` without waiting for the GPU: the copy to the CPU runs in the background.

    Args:
        images: (B, 3, H, W), in [-1, 1].
    """

    def __init__(self, images: torch.Tensor):
        pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        self._wait = download(pixels.permute(0, 2, 3, 1).contiguous(), torch.isfinite(images).all())

    def numpy(self) -> np.ndarray:
        """Wait for all pixels, (B, H, W, 3). Raises ResultError if an image contains NaN or infinity."""
        pixels, finite = self._wait()
        if not finite:
            raise ResultError(
                "the model gave NaN or infinity: its weights may be damaged (--model_path),\n"
                "or too large for half precision (--use_fp16 False)"
            )
        return pixels

    def image(self, i: int) -> np.ndarray:
        """Wait for image i, (H, W, 3). Raises as `numpy` does."""
        return self.numpy()[i]


@dataclass(frozen=True)
class Unit:
    """A batch of fixed composition at one time.

    The last digit of a sum in a network may depend on the batch size and on an image's place in the batch. So the whole
    batch is computed even if some samples exist; only those of `todo` are written.

    Attributes:
        step_reverse: k.
        index: number of the batch.
        images: images of the batch.
        todo: paths of the images without a sample.
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
        batch_size: images per unit; the last unit may have fewer.
        step_reverse: k.
        done: paths of the images that have a sample.
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
    """The paths of the samples at one time k.

    Attributes:
        output: folder of results.
        step_reverse: k.
        num_steps: N.
        diffusion_steps: number of steps in training, the unit of the time in file names.
        image_format: "jpeg" or "png".
    """

    output: str
    step_reverse: int
    num_steps: int
    diffusion_steps: int
    image_format: str = "jpeg"

    @property
    def unit(self) -> str:
        """Common start of all paths of this time: OUTPUT/t_K_N."""
        return f"{self.output}/t_{self.step_reverse}_{self.num_steps}"

    @property
    def path(self) -> str:
        """The folder of samples: OUTPUT/t_K_N_images."""
        return f"{self.unit}_images"

    @property
    def record(self) -> str:
        """The record of the run: OUTPUT/t_K_N_run.json."""
        return f"{self.unit}_run.json"

    @property
    def inputs(self) -> str:
        """The list of starting images with sizes and digests: OUTPUT/t_K_N_inputs.json."""
        return f"{self.unit}_inputs.json"

    @property
    def inputs_parts(self) -> str:
        """The folder of such lists for single units, until they are merged."""
        return f"{self.unit}_inputs_parts"

    def sample(self, image_path: str) -> str:
        """Path of an image's sample, relative to the folder: [sub/folders/]NAME_t0500.JPEG."""
        time = self.step_reverse * self.diffusion_steps // self.num_steps
        ending = {"jpeg": "JPEG", "png": "png"}[self.image_format]
        return f"{os.path.splitext(image_path)[0]}_t{time:04d}.{ending}"
