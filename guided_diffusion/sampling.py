"""What the sampling scripts share: numbered samples, batches of fixed composition, the file of samples.

Sample number i has its noise and, where classes are drawn, its class, from the seed and i alone. The samples are cut,
in order, every batch_size; the ranks take the batches in turn. So the file has the same bytes for any number of ranks,
and after a restart, on the same hardware, precision and CPU threads per rank.
"""

from __future__ import annotations

import math
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torchvision.utils import make_grid

from . import dist_util, logger
from .files import whole_file, write_json, write_whole
from .forward_backward import to_pixels
from .locks import hold
from .memory import enough_memory
from .noise import NoiseStreams, noise_seed
from .parts import Parts, finished_record, lock_of, plain_write_errors, record_of, remove_parts
from .pipeline import encode
from .run_record import now
from .script_util import NUM_CLASSES

if TYPE_CHECKING:
    import argparse

    from tqdm import tqdm

    from .gaussian_diffusion import GaussianDiffusion, Guide, Model

GRID = 64  # the most samples in the picture beside the file


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
    """Make the samples of these numbers from noise, on this rank's device: (B, 3, image_size, image_size).

    Args:
        model: called as model(x, timesteps, **conditions).
        diffusion: its steps are taken back one by one, each of which moves `bar`.
        indices: numbers of the B samples.
        image_size: height and width, in pixels.
        args: flags seed, use_ddim and clip_denoised.
        bar: of the steps.
        conditions: what the model is given besides x and time, each (B, ...).
        cond_fn: guidance, called like the model.

    Raises UserError where the GPU's memory does not suffice.
    """
    device = dist_util.dev()
    loops = (diffusion.p_sample_loop_progressive, diffusion.ddim_sample_loop_progressive)
    steps = loops[args.use_ddim](
        model,
        (len(indices), 3, image_size, image_size),
        clip_denoised=args.clip_denoised,
        cond_fn=cond_fn,
        model_kwargs={name: values.to(device) for name, values in conditions.items()},
        device=device,
        generator=NoiseStreams(args.seed, [f"sample {i}" for i in indices], 0, device),
    )
    with enough_memory(len(indices)):
        for step in steps:
            x = step["sample"]
            bar.update()
            dist_util.check_peers()
    return x


def class_gradient(classifier: Model, scale: float) -> Guide:
    """Guidance towards the classes y (B,): cond_fn(x, t, y) = scale * gradient in x of log p(y | x, t), shaped as x.

    Source: ADM, section 4. `classifier(x, t)` gives logits (B, classes), each row by its own image alone.
    """

    def cond_fn(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            log_p = classifier(x, t).log_softmax(dim=1)  # (B, classes)
            return scale * torch.autograd.grad(log_p.gather(1, y[:, None]).sum(), x)[0]

    return cond_fn


def write_samples(
    make: Callable[[range, tqdm], torch.Tensor],
    image_size: int,
    num_steps: int,
    args: argparse.Namespace,
    otherwise: str,
    settings: Mapping[str, Any],
    circumstances: Mapping[str, Any],
    labels: np.ndarray | None = None,
    class_names: Mapping[int, str] | None = None,
) -> None:
    """Make all samples and write samples_NxHxWx3.npz, with its record and a picture of the first ones beside it.

    Samples wait as parts in samples_NxHxWx3_parts. A file that is there, made with the same settings, is left as it is.

    Args:
        make: makes the samples (B, 3, image_size, image_size) of a batch's numbers, moving a bar by `num_steps`.
        image_size: height and width, in pixels.
        num_steps: denoising steps of a batch.
        args: flags num_samples, batch_size and output.
        otherwise: folder of results where neither --output nor the environment names one.
        settings: what decides the bytes, see `parts.settings_of`.
        circumstances: what decides the last digits, see `inference.prepare`.
        labels: classes of the samples, (num_samples,).
        class_names: class index -> name, as far as they are known.

    Raises:
        UserError: the file is there with other settings, or it or a part cannot be written.
    """
    shape = (args.num_samples, image_size, image_size, 3)
    stem = f"{logger.choose_dir(args.output, otherwise)}/samples_{'x'.join(map(str, shape))}"
    result, folder = f"{stem}.npz", f"{stem}_parts"
    with hold({lock_of(result): result}) as locks:
        if dist_util.on_main(finished_record, result, settings):
            dist_util.on_main(remove_parts, folder)  # of a run that was killed just before
            logger.info(f"{result} is there already, made with the same settings: nothing to do")
            return
        parts = Parts(folder, settings, circumstances)
        batches = [
            range(start, min(start + args.batch_size, args.num_samples))
            for start in range(0, args.num_samples, args.batch_size)
        ]
        done = parts.done()
        to_do = [index for index in range(len(batches)) if index not in done]
        processes = dist_util.get_world_size()
        there = sum(len(batches[index]) for index in done)
        logger.info(f"{args.num_samples} samples for {result}: {args.num_samples - there} to make, {there} are there")
        logger.info(
            f"{processes} process(es) of {circumstances['threads']} thread(s), {circumstances['hardware']}, "
            f"{circumstances['precision']}"
        )

        started, clock = now(), time.monotonic()
        mine = dist_util.share_of(to_do)
        described = "denoising" if processes == 1 else f"denoising (process 1 of {processes})"
        with logger.progress_bar(len(mine) * num_steps, described, "step") as bar:
            for number, index in enumerate(mine, 1):
                locks.check()
                parts.write(index, pixels=to_pixels(make(batches[index], bar)))
                bar.set_postfix(batches=f"{number}/{len(mine)}")
        dist_util.barrier()

        seconds = round(time.monotonic() - clock, 3)
        run = {"started": started, "ended": now(), "seconds": seconds, "processes": processes}
        run |= {"samples_made": args.num_samples - there, **circumstances, "arguments": vars(args)}
        record = {"finished": True, "settings": settings, "samples": args.num_samples, "last_run": run}
        if class_names:
            record["classes"] = {str(index): class_names[index] for index in sorted({*labels.tolist()})}
        locks.check()
        dist_util.on_main(_finish, result, parts, len(batches), shape, labels, record)
    logger.info(f"{args.num_samples} samples are in {result}")


def _finish(
    result: str,
    parts: Parts,
    count: int,
    shape: tuple[int, ...],
    labels: np.ndarray | None,
    record: Mapping[str, Any],
) -> None:
    """Put the parts together. The file of samples comes last: where it is, all is."""
    pixels = (parts.read(index)["pixels"] for index in range(count))
    first: list[np.ndarray] = []
    while len(first) < min(GRID, shape[0]):
        first += list(next(pixels))
    with plain_write_errors():
        write_whole(result.removesuffix(".npz") + ".png", encode(image_grid(np.stack(first[:GRID])), "png", 0))
        write_json(record_of(result), record)
        write_npz(result, shape, (parts.read(index)["pixels"] for index in range(count)), labels)
        parts.remove()


def write_npz(path: str, shape: tuple[int, ...], pixels: Iterable[np.ndarray], labels: np.ndarray | None) -> None:
    """Write samples as people know them: arr_0, uint8 of `shape`, and arr_1, int64, where there are labels.

    `pixels` gives arr_0 piece by piece, so that it need not fit in memory.
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
    """Images (n, H, W, 3) of uint8 in one picture, row by row, as nearly square as possible.

    Every pixel of a small image is repeated, as often as H stays within `side`. Gaps of `pad` pixels are white.
    """
    factor = max(1, side // pixels.shape[1])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)  # (n, 3, H, W)
    images = images.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    columns = math.ceil(math.sqrt(len(images)))
    return make_grid(images, nrow=columns, padding=pad, pad_value=255).permute(1, 2, 0).numpy()
