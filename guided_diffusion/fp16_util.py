"""Half precision."""

from __future__ import annotations

import platform

import torch
from torch import nn


def half_precision_dtype(device: torch.device | str) -> torch.dtype:
    """The 16-bit type that is fast on `device`: float16 on an accelerator, bfloat16 on a CPU with instructions for it.

    On any other CPU, where 16-bit arithmetic is emulated and slow, it is float32.
    """
    if torch.device(device).type != "cpu":
        return torch.float16
    return torch.bfloat16 if _cpu_has_bfloat16() else torch.float32


def _cpu_has_bfloat16() -> bool:
    if platform.machine().lower() in ("arm64", "aarch64"):
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    # torch has no public question for these instructions; where a version lacks one of these, the answer is no.
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def convert_module_to_f16(module: nn.Module, dtype: torch.dtype = torch.float16) -> None:
    """Convert the parameters of `module`, in place, if it is a convolution. For `nn.Module.apply`."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        module.to(dtype)


def convert_module_to_f32(module: nn.Module) -> None:
    """Undo `convert_module_to_f16`."""
    convert_module_to_f16(module, torch.float32)
