"""The forward-backward experiment: noised images, noise streams, units of work.

An image x_0 is noised up to step k of N, then denoised by k steps: Sclocchi, Favero and Wyart, "A phase transition in
diffusion models reveals the hierarchical nature of data", PNAS 122 (2025), arXiv:2402.16991.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from .compute.transfer import download
from .errors import ResultError
from .gaussian_diffusion import GaussianDiffusion, check_step_reverse
from .images.folder import LabelledImage, is_folder_of_samples, path_of_start
from .images.folder import SampleName as SampleName
from .images.folder import parse_sample as parse_sample
from .images.io import to_float
from .runs.resumable import IMAGES
from .runs.shards import cut
from .system.files import folder_name

SAMPLES = "samples"  # kind of files that a second turn starts from


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

    A stream depends only on the seed, the image's name, the step and the trajectory, not on the batch or the process.
    PyTorch's generator of a CPU uses 32 of the seed's 64 bits: there, any two streams are equal with probability 2^-32.

    Args:
        seed: seed of the run.
        names: names of the images in the batch: paths relative to the data folder, or numbers of samples.
        step: time k to which images are noised, or training step.
        device: device that draws the numbers; CPUs and GPUs draw different ones.
        trajectories: for each image, the number j = 1, 2, ... of its sample; by default 1.
    """

    def __init__(
        self,
        seed: int,
        names: Sequence[str],
        step: int,
        device: torch.device | str,
        trajectories: Sequence[int] | None = None,
    ):
        rows = zip(names, trajectories or [1] * len(names), strict=True)
        self.generators = [torch.Generator(device).manual_seed(noise_seed(seed, name, step, j)) for name, j in rows]

    def randn(self, shape: Sequence[int], device=None, dtype=None) -> torch.Tensor:
        """Draw the next numbers of every stream: a tensor of `shape` = (B, ...), row b from stream b."""
        if shape[0] != len(self.generators):
            raise ValueError(f"{len(self.generators)} noise streams cannot fill a batch of {shape[0]}")
        rows = torch.empty(tuple(shape), device=self.generators[0].device, dtype=dtype)
        for row, generator in zip(rows, self.generators, strict=True):
            row.normal_(generator=generator)
        return rows.to(device)


def noise_seed(seed: int, name: str, step: int, trajectory: int = 1) -> int:
    """The 64-bit seed of an image's noise at one step: a hash, so that seeds are practically independent."""
    words = [str(seed).encode(), os.fsencode(name), str(step).encode()]
    if trajectory > 1:  # the first has the seed of a run with a single sample of each image
        words.append(str(trajectory).encode())
    return int.from_bytes(hashlib.sha256(b"\0".join(words)).digest()[:8], "little", signed=True)


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
    """A batch of fixed composition at one time and turn.

    The last digit of a sum in a network may depend on the batch size and on an image's place in the batch. So the whole
    batch is computed even if some samples exist; only those of `todo` are written.

    Attributes:
        step_reverse: k.
        index: number of the batch.
        images: the starting image of each row.
        trajectories: the number j = 1, 2, ... of each row's sample.
        starts: the file that each row starts from, which names its noise: the image, or the sample of the turn before.
        todo: numbers of the rows without a sample.
        turn: 1, 2, ...
        samples: the file that each row's sample is written to.
    """

    step_reverse: int
    index: int
    images: tuple[LabelledImage, ...]
    trajectories: tuple[int, ...]
    starts: tuple[str, ...]
    todo: frozenset[int]
    turn: int = 1
    samples: tuple[str, ...] = ()

    def forward_noise(self, seed: int, device: torch.device | str) -> NoiseStreams:
        """Streams for x_k if all trajectories of an image share it (--share_noise start): those of trajectory 1."""
        return NoiseStreams(seed, self.starts, self.step_reverse, device)

    def noise(self, seed: int, device: torch.device | str) -> NoiseStreams:
        """One stream per row. From the second turn on, the names of the starts already contain the trajectories."""
        trajectories = self.trajectories if self.turn == 1 else None
        return NoiseStreams(seed, self.starts, self.step_reverse, device, trajectories)


def cut_units(
    images: Sequence[LabelledImage], batch_size: int, step_reverse: int, num_trajectories: int = 1
) -> list[Unit]:
    """The units of the first turn, all rows to do.

    The list of images is cut, in order, every `batch_size` images. The pairs (2, first image), (2, second image), ...,
    (3, first image), ... of trajectories and images are cut in the same way. The last batch is filled up with the pairs
    that would follow, which are computed but not written, so that adding trajectories does not change any batch.

    Args:
        images: the chosen images.
        batch_size: images per unit; the last unit of the first trajectory may have fewer.
        step_reverse: k.
        num_trajectories: M, samples of each image.
    """
    first = [(image, 1) for image in images]
    more = [(image, j) for j in range(2, num_trajectories + 1) for image in images]
    following = ((image, j) for j in itertools.count(num_trajectories + 1) for image in images)
    more += itertools.islice(following, -len(more) % batch_size)
    units = []
    for index, batch in enumerate([*cut(first, batch_size), *cut(more, batch_size)]):
        rows, trajectories = zip(*batch, strict=True)
        todo = frozenset(row for row, j in enumerate(trajectories) if j <= num_trajectories)
        units.append(Unit(step_reverse, index, rows, trajectories, tuple(image.path for image in rows), todo))
    return units


class Chain(NamedTuple):
    """The turns of a unit that lack samples, for `runs.Run`, which reads what the first of them starts from.

    Attributes:
        turns: the unit at each of these turns, in order.
        folder: folder of the samples.
    """

    turns: list[Unit]
    folder: SampleFolder

    def at(self, unit: Unit) -> Chain:
        """This chain with `unit` as its only turn."""
        return Chain([unit], self.folder)

    @property
    def index(self) -> int:
        """Number of the unit."""
        return self.turns[0].index

    @property
    def steps(self) -> int:
        """Number of denoising steps."""
        return len(self.turns) * self.folder.step_reverse

    @property
    def files(self) -> dict[str, list[str]]:
        """The starts of the first turn: paths of images, or of samples relative to the output."""
        first = self.turns[0]
        if first.turn == 1:
            return {IMAGES: list(first.starts)}
        return {SAMPLES: [self.folder.within_output(start) for start in first.starts]}


def unfinished_turns(unit: Unit, folder: SampleFolder, num_turns: int, present: Collection[str] = ()) -> Chain:
    """The turns of a unit that lack samples; there may be none.

    Args:
        unit: unit of the first turn.
        folder: folder of the samples.
        num_turns: T.
        present: the samples in the folder.
    """
    turns, starts = [], unit.starts
    for turn in range(1, num_turns + 1):
        rows = zip(unit.images, unit.trajectories, strict=True)
        samples = tuple(folder.sample(image.path, j, turn) for image, j in rows)
        if todo := frozenset(row for row in unit.todo if samples[row] not in present):
            turns.append(replace(unit, starts=starts, todo=todo, turn=turn, samples=samples))
        starts = samples
    return Chain(turns, folder)


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
    def prefix(self) -> str:
        """Common start of all paths of this time: OUTPUT/t_K_N."""
        return f"{self.output}/t_{self.step_reverse}_{self.num_steps}"

    @property
    def path(self) -> str:
        """The folder of samples: OUTPUT/t_K_N_images."""
        return f"{self.prefix}_images"

    @property
    def record(self) -> str:
        """The record of the run: OUTPUT/t_K_N_run.json."""
        return f"{self.prefix}_run.json"

    @property
    def inputs(self) -> str:
        """The list of starting images with sizes and digests: OUTPUT/t_K_N_inputs.json."""
        return f"{self.prefix}_inputs.json"

    @property
    def inputs_parts(self) -> str:
        """The folder of such lists for single units, until they are merged."""
        return f"{self.prefix}_inputs_parts"

    def within_output(self, sample: str) -> str:
        """Path of a sample relative to `output`, given its path relative to the folder."""
        return f"{os.path.basename(self.path)}/{sample}"

    def sample(self, image_path: str, trajectory: int = 1, turn: int = 1) -> str:
        """Path of an image's sample, relative to the folder: [sub/folders/]NAME_t0500[_s002][_u02].JPEG.

        `trajectory` and `turn` are 1, 2, ...; the name has only those above 1.
        """
        time = self.step_reverse * self.diffusion_steps // self.num_steps
        which = (f"_s{trajectory:03d}" if trajectory > 1 else "") + (f"_u{turn:02d}" if turn > 1 else "")
        ending = {"jpeg": "JPEG", "png": "png"}[self.image_format]
        return f"{os.path.splitext(image_path)[0]}_t{time:04d}{which}.{ending}"


def in_order_of_starts(images: Sequence[LabelledImage], data_dir: str) -> list[LabelledImage]:
    """Order the samples of another run by the images that they started from; leave other images in their order.

    By name alone, image_1.png comes before image_10.png, but image_1_t0500.png after image_10_t0500.png. With this
    order, a run that starts from the samples of another one has the same batches as one run of two turns.
    """
    if not is_folder_of_samples(data_dir):
        return list(images)

    def place(image: LabelledImage) -> tuple[int, str, str]:
        label = -1 if image.label is None else image.label
        return label, path_of_start(image.path), image.path

    return sorted(images, key=place)
