"""Upsample small images with a diffusion model.

Sample i is made from image i of --base_samples, an output of image_sample.py; if there are fewer images than samples,
they are repeated. Writes samples_NxHxWx3.npz, with the images as arr_0 and, if the model is class-conditional, their
classes as arr_1; a picture of the first images; and a record of the settings. Rerun the same command to resume a run
that was stopped. Under mpiexec, torchrun or srun, samples are split across processes; the file does not depend on their
number (on CPUs, with the same --num_threads).

  python scripts/super_res_sample.py --base_samples samples_50000x64x64x3.npz --num_samples 50000 \\
      --model_path models/64_256_upsampler.pt --timestep_respacing 250 "${MODEL_FLAGS[@]}"
"""

from __future__ import annotations

import argparse
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone's package, before any other
from guided_diffusion import dist_util, logger
from guided_diffusion.checkpoints import load_upsampler
from guided_diffusion.command_line.flags import SAMPLING, add_flags
from guided_diffusion.command_line.parser import ArgumentParser
from guided_diffusion.command_line.presets import preset_flag
from guided_diffusion.command_line.stopping import run
from guided_diffusion.compute.inference import prepare_network
from guided_diffusion.errors import UserError, first_line
from guided_diffusion.forward_backward import from_pixels
from guided_diffusion.images.classes import Classes, read_classes
from guided_diffusion.runs.inputs import entry_of
from guided_diffusion.runs.records import record_of
from guided_diffusion.runs.settings import settings_of, weights_digest
from guided_diffusion.sampling import Samples, denoise, write_samples
from guided_diffusion.script_util import NUM_CLASSES, diffusion_from_flags, sr_model_and_diffusion_defaults
from guided_diffusion.system.files import LFS_POINTER, read_json

import blobfile as bf
import numpy as np
import torch
from tqdm import tqdm


def main(argv: list[str] | None = None) -> int:
    """Upsample the images. Returns 0; raises UserError."""
    args = create_argparser().parse_args(argv)
    dist_util.setup_dist(args.device)
    logger.make_dir()
    diffusion = dist_util.on_every_rank(diffusion_from_flags, vars(args))
    small = dist_util.on_every_rank(SmallImages, args.base_samples, args.small_size, args.class_cond)
    dist_util.on_main(small.check)
    model = dist_util.on_every_rank(load_upsampler, args.model_path, vars(args), args.seed)
    settings = settings_of(
        args,
        model_digest=dist_util.on_main(weights_digest, model),
        base_samples_digest=dist_util.on_main(file_digest, args.base_samples),
    )
    machine = prepare_network(model, args.use_fp16, args.num_threads, batch_size=min(args.batch_size, args.num_samples))
    if args.num_samples > len(small):
        logger.info(
            f"{len(small)} images in {args.base_samples} for {args.num_samples} samples (--num_samples): "
            "images are repeated"
        )
    labels = record = None
    if args.class_cond:
        record = dist_util.on_main(check_classes, args.model_path, args.base_samples, small.labels)
        labels = small.labels[np.arange(args.num_samples) % len(small)]

    def make(indices: range, bar: tqdm) -> torch.Tensor:
        conditions = {"low_res": from_pixels(small.read(indices))}
        if labels is not None:
            conditions["y"] = torch.from_numpy(labels[indices])
        return denoise(model, diffusion, indices, args.large_size, args, bar, conditions)

    samples = Samples(make, args.large_size, diffusion.num_timesteps, labels, record and record.names)
    write_samples(samples, args, "results/super_res_sample", settings, machine)
    return 0


class SmallImages:
    """The images of an .npz file: arr_0, uint8 (n, size, size, 3), and, if `with_labels`, their classes arr_1.

    Images are read on demand, because the file may not fit into memory. Nothing is unpickled.

    Raises UserError if the file cannot be read or has other contents.
    """

    def __init__(self, path: str, size: int, with_labels: bool):
        if not path:
            raise UserError("no small images: give --base_samples FILE.npz")
        expected = f"expected uint8 (n, {size}, {size}, 3) (--small_size)"
        self._path = path
        with _named_errors(path):
            self._archive = zipfile.ZipFile(bf.BlobFile(path, "rb"))
            if not {"arr_0", *(["arr_1"] if with_labels else [])} <= {*self._names()}:
                needed = "arr_0, the images" + (", and arr_1, their classes (--class_cond)" if with_labels else "")
                raise UserError(f"--base_samples {path} has {', '.join(self._names()) or 'nothing'}; expected {needed}")
            self._rows, self._shape, dtype = self._open("arr_0")
            self._start = self._rows.tell()
            labels = self._read_labels() if with_labels else None
        if dtype != np.uint8 or self._shape[1:] != (size, size, 3) or not self._shape[0]:
            raise UserError(f"--base_samples {path}: arr_0 is {dtype} {self._shape}, {expected}")
        if with_labels:
            _check_labels(path, labels, len(self))
            self.labels = labels.astype(np.int64)

    def __len__(self) -> int:
        return self._shape[0]

    def read(self, indices: range) -> np.ndarray:
        """The images of the samples with these indices: uint8 (B, size, size, 3). Raises UserError."""
        images = np.empty((len(indices), *self._shape[1:]), np.uint8)
        with _named_errors(self._path):
            for image, index in zip(images, indices, strict=True):
                self._rows.seek(self._start + index % len(self) * image.size)
                data = self._rows.read(image.size)
                if len(data) < image.size:
                    raise UserError(f"--base_samples {self._path}: arr_0 is truncated")
                image[:] = np.frombuffer(data, np.uint8).reshape(image.shape)
        return images

    def check(self) -> None:
        """Read the whole file. Raises UserError if it is damaged, which `read` might not notice."""
        with _named_errors(self._path):
            if damaged := self._archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} has a wrong checksum")

    def _names(self) -> list[str]:
        return [name.removesuffix(".npy") for name in self._archive.namelist()]

    def _open(self, name: str) -> tuple[BinaryIO, tuple[int, ...], np.dtype]:
        """An array's entry, positioned at its data; its shape and dtype."""
        entry = self._archive.open(f"{name}.npy")
        versions = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran_order, dtype = versions[np.lib.format.read_magic(entry)](entry)
        if fortran_order:
            raise ValueError(f"{name} is in Fortran order")
        return entry, shape, dtype

    def _read_labels(self) -> np.ndarray:
        with self._archive.open("arr_1.npy") as entry:
            return np.lib.format.read_array(entry, allow_pickle=False)


@contextmanager
def _named_errors(path: str) -> Iterator[None]:
    """Turn errors of reading --base_samples in the block into UserErrors that name the file."""
    try:
        yield
    except UserError:
        raise
    except (zipfile.BadZipFile, zlib.error) as error:
        with bf.BlobFile(path, "rb") as f:
            if f.read(len(LFS_POINTER)) == LFS_POINTER:
                raise UserError(
                    f"--base_samples {path} is a Git LFS pointer, not the file itself: run git lfs pull"
                ) from error
        raise UserError(
            f"--base_samples {path} is not an .npz file, or is truncated or damaged: {first_line(error)}"
        ) from error
    except (OSError, bf.Error) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"--base_samples {path} cannot be read: {reason}") from error
    except (ValueError, KeyError, EOFError) as error:
        raise UserError(f"--base_samples {path} does not contain plain arrays: {first_line(error)}") from error


def _check_labels(path: str, labels: np.ndarray, count: int) -> None:
    found = f"--base_samples {path}: arr_1 is {labels.dtype} {labels.shape}"
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise UserError(f"{found}, expected integer classes of {count} images")
    if labels.min() < 0 or labels.max() >= NUM_CLASSES:
        raise UserError(f"{found} from {labels.min()} to {labels.max()}, expected classes 0..{NUM_CLASSES - 1}")


def check_classes(model_path: str, base_samples: str, labels: np.ndarray) -> Classes | None:
    """The upsampler's recorded training classes, if any.

    Raises UserError if small images belong to other classes, by index or by the name that image_sample.py recorded.
    """
    recorded = read_classes(model_path)
    if recorded is None:
        return None
    try:
        names = read_json(record_of(base_samples))["classes"]
    except (OSError, bf.Error, ValueError, TypeError, KeyError):
        names = {}
    names = names if isinstance(names, dict) else {}
    for index in np.unique(labels).tolist():
        known = recorded.names.get(index)
        if known is None or names.get(str(index), known) != known:
            theirs = f" {names[str(index)]}" if str(index) in names else ""
            raise UserError(
                f"--base_samples {base_samples} has images of class {index}{theirs}, unknown to the upsampler.\n"
                f"It was trained with {recorded.describe()} ({recorded.source})"
            )
    return recorded


def file_digest(path: str) -> str:
    """SHA-256 of a file."""
    with bf.BlobFile(path, "rb") as f:
        return entry_of(f).sha256


def create_argparser() -> argparse.ArgumentParser:
    """The flags of the script."""
    parser = ArgumentParser(usage="%(prog)s --model_path FILE --base_samples FILE.npz [flags]", description=__doc__)
    add_flags(parser.add_argument_group("sampling"), [*SAMPLING, "base_samples"])
    model = parser.add_argument_group("the upsampler and the diffusion, as they were trained")
    add_flags(model, {"preset": preset_flag("upsampler"), **sr_model_and_diffusion_defaults()})
    return parser


if __name__ == "__main__":
    run(main)
