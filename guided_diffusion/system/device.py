"""Whether to compute on a GPU or on the CPU: never on the CPU by accident."""

import errno
import glob
import os
import socket

import torch

from .. import logger
from ..errors import UserError, first_line

SLURM_GPUS = ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE")  # two lists of numbers, and how many


def check_device(choice: str) -> None:
    """Raise UserError if this machine has a GPU that PyTorch cannot use, or has none and `choice` is "cuda".

    A run on the CPU takes a hundred times longer: it must be somebody's decision. A CPU build of PyTorch may be one; it
    is only warned of, unless Slurm has allotted GPUs.
    """
    if choice == "cpu" or torch.cuda.is_available():
        return
    host, pytorch = socket.gethostname(), f"PyTorch {torch.__version__}"
    if choice == "cuda":
        problem = f"--device cuda: {pytorch} finds no GPU on {host}"
    elif not (sign := _sign_of_gpu()):
        return
    elif torch.version.cuda is None and not sign.startswith("SLURM"):
        logger.warn(f"{host} has a GPU ({sign}), but {pytorch} is a build for CPUs: computing on the CPU")
        return
    else:
        problem = f"{host} has a GPU ({sign}), but {pytorch} cannot use it"
    raise UserError(
        f"{problem}: {_why_no_cuda()}.\n"
        "Install a build of PyTorch for this driver (pip install torch --index-url "
        "https://download.pytorch.org/whl/cu126, or another of https://pytorch.org/get-started/locally), or compute on "
        "the CPU: --device cpu"
    )


def _sign_of_gpu() -> str:
    """What says that there is a GPU for this process: a variable of Slurm, or a device file; empty if nothing does."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if hidden in ("", "-1", "NoDevFiles"):  # the last is Slurm's
        return ""
    for name in SLURM_GPUS:
        if os.environ.get(name) and (name, os.environ[name]) != ("SLURM_GPUS_ON_NODE", "0"):
            return f"{name}={os.environ[name]}"
    return next(iter(_gpu_files()), "")


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
