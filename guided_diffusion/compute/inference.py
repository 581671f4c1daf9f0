"""Getting a trained network ready to be used."""

from __future__ import annotations

import ctypes
import os
import platform
from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import PIL
import torch

from .. import dist_util, logger
from ..fp16_util import half_precision_dtype
from ..unet import EncoderUNetModel, UNetModel
from .memory import to_device

# Variables of the environment by which NVIDIA's libraries and PyTorch compute differently.
DECISIVE_VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "PYTORCH_TUNABLEOP_ENABLED",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)


def prepare(
    model: UNetModel | EncoderUNetModel,
    use_fp16: bool,
    num_threads: int = 0,
    compiled: bool = False,
    batch_size: int = 0,
) -> dict[str, Any]:
    """Move a network to this rank's device, in the precision asked for, so that it gives the same bytes every time.

    Args:
        model: the network, in float32.
        use_fp16: compute its torso in half precision.
        num_threads: CPU threads of this process; 0: the cores, divided among the processes.
        compiled: the network will be compiled, see `compilation`.
        batch_size: images per forward pass, for a warning if they are too many; 0: not known.

    Returns:
        What decides the last digits: hardware, precision, layout in memory, threads and versions, by name.

    Raises UserError if the device has not enough memory for the network.
    """
    device = dist_util.dev()
    threads = compute_reproducibly(num_threads)
    keep_memory()
    to_device(model, batch_size).eval()
    dtype = shared_half_precision(device) if use_fp16 else torch.float32
    if dtype == torch.float32:
        model.convert_to_fp32()
    else:
        model.convert_to_fp16(dtype)
    # Convolutions in half precision are faster with the channels last, where there are channels enough. But only some
    # normalisations are: on a GPU the compiled one. In float32 on a CPU, the exact one would turn the layout back.
    half_on_cpu = device.type == "cpu" and dtype != torch.float32
    channels_last = getattr(model, "model_channels", 0) >= 64 and (half_on_cpu or (compiled and device.type == "cuda"))
    model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    precision = str(dtype).removeprefix("torch.")
    if use_fp16 and dtype != torch.float16:
        logger.info(f"--use_fp16 True: there is no fast float16 here, the U-Net computes in {precision}")
    layout = "channels last" if channels_last else "channels first"
    return {"precision": precision, "layout": layout, "threads": threads, **surroundings(device)}


def shared_half_precision(device: torch.device) -> torch.dtype:
    """The `half_precision_dtype` that all processes have, float32 if they differ. All ranks must call this."""
    found = set(dist_util.gather_objects(half_precision_dtype(device)))
    return found.pop() if len(found) == 1 else torch.float32


def compute_reproducibly(num_threads: int = 0) -> int:
    """Have this process compute the same bytes every time, with so many CPU threads; 0: its share of the cores.

    Returns the number of threads.
    """
    torch.backends.cudnn.benchmark = False  # no choice of algorithm by measured speed
    torch.backends.cudnn.deterministic = True
    compute_exactly()
    threads = num_threads or dist_util.cores_per_rank()
    torch.set_num_threads(threads)
    return threads


def compute_exactly() -> None:
    """Have GPUs multiply float32 in float32, not in TF32, and add up products of half precision in float32."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def keep_memory() -> None:
    """Have the C library keep the memory of tensors that are gone, for the next ones.

    By default it hands large pieces back to the system, which clears them each time they are asked for again: a fifth
    of a forward pass on a CPU. Where the library is another than glibc, nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    mallopt(trim_threshold, -1)
    mallopt(mmap_max, 0)


# The machine


@cache
def surroundings(device: torch.device) -> dict[str, str]:
    """What decides the last digits besides the settings: hardware and environment of all processes, and versions.

    All ranks must call this. If processes differ, there is a warning.
    """
    variables = " ".join(f"{name}={os.environ[name]}" for name in DECISIVE_VARIABLES if name in os.environ)
    ranks = dist_util.gather_objects((hardware(device), variables))
    of_all = {}
    for name, found in zip(("hardware", "environment"), zip(*ranks, strict=True), strict=True):
        counts = Counter(found)
        of_all[name] = found[0]
        if len(counts) > 1:
            of_all[name] = ", ".join(f"{count} x {what or 'nothing set'}" for what, count in sorted(counts.items()))
            logger.warn(
                f"the {name} is not the same for all processes ({of_all[name]}): which process computes an image "
                "decides its last digits"
            )
    return {**of_all, **versions(device)}


def versions(device: torch.device | None = None) -> dict[str, str]:
    """Versions of Python and of what else decides the bytes that are computed on a device; None: this rank's."""
    device = device or dist_util.dev()
    packages = {"torch": torch.__version__, "numpy": np.__version__, "pillow": PIL.__version__}
    if device.type == "cuda":
        packages |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return {"python": platform.python_version(), **packages}


def hardware(device: torch.device) -> str:
    """The GPU's name, or the CPU's kind of instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}"
