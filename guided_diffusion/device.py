"""Whether to compute on a GPU or on the CPU: never on the CPU by accident."""

import errno
import glob
import os
import socket

import torch

from . import logger
from .errors import UserError, first_line

SLURM_GPUS = ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE")  # set by Slurm if it has allotted GPUs


def check_device(choice: str) -> None:
    """Raise UserError if this machine has a GPU that PyTorch cannot use, or has none and `choice` is "cuda".

    A run on the CPU takes a hundred times longer: it must be somebody's decision. A CPU build of PyTorch may be one; it
    is only warned of, unless Slurm has allotted GPUs.
    """
    if choice == "cpu" or torch.cuda.is_available():
        return
    host = socket.gethostname()
    if choice == "auto":
        if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles"):  # the last is Slurm's
            return
        allotted = [name for name in SLURM_GPUS if os.environ.get(name, "0") not in ("", "0")]
        files = _gpu_files()
        if not allotted and not files:
            return
        why = f"{', '.join(allotted)} in the environment" if allotted else files[0]
        here = f"{host} has a GPU ({why})"
        if torch.version.cuda is None and not allotted:
            logger.warn(f"{here}, but PyTorch {torch.__version__} is a build for CPUs: computing on the CPU")
            return
    else:
        here = f"--device cuda: {host} has no GPU that can be used"
    raise UserError(
        f"{here}, but PyTorch {torch.__version__} cannot use it: {_why_no_cuda()}.\n"
        "Install a build of PyTorch for this driver (pip install torch --index-url https://download.pytorch.org/whl/cu126,"
        " or another of https://pytorch.org/get-started/locally), or compute on the CPU: --device cpu"
    )


def _gpu_files() -> list[str]:
    """Device files of NVIDIA's GPUs, but for those that Slurm gave to other jobs: these cannot be opened."""
    found = []
    for path in sorted(glob.glob("/dev/nvidia[0-9]*")):
        try:
            os.close(os.open(path, os.O_RDWR))
        except OSError as error:
            if error.errno == errno.EPERM:
                continue
        found.append(path)
    return found


def _why_no_cuda() -> str:
    """Why PyTorch finds no GPU, in its own words."""
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        return first_line(error).rstrip(".")
    return "torch.cuda.is_available() is False"
