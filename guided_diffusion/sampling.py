"""Numbered samples in batches of fixed composition, and the file they are written to.

The noise of sample i, and its class if classes are drawn, depend only on the seed and i. Samples are cut into batches
in order, and each rank takes the next batch when it is ready for more. So the file has the same bytes for any number of
ranks and after a restart, on the same hardware and with the same precision and CPU threads per rank.
"""

from __future__ import annotations

import argparse
import math
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import blobfile as bf
import numpy as np
import torch
from torchvision.utils import make_grid
from tqdm import tqdm

from . import dist_util, logger
from .compute.memory import explain_out_of_memory
from .errors import named_write_errors
from .forward_backward import NoiseStreams, noise_seed, to_pixels
from .gaussian_diffusion import GaussianDiffusion, Guide, Model
from .runs.pipeline import encode
from .runs.records import Record, record_of
from .runs.resumable import Result, ResultRun
from .runs.shards import cut
from .script_util import NUM_CLASSES
from .system.files import whole_file, write_json, write_whole

GRID = 64  # most samples in the preview next to the file


def draw_classes(seed: int, num_samples: int, classes: Sequence[int] = range(NUM_CLASSES)) -> np.ndarray:
    """The class of every sample, uniform over `classes`: int64 (num_samples,)."""
    draws = (noise_seed(seed, f"class of sample {i}", 0) for i in range(num_samples))
    return np.array([classes[draw % len(classes)] for draw in draws], np.int64)


def denoise(
    model: Model,
    diffusion: GaussianDiffusion,
    indices: range,
    image_size: int,
    args: argparse.Namespace,
    bar: tqdm,
    conditions: Mapping[str, torch.Tensor],
    cond_fn: Guide | None = None,
) -> torch.Tensor:
    """Denoise pure noise on this rank's device. Returns samples (B, 3, image_size, image_size).

    Args:
        model: called as model(x, timesteps, **conditions).
        diffusion: diffusion to sample from.
        indices: numbers of the B samples.
        image_size: height and width, in pixels.
        args: flags seed, sampler and clip_denoised.
        bar: progress bar, advanced at every step.
        conditions: keyword arguments of the model, each (B, ...).
        cond_fn: guidance, called like the model.

    Raises UserError if the GPU runs out of memory.
    """
    device = dist_util.dev()
    steps = diffusion.loop_of(args.sampler)(
        model,
        (len(indices), 3, image_size, image_size),
        diffusion.num_timesteps,
        clip_denoised=args.clip_denoised,
        cond_fn=cond_fn,
        model_kwargs={name: values.to(device) for name, values in conditions.items()},
        device=device,
        generator=NoiseStreams(args.seed, [f"sample {i}" for i in indices], 0, device),
    )
    with explain_out_of_memory(len(indices)):
        for step in steps:
            x = step["sample"]
            bar.update()
            dist_util.check_peers()
    return x


def class_gradient(classifier: Model, scale: float) -> Guide:
    """Guidance towards the classes y (B,): cond_fn(x, t, y) = scale * grad_x log p(y | x, t), shaped like x.

    Source: ADM, section 4. `classifier(x, t)` returns logits (B, classes); a row depends only on its own image.
    """

    def cond_fn(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            log_p = classifier(x, t).log_softmax(dim=1)  # (B, classes)
            return scale * torch.autograd.grad(log_p.gather(1, y[:, None]).sum(), x)[0]

    return cond_fn


@dataclass(frozen=True)
class SampleBatch:
    """Batch number `index`: the numbers of its samples. It reads no files."""

    index: int
    samples: range
    files: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Samples:
    """Samples 0, 1, ..., and how to make them.

    Attributes:
        make: function of the numbers of a batch and a progress bar, which it advances by `num_steps`; returns samples
            (B, 3, image_size, image_size).
        image_size: height and width, in pixels.
        num_steps: denoising steps per batch.
        labels: classes of all samples, (num_samples,); None: no classes.
        class_names: known names of classes by index.
    """

    make: Callable[[range, tqdm], torch.Tensor]
    image_size: int
    num_steps: int
    labels: np.ndarray | None = None
    class_names: Mapping[int, str] | None = None

    def names_of_drawn_classes(self) -> dict[str, str]:
        """The names of the classes that samples have, by index; empty if they are unknown."""
        if not self.class_names:
            return {}
        return {str(index): self.class_names[index] for index in sorted({*self.labels.tolist()})}


def write_samples(
    samples: Samples,
    args: argparse.Namespace,
    default_output: str,
    settings: Mapping[str, Any],
    machine: Mapping[str, Any],
) -> None:
    """Write samples_NxHxWx3.npz, its record and a preview of the first samples. Resumes an interrupted run.

    Finished batches are kept in samples_NxHxWx3_parts until the file is complete. A finished file with the same
    settings is left as it is.

    Args:
        samples: what to write.
        args: flags num_samples, batch_size and output.
        default_output: folder of results if neither --output nor the environment names one.
        settings: settings that determine the bytes, see `settings.settings_of`.
        machine: hardware and software that determine the last digits, see `inference.prepare_network`.

    Raises:
        UserError: the file was computed with other settings, or a file cannot be written.
    """
    shape = (args.num_samples, samples.image_size, samples.image_size, 3)
    stem = f"{logger.choose_dir(args.output, default_output)}/samples_{'x'.join(map(str, shape))}"
    result = Result(f"{stem}.npz", settings)
    with ResultRun([result], f"{stem}_parts", settings, machine, {}, args) as run:
        if not run.unfinished:
            logger.info(f"{result.path} exists already, with the same settings: nothing to do")
            dist_util.on_main(restore_preview, result.path, shape)
            return
        batches = [SampleBatch(i, numbers) for i, numbers in enumerate(cut(range(args.num_samples), args.batch_size))]
        left = run.remaining_units(batches)
        to_do = sum(len(batch.samples) for batch in left)
        logger.info(
            f"{args.num_samples} samples for {result.path}: {to_do} to make, {args.num_samples - to_do} exist already"
        )
        run.log_machine()
        for batch, nothing in run.read(left, {}, None, lambda batch: samples.num_steps):
            run.write(batch, nothing, pixels=to_pixels(samples.make(batch.samples, run.bar)))

        def pixels() -> Iterator[np.ndarray]:
            return (run.parts.read(batch.index)["pixels"] for batch in batches)

        def join_parts(facts: Record) -> int:
            record = {"finished": True, "settings": settings, "samples": args.num_samples}
            if names := samples.names_of_drawn_classes():
                record["classes"] = names
            record["last_run"] = {"samples_made": to_do, **facts}
            write_preview(f"{stem}.png", np.stack(list(islice(chain.from_iterable(pixels()), GRID))))
            with named_write_errors():
                write_json(record_of(result.path), record)
                write_npz(result.path, shape, pixels(), samples.labels)  # last: if it exists, everything does
            return 0

        run.finish(len(batches), join_parts)
    logger.info(f"{args.num_samples} samples are in {result.path}")


def write_preview(path: str, pixels: np.ndarray) -> None:
    """Write a picture of samples, uint8 (n, H, W, 3). Raises UserError."""
    with named_write_errors():
        write_whole(path, encode(image_grid(pixels), "png", 0))


def restore_preview(result: str, shape: tuple[int, ...]) -> None:
    """Write the preview next to a finished file of samples again if it is gone. `shape` is (N, H, W, 3)."""
    path = f"{os.path.splitext(result)[0]}.png"
    if bf.exists(path):
        return
    first = (min(shape[0], GRID), *shape[1:])
    with bf.BlobFile(result, "rb") as f, zipfile.ZipFile(f) as archive, archive.open("arr_0.npy") as rows:
        np.lib.format.read_magic(rows)
        np.lib.format.read_array_header_1_0(rows)
        pixels = np.frombuffer(bytearray(rows.read(math.prod(first))), np.uint8).reshape(first)
    write_preview(path, pixels)
    logger.info(f"{path} was missing, and is written again")


def write_npz(path: str, shape: tuple[int, ...], pixels: Iterable[np.ndarray], labels: np.ndarray | None) -> None:
    """Write samples in guided-diffusion's format: arr_0, uint8 of `shape`, and arr_1, int64, if there are labels.

    `pixels` yields arr_0 in pieces, so that it need not fit in memory.
    """
    uint8 = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
    with whole_file(path) as f, zipfile.ZipFile(f, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
            np.lib.format.write_array_header_1_0(entry, uint8)
            for piece in pixels:
                entry.write(piece.tobytes())
        if labels is not None:
            with archive.open("arr_1.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, labels.astype(np.int64), allow_pickle=False)


def image_grid(pixels: np.ndarray, side: int = 64, pad: int = 2) -> np.ndarray:
    """Arrange uint8 images (n, H, W, 3) row by row in one picture that is as nearly square as possible.

    Small images are enlarged by repeating pixels, as long as H stays within `side`. Gaps of `pad` pixels are white.
    """
    factor = max(1, side // pixels.shape[1])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)  # (n, 3, H, W)
    images = images.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    columns = math.ceil(math.sqrt(len(images)))
    return make_grid(images, nrow=columns, padding=pad, pad_value=255).permute(1, 2, 0).numpy()
