"""Preparing a trained network for reproducible inference."""

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

# Number of the way in which networks are computed on each kind of device. It grows when last digits change.
ARITHMETIC = {"cpu": 1, "cuda": 2}  # 2: normalisation as one affine map, output convolution from float16 products

# Environment variables that change the arithmetic of NVIDIA's libraries and PyTorch.
DECISIVE_VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "PYTORCH_TUNABLEOP_ENABLED",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)


def prepare_network(
    model: UNetModel | EncoderUNetModel,
    use_fp16: bool,
    num_threads: int = 0,
    compiled: bool = False,
    batch_size: int = 0,
) -> dict[str, Any]:
    """Move a network to this rank's device, in eval mode and the chosen precision, with deterministic kernels.

    Args:
        model: network in float32.
        use_fp16: compute its torso in half precision.
        num_threads: CPU threads of this process; 0: its share of the cores.
        compiled: whether the network will be compiled, see `compilation`.
        batch_size: images per forward pass, for a warning if they are too many; 0: unknown.

    Returns the properties of the machine that affect the last digits: hardware, precision, memory layout, threads and
    versions, by name. Raises UserError if the device has too little memory for the network.
    """
    device = dist_util.dev()
    threads = compute_reproducibly(num_threads)
    keep_freed_memory()
    to_device(model, batch_size).eval()
    classifies = isinstance(model, EncoderUNetModel)
    flag, network = ("--classifier_use_fp16", "classifier") if classifies else ("--use_fp16", "U-Net")
    dtype = choose_dtype(use_fp16, flag, network)
    if dtype == torch.float32:
        model.convert_to_fp32()
    else:
        model.convert_to_fp16(dtype)
    # Half-precision convolutions with enough channels are faster in channels-last layout. But on a GPU, only the
    # compiled normalisation is; and in float32 on a CPU, the exact normalisation would convert the layout back.
    half_on_cpu = device.type == "cpu" and dtype != torch.float32
    channels_last = wide_enough_for_channels_last(model) and (half_on_cpu or (compiled and device.type == "cuda"))
    model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    layout = "channels last" if channels_last else "channels first"
    arithmetic = ARITHMETIC.get(device.type, 1)
    machine = {"precision": dtype_name(dtype), "layout": layout, "arithmetic": arithmetic, "threads": threads}
    return {**machine, **describe_machine(device)}


def wide_enough_for_channels_last(model: torch.nn.Module) -> bool:
    """Whether a U-Net has enough channels for channels-last convolutions to be faster in half precision."""
    return getattr(model, "model_channels", 0) >= 64


def choose_dtype(use_fp16: bool, flag: str, network: str) -> torch.dtype:
    """The dtype in which to compute. Logs it if `flag` requests float16 and another is faster on this rank's device.

    All ranks must call this.
    """
    dtype = shared_half_precision(dist_util.dev()) if use_fp16 else torch.float32
    if use_fp16 and dtype != torch.float16:
        logger.info(f"{flag} True: float16 is slow here, so the {network} computes in {dtype_name(dtype)}")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype, such as float32."""
    return str(dtype).removeprefix("torch.")


def shared_half_precision(device: torch.device) -> torch.dtype:
    """The processes' common `half_precision_dtype`; float32 if they differ. All ranks must call this."""
    dtypes = set(dist_util.gather_objects(half_precision_dtype(device)))
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def compute_reproducibly(num_threads: int = 0) -> int:
    """Make this process compute the same bytes in every run; 0 threads means its share of the cores.

    Returns the number of CPU threads.
    """
    torch.backends.cudnn.benchmark = False  # no autotuning
    torch.backends.cudnn.deterministic = True
    compute_exactly()
    threads = num_threads or dist_util.cores_per_rank()
    torch.set_num_threads(threads)
    return threads


def compute_exactly() -> None:
    """Disable TF32, and accumulate products of half precision in float32."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next tensors. Other C libraries are left alone.

    By default, large blocks return to the system, which clears them before reuse: a fifth of a forward pass on a CPU.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    trim_threshold, mmap_max = -1, -4  # from malloc.h
    mallopt(trim_threshold, -1)
    mallopt(mmap_max, 0)


# The machine


@cache
def describe_machine(device: torch.device) -> dict[str, str]:
    """Hardware, environment variables and versions that affect the last digits, over all processes, by name.

    All ranks must call this. Warns if processes differ.
    """
    variables = " ".join(f"{name}={os.environ[name]}" for name in DECISIVE_VARIABLES if name in os.environ)
    ranks = dist_util.gather_objects((hardware(device), variables))
    shared = {}
    for name, values in zip(("hardware", "environment"), zip(*ranks, strict=True), strict=True):
        counts = Counter(values)
        shared[name] = values[0]
        if len(counts) > 1:
            shared[name] = ", ".join(f"{count} x {value or 'nothing set'}" for value, count in sorted(counts.items()))
            logger.warn(
                f"the {name} differs between processes ({shared[name]}): the last digits of an image depend on the "
                "process that computes it"
            )
    return {**shared, **versions(device)}


def versions(device: torch.device | None = None) -> dict[str, str]:
    """Versions of Python and of the libraries that compute on a device; None: this rank's."""
    device = device or dist_util.dev()
    packages = {"torch": torch.__version__, "numpy": np.__version__, "pillow": PIL.__version__}
    if device.type == "cuda":
        packages |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return {"python": platform.python_version(), **packages}


def hardware(device: torch.device) -> str:
    """Name of the GPU, or instruction set of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}"
