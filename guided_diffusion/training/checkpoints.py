"""Files of a training run after NNNNNN steps: modelNNNNNN.pt, ema_RATE_NNNNNN.pt and optNNNNNN.pt.

Model and moving averages are state dicts in the published layout, in float32. The optimizer's file is its state dict
with an extra entry, "training": the rest of the state that a resumed run needs. Each file is complete or absent. The
model appears last, so if it exists, the others do. Files of a run are never overwritten.
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

from ..errors import UserError, WriteError, write_problem
from ..system.checkpoint_files import read_saved
from ..system.files import SCRATCH, is_remote, set_aside, whole_file

State = Mapping[str, Any]

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9c"  # first bytes of files of PyTorch before 1.6, whose end has no marker


def model_path(folder: str, step: int) -> str:
    """File of the weights after `step` steps."""
    return bf.join(folder, f"model{step:06d}.pt")


def ema_path(folder: str, rate: float | str, step: int) -> str:
    """File of the weights' moving average of decay `rate`."""
    return bf.join(folder, f"ema_{rate}_{step:06d}.pt")


def opt_path(folder: str, step: int) -> str:
    """File of the optimizer's state and the rest of the run's state."""
    return bf.join(folder, f"opt{step:06d}.pt")


def parse_resume_step_from_filename(filename: str) -> int:
    """Number of steps in a file name such as path/modelNNNNNN.pt; 0 if it has none."""
    match = re.search(r"model(\d+)\.pt$", filename)
    return int(match[1]) if match else 0


def find_ema_checkpoint(main_checkpoint: str, step: int, rate: float) -> str | None:
    """The moving average's file beside a model's file, if there is one."""
    path = ema_path(bf.dirname(main_checkpoint), rate, step)
    return path if bf.exists(path) else None


def parse_rates(ema_rate: float | str) -> list[float]:
    """The decays in a number or in comma-separated text such as "0.9999,0.99". Raises UserError."""
    try:
        rates = [float(rate) for rate in str(ema_rate).split(",") if rate.strip()]
    except ValueError:
        rates = [-1.0]
    if not all(0 <= rate <= 1 for rate in rates):
        raise UserError(f"--ema_rate {ema_rate}: expected numbers from 0 to 1, separated by commas")
    return rates


def checkpoint_files(folder: str) -> dict[int, list[str]]:
    """File names of each step's checkpoint in a folder, complete or not."""
    files: dict[int, list[str]] = {}
    for name in sorted(bf.listdir(folder)) if bf.isdir(folder) else []:
        if match := re.fullmatch(r"(?:model|opt|ema_(.+)_)(\d{6,})\.pt", name):
            files.setdefault(int(match[2]), []).append(name)
    return files


def newest_model(folder: str) -> str | None:
    """Model file of the newest checkpoint in a folder, complete or not; None if there is none."""
    steps = [step for step, names in checkpoint_files(folder).items() if model_path("", step) in names]
    return model_path(folder, max(steps)) if steps else None


def newest_complete_model(folder: str, ema_rates: Sequence[float | str] = ()) -> str | None:
    """Model file of the newest complete checkpoint in a folder; None if there is none."""
    steps = sorted(checkpoint_files(folder), reverse=True)
    complete = (step for step in steps if not first_incomplete_file(folder, step, ema_rates))
    return next((model_path(folder, step) for step in complete), None)


def ema_rates_beside(folder: str, step: int) -> list[str]:
    """Decays, as text, of the moving averages in a step's checkpoint, ordered by file name."""
    matches = (re.fullmatch(r"ema_(.+)_\d{6,}\.pt", name) for name in checkpoint_files(folder).get(step, []))
    return [match[1] for match in matches if match]


def first_incomplete_file(folder: str, step: int, ema_rates: Sequence[float | str]) -> str | None:
    """The first file of a step's checkpoint that is missing or truncated; None if the checkpoint is complete."""
    paths = [model_path(folder, step), opt_path(folder, step), *(ema_path(folder, rate, step) for rate in ema_rates)]
    return next((path for path in paths if not _is_complete(path)), None)


def _is_complete(path: str) -> bool:
    """Whether a file exists and has its end, the zip directory, which torch.save writes last."""
    if not bf.exists(path):
        return False
    with bf.BlobFile(path, "rb", streaming=True) as f:
        if f.read(len(LEGACY_MAGIC)) == LEGACY_MAGIC:
            return True
        f.seek(0)
        return zipfile.is_zipfile(f)


def remove_unfinished(folder: str) -> None:
    """Remove partly written files of a killed run: checkpoints, log, sample grids."""
    if is_remote(folder) or not os.path.isdir(folder):
        return
    for name in os.listdir(folder):
        if re.fullmatch(rf"\.(model|opt|ema_|samples_|progress|classes).*{re.escape(SCRATCH)}", name):
            os.unlink(os.path.join(folder, name))


def write_checkpoint(folder: str, step: int, model: State, optimizer: State, averages: Mapping[float, State]) -> None:
    """Write all files of a checkpoint, or none of them. The model's file appears last.

    Args:
        folder: output folder.
        step: number of steps taken.
        model: state dict of the network.
        optimizer: state dict of the optimizer, with the entry "training".
        averages: decay -> state dict of the moving average.

    Raises UserError if a file cannot be written, or if the step already has a checkpoint.
    """
    states = {model_path(folder, step): model, opt_path(folder, step): optimizer}
    states |= {ema_path(folder, rate, step): state for rate, state in averages.items()}
    # The stack renames the files at its end, in reverse order; by then all are on disk.
    with _named_write_errors(folder), ExitStack() as stack:
        for path, state in states.items():
            file = stack.enter_context(whole_file(path))
            with _named_write_errors(path):
                _save(state, file)
                file.flush()
                os.fsync(file.fileno())
        if bf.exists(model_path(folder, step)):
            raise UserError(
                f"{model_path(folder, step)} was not there when this run started: another run is writing to {folder}.\n"
                "Nothing was overwritten. Choose another --output for one of them"
            )
        set_aside(*states)  # left by a run that was killed while renaming


@contextmanager
def _named_write_errors(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, bf.Error) as error:
        name = getattr(error, "filename", None) or path
        raise WriteError(
            f"cannot write {name}: {write_problem(error)} (--output). The existing checkpoints are complete:\n"
            "fix this, then rerun the same command to resume from the newest"
        ) from error


def _save(state: State, file: BinaryIO) -> None:
    """torch.save that raises the original error (OSError if the disk is full, `Stopped`) instead of torch's own."""
    failure: list[BaseException] = []

    class Watched:
        def write(self, data: bytes) -> int:
            if failure:  # torch tries to write the end of the file nevertheless
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
    """The optimizer's state beside a model's file; None if there is none. Raises UserError if it is something else."""
    path = opt_path(bf.dirname(model_checkpoint), step)
    if not bf.exists(path):
        return None
    state = read_saved(path, "the checkpoint", map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not state.keys() >= {"state", "param_groups"}:
        raise UserError(f"{path}, beside {os.path.basename(model_checkpoint)}, is not the state of an optimizer")
    return state
