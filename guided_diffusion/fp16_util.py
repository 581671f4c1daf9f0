"""Half precision: which kind a device is good at, converting a network to it, and training with it."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm


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


class MixedPrecisionTrainer:
    """Backward passes and optimiser steps, in float32 or in mixed precision.

    In mixed precision the weights, their gradients and the optimiser stay in float32 while convolutions, linear maps
    and attention compute in half precision under `torch.autocast` (Micikevicius et al. 2018, arXiv:1710.03740). In
    float16 the loss is scaled, so that small gradients do not vanish: a step whose gradients overflow is left out and
    the scale halved; it doubles again with time.

    Args:
        model: the network, its weights in float32, on the device where it is trained.
        use_fp16: train in mixed precision, in `half_precision_dtype` of the device.
        fp16_scale_growth: growth of the scale's binary logarithm per step.
        initial_lg_loss_scale: binary logarithm of the first scale.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        use_fp16: bool = False,
        fp16_scale_growth: float = 1e-3,
        initial_lg_loss_scale: float = 20.0,
    ):
        self.model = model
        self.master_params = list(model.parameters())
        self.device = self.master_params[0].device
        self.dtype = half_precision_dtype(self.device) if use_fp16 else torch.float32
        self.use_fp16 = self.dtype != torch.float32
        self.scaler = torch.amp.GradScaler(
            self.device.type,
            init_scale=2.0**initial_lg_loss_scale,
            growth_interval=max(1, round(1 / fp16_scale_growth)),
            enabled=self.dtype == torch.float16,
        )

    def autocast(self) -> AbstractContextManager:
        """The context in which the network is to be called."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.use_fp16)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for param in self.master_params:
            param.grad = None

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss."""
        self.scaler.scale(loss).backward()

    def optimize(self, opt: torch.optim.Optimizer) -> tuple[Tensor, Tensor]:
        """Take an optimiser's step, unless float16 has overflowed.

        Returns the norms of the gradients and of the weights before the step, 0-d tensors on the device.
        """
        self.scaler.unscale_(opt)
        grad_norm = get_total_norm([param.grad for param in self.master_params if param.grad is not None])
        param_norm = get_total_norm([param.detach() for param in self.master_params])
        self.scaler.step(opt)
        self.scaler.update()
        return grad_norm, param_norm

    def master_params_to_state_dict(self, master_params: Iterable[Tensor]) -> dict[str, Tensor]:
        """The model's state dict with other values of its parameters, such as their moving averages."""
        names = [name for name, _ in self.model.named_parameters()]
        return {**self.model.state_dict(), **dict(zip(names, master_params, strict=True))}

    def state_dict_to_master_params(self, state_dict: dict[str, Tensor]) -> list[Tensor]:
        """The parameters in a state dict, in the order of the model's."""
        return [state_dict[name] for name, _ in self.model.named_parameters()]
