"""The files of a training run: modelNNNNNN.pt, ema_RATE_NNNNNN.pt and optNNNNNN.pt after NNNNNN steps.

Model and averages are state dicts in the published layout, in float32. The optimiser's file is its state dict, with
one more entry, "training": what else a run needs to go on as if it had never stopped. Each file is whole or absent;
the model is written last, so that where it is, the others are.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import blobfile as bf
import torch

from .checkpoint_file import read_saved
from .errors import UserError
from .files import SCRATCH, is_remote, whole_file


def model_path(folder: str, step: int) -> str:
    """The file of the weights after `step` steps."""
    return bf.join(folder, f"model{step:06d}.pt")


def ema_path(folder: str, rate: float, step: int) -> str:
    """The file of the weights' moving average, of decay `rate`."""
    return bf.join(folder, f"ema_{rate}_{step:06d}.pt")


def opt_path(folder: str, step: int) -> str:
    """The file of the optimiser's state, and of the rest of the run's."""
    return bf.join(folder, f"opt{step:06d}.pt")


def parse_resume_step_from_filename(filename: str) -> int:
    """The number of steps that a file name such as path/modelNNNNNN.pt tells; 0 where it tells none."""
    match = re.search(r"model(\d+)\.pt$", filename)
    return int(match[1]) if match else 0


def find_ema_checkpoint(main_checkpoint: str, step: int, rate: float) -> str | None:
    """The moving average that lies beside a model's file, if there is one."""
    path = ema_path(bf.dirname(main_checkpoint), rate, step)
    return path if bf.exists(path) else None


def find_resume_checkpoint(folder: str, ema_rates: Sequence[float] = ()) -> str | None:
    """The model's file of the newest step in `folder` of which every file is there and whole; None without any."""
    if not bf.isdir(folder):
        return None
    steps = (re.fullmatch(r"model(\d{6,})\.pt", name) for name in bf.listdir(folder))
    for step in sorted((int(match[1]) for match in steps if match), reverse=True):
        others = [opt_path(folder, step), *(ema_path(folder, rate, step) for rate in ema_rates)]
        if all(map(_is_whole, [model_path(folder, step), *others])):
            return model_path(folder, step)
    return None


def _is_whole(path: str) -> bool:
    """Whether there is such a file, and its end is: the directory of its parts is the last that torch.save writes."""
    if not bf.exists(path):
        return False
    with bf.BlobFile(path, "rb", streaming=True) as f:
        return zipfile.is_zipfile(f)


def remove_unfinished(folder: str) -> None:
    """Remove what a killed run had begun to write into its folder: checkpoints, its log, pictures of samples."""
    if is_remote(folder) or not os.path.isdir(folder):
        return
    for name in os.listdir(folder):
        if re.fullmatch(rf"\.(model|opt|ema_|samples_|progress\.|classes\.).*{re.escape(SCRATCH)}", name):
            os.unlink(os.path.join(folder, name))


def write_checkpoint(path: str, state: Mapping[str, Any]) -> None:
    """Save a state whole or not at all. Raises UserError where it cannot be written."""
    try:
        with whole_file(path) as f:
            _save(state, f)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error} (--output). The checkpoints that are there are whole:\n"
            "when there is room, the same command goes on from the newest"
        ) from error


def _save(state: Mapping[str, Any], file: BinaryIO) -> None:
    """torch.save, but that a disk which is full is an OSError: torch would only say that something is missing."""
    failure: list[OSError] = []

    class Watched:
        def write(self, data: bytes) -> int:
            try:
                return file.write(data)
            except OSError as error:
                failure.append(error)
                raise

        def flush(self) -> None:
            file.flush()

    try:
        torch.save(state, Watched())
    except RuntimeError:
        if failure:
            raise failure[0] from None
        raise


def read_optimizer(model_checkpoint: str, step: int) -> dict[str, Any] | None:
    """The state beside a model's file, None where there is none. Raises UserError where the file is something else."""
    path = opt_path(bf.dirname(model_checkpoint), step)
    if not bf.exists(path):
        return None
    state = read_saved(path, "--resume_checkpoint", map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not state.keys() >= {"state", "param_groups"}:
        raise UserError(f"--resume_checkpoint {model_checkpoint}: {os.path.basename(path)} is no optimiser's state")
    return state
