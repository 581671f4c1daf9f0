"""Choice between GPU and CPU. The CPU is never used by accident."""

import errno
import glob
import os
import socket

import torch

from .. import logger
from ..errors import UserError, first_line

SLURM_GPUS = ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE")  # two lists of GPU numbers, and a count


def check_device(choice: str) -> None:
    """Raise UserError if PyTorch cannot use this machine's GPU, or if `choice` is "cuda" and there is no GPU.

    A run on the CPU takes a hundred times longer, so it must be deliberate. A CPU build of PyTorch counts as a
    deliberate choice and only causes a warning, unless Slurm has allocated GPUs.
    """
    if choice == "cpu" or torch.cuda.is_available():
        return
    host, pytorch = socket.gethostname(), f"PyTorch {torch.__version__}"
    if choice == "cuda":
        problem = f"--device cuda: {pytorch} finds no GPU on {host}"
    elif not (sign := _sign_of_gpu()):
        return
    elif torch.version.cuda is None and not sign.startswith("SLURM"):
        logger.warn(f"{host} has a GPU ({sign}), but {pytorch} is a CPU build: computing on the CPU")
        return
    else:
        problem = f"{host} has a GPU ({sign}), but {pytorch} cannot use it"
    raise UserError(
        f"{problem}: {_why_no_cuda()}.\n"
        "Install PyTorch for this driver (pip install torch --index-url https://download.pytorch.org/whl/cu126, or "
        "another from https://pytorch.org/get-started/locally), or compute on the CPU: --device cpu"
    )


def _sign_of_gpu() -> str:
    """Slurm variable or device file that shows that this process has a GPU; "" if there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if visible in ("", "-1", "NoDevFiles"):  # the last is Slurm's
        return ""
    for name in SLURM_GPUS:
        if os.environ.get(name) and (name, os.environ[name]) != ("SLURM_GPUS_ON_NODE", "0"):
            return f"{name}={os.environ[name]}"
    return next(iter(_gpu_files()), "")


def _gpu_files() -> list[str]:
    """Device files of NVIDIA GPUs, except those that Slurm allocated to other jobs, which cannot be opened."""
    files = []
    for path in sorted(glob.glob("/dev/nvidia[0-9]*")):
        try:
            os.close(os.open(path, os.O_RDWR))
        except OSError as error:
            if error.errno == errno.EPERM:
                continue
        files.append(path)
    return files


def _why_no_cuda() -> str:
    """PyTorch's reason for finding no GPU."""
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        return first_line(error).rstrip(".")
    return "torch.cuda.is_available() is False"
