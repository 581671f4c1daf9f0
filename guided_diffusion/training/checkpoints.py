"""The files of a training run: modelNNNNNN.pt, ema_RATE_NNNNNN.pt and optNNNNNN.pt after NNNNNN steps.

Model and averages are state dicts in the published layout, in float32. The optimiser's file is its state dict, with
one more entry, "training": what else a run needs to go on as if it had never stopped. Each file is whole or absent;
the model appears last, so that where it is, the others are. No file that a run has written is ever replaced.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, BinaryIO

import blobfile as bf
import torch

from ..errors import UserError
from ..system.checkpoint_files import read_saved
from ..system.files import SCRATCH, is_remote, set_aside, whole_file

State = Mapping[str, Any]

BEFORE_ZIP = b"\x80\x02\x8a\nl\xfc\x9c"  # how files of PyTorch before 1.6 begin, whose end cannot be recognised


def model_path(folder: str, step: int) -> str:
    """The file of the weights after `step` steps."""
    return bf.join(folder, f"model{step:06d}.pt")


def ema_path(folder: str, rate: float | str, step: int) -> str:
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


def find_resume_checkpoint(folder: str, ema_rates: Sequence[float | str] = ()) -> str | None:
    """The model's file of the newest step in `folder` of which every file is there and whole; None without any."""
    steps = sorted(checkpoint_files(folder), reverse=True)
    whole = (step for step in steps if not first_broken(folder, step, ema_rates))
    return next((model_path(folder, step) for step in whole), None)


def parse_rates(ema_rate: float | str) -> list[float]:
    """The decays in "0.9999,0.99", or in a number. Raises UserError."""
    try:
        rates = [float(rate) for rate in str(ema_rate).split(",") if rate.strip()]
    except ValueError:
        rates = [-1.0]
    if not all(0 <= rate <= 1 for rate in rates):
        raise UserError(f"--ema_rate {ema_rate}: expected numbers from 0 to 1, separated by commas")
    return rates


def checkpoint_files(folder: str) -> dict[int, list[str]]:
    """Names of the files of each step's checkpoint in a folder, complete or not."""
    files: dict[int, list[str]] = {}
    for name in sorted(bf.listdir(folder)) if bf.isdir(folder) else []:
        if match := re.fullmatch(r"(?:model|opt|ema_(.+)_)(\d{6,})\.pt", name):
            files.setdefault(int(match[2]), []).append(name)
    return files


def newest_model(folder: str) -> str | None:
    """The model's file of the newest checkpoint in a folder; None if it has none."""
    steps = [step for step, names in checkpoint_files(folder).items() if _model_name(step) in names]
    return model_path(folder, max(steps)) if steps else None


def ema_rates_beside(folder: str, step: int) -> list[str]:
    """Decays, as text, of the moving averages that a step's checkpoint has, in the order of the files' names."""
    found = (re.fullmatch(r"ema_(.+)_\d{6,}\.pt", name) for name in checkpoint_files(folder).get(step, []))
    return [match[1] for match in found if match]


def first_broken(folder: str, step: int, ema_rates: Sequence[float | str]) -> str | None:
    """The first file of a step's checkpoint that is missing or has no end; None if the checkpoint is complete."""
    paths = [model_path(folder, step), opt_path(folder, step), *(ema_path(folder, rate, step) for rate in ema_rates)]
    return next((path for path in paths if not _is_whole(path)), None)


def _model_name(step: int) -> str:
    return os.path.basename(model_path("", step))


def _is_whole(path: str) -> bool:
    """Whether there is such a file, and its end is: the directory of its parts is the last that torch.save writes."""
    if not bf.exists(path):
        return False
    with bf.BlobFile(path, "rb", streaming=True) as f:
        if f.read(len(BEFORE_ZIP)) == BEFORE_ZIP:
            return True
        f.seek(0)
        return zipfile.is_zipfile(f)


def remove_unfinished(folder: str) -> None:
    """Remove what a killed run had begun to write into its folder: checkpoints, its log, pictures of samples."""
    if is_remote(folder) or not os.path.isdir(folder):
        return
    for name in os.listdir(folder):
        if re.fullmatch(rf"\.(model|opt|ema_|samples_|progress|classes).*{re.escape(SCRATCH)}", name):
            os.unlink(os.path.join(folder, name))


def write_checkpoint(folder: str, step: int, model: State, optimizer: State, averages: Mapping[float, State]) -> None:
    """Save a checkpoint: all of its files, each whole, or none of them. The model's appears last.

    Args:
        folder: where to.
        step: number of steps that were taken.
        model: state dict of the network.
        optimizer: state dict of the optimiser, with the entry "training".
        averages: decay -> state dict of the moving average.

    Raises UserError if a file cannot be written, or if there is a checkpoint of this step.
    """
    states = {model_path(folder, step): model, opt_path(folder, step): optimizer}
    states |= {ema_path(folder, rate, step): state for rate, state in averages.items()}
    try:
        with ExitStack() as stack:  # whose files are renamed in the reverse order, quickly, since they are on the disk
            for path, state in states.items():
                file = stack.enter_context(whole_file(path))
                with _plain_write_errors(path):
                    _save(state, file)
                    file.flush()
                    os.fsync(file.fileno())
            if bf.exists(model_path(folder, step)):
                raise UserError(
                    f"{model_path(folder, step)} was not there when this run began: another run writes into {folder}.\n"
                    "Nothing was overwritten. Choose another --output for one of them"
                )
            with _plain_write_errors(folder):
                set_aside(*states)  # what a run that was killed in the middle of this left of its checkpoint
    except OSError as error:
        raise _not_written(error.filename or folder, error) from error


@contextmanager
def _plain_write_errors(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _not_written(path, error) from error


def _not_written(path: str, error: OSError) -> UserError:
    return UserError(
        f"cannot write {path}: {error.strerror or error} (--output). The existing checkpoints are complete:\n"
        "once that is fixed, the same command resumes from the newest"
    )


def _save(state: Mapping[str, Any], file: BinaryIO) -> None:
    """torch.save, but what interrupts it is raised as it is: torch would only say that something is missing.

    That is an OSError if the disk is full, and `Stopped` if the user insists.
    """
    failure: list[BaseException] = []

    class Watched:
        def write(self, data: bytes) -> int:
            if failure:  # torch would write the end of the file all the same
                raise failure[0]
            try:
                return file.write(data)
            except BaseException as error:
                failure.append(error)
                raise

        def flush(self) -> None:
            file.flush()

    try:
        torch.save(state, Watched())
    except BaseException:
        if failure:
            raise failure[0] from None
        raise


def read_optimizer(model_checkpoint: str, step: int) -> dict[str, Any] | None:
    """The state beside a model's file, None where there is none. Raises UserError where the file is something else."""
    path = opt_path(bf.dirname(model_checkpoint), step)
    if not bf.exists(path):
        return None
    state = read_saved(path, "the checkpoint", map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not state.keys() >= {"state", "param_groups"}:
        raise UserError(f"{path}, beside {os.path.basename(model_checkpoint)}, is not the state of an optimizer")
    return state
