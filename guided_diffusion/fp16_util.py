"""Half precision: choice of the dtype, conversion of networks, and mixed-precision training."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from . import logger

INITIAL_LOG_LOSS_SCALE = 20.0


def half_precision_dtype(device: torch.device | str) -> torch.dtype:
    """The fastest 16-bit dtype of `device`: float16 on an accelerator, bfloat16 on a CPU with instructions for it.

    On other CPUs, which emulate 16-bit arithmetic slowly, float32.
    """
    if torch.device(device).type != "cpu":
        return torch.float16
    return torch.bfloat16 if _cpu_has_bfloat16() else torch.float32


def _cpu_has_bfloat16() -> bool:
    if platform.machine().lower() in ("arm64", "aarch64"):
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    # These checks are private in PyTorch, and missing in some versions.
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def convert_module_to_f16(l: nn.Module, dtype: torch.dtype = torch.float16) -> None:  # noqa: E741, the original's name
    """Convert a module in place if it is a convolution. For `nn.Module.apply`."""
    if isinstance(l, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        l.to(dtype)


def convert_module_to_f32(l: nn.Module) -> None:  # noqa: E741, the original's name
    """Undo `convert_module_to_f16`."""
    convert_module_to_f16(l, torch.float32)


class MixedPrecisionTrainer:
    """Backward passes and optimizer steps, in float32 or mixed precision.

    In mixed precision, weights, gradients and optimizer are float32; convolutions, linear maps and attention compute in
    half precision under `torch.autocast` (Micikevicius et al. 2018, arXiv:1710.03740). In float16, the loss is scaled
    to keep small gradients from underflowing: if gradients overflow, the step is skipped and the scale halved.

    The networks of `unet` enable autocast themselves; call others within `autocast()`.

    Args:
        model: network, on the device used for training.
        use_fp16: train in mixed precision.
        fp16_scale_growth: increase of the base-2 logarithm of the loss scale per step.
        initial_lg_loss_scale: base-2 logarithm of the initial loss scale.
        half: dtype of mixed precision; None: the `half_precision_dtype` of the device.

    Attributes:
        master_params, model_params: parameters of the model, in float32.
        param_groups_and_shapes: None, since there are no flat copies of the parameters.
    """

    param_groups_and_shapes: Groups | None = None

    def __init__(
        self,
        *,
        model: nn.Module,
        use_fp16: bool = False,
        fp16_scale_growth: float = 1e-3,
        initial_lg_loss_scale: float = INITIAL_LOG_LOSS_SCALE,
        half: torch.dtype | None = None,
    ):
        self.model = model
        if use_fp16 and hasattr(model, "use_mixed_precision"):
            model.use_mixed_precision()
        self.master_params = self.model_params = list(model.parameters())
        self.device = self.master_params[0].device
        self.dtype = (half or half_precision_dtype(self.device)) if use_fp16 else torch.float32
        self.use_fp16 = self.dtype != torch.float32
        self.scaler = torch.amp.GradScaler(
            self.device.type,
            init_scale=2.0**initial_lg_loss_scale,
            growth_interval=max(1, round(1 / fp16_scale_growth)),
            enabled=self.dtype == torch.float16,
        )

    def autocast(self) -> AbstractContextManager:
        """The context in which to call the network."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.use_fp16)

    def zero_grad(self) -> None:
        """Set the gradients to None."""
        zero_master_grads(self.master_params)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a loss."""
        self.scaler.scale(loss).backward()

    @property
    def lg_loss_scale(self) -> float:
        """Base-2 logarithm of the loss scale."""
        return math.log2(self.scaler.get_scale())

    def optimize(self, opt: torch.optim.Optimizer) -> bool:
        """Call `step` and log the norms and the loss scale. Returns whether a step was taken."""
        grad_norm, param_norm = self.step(opt)
        if self.scaler.is_enabled():
            logger.logkv_mean("lg_loss_scale", self.lg_loss_scale)
            if not grad_norm.isfinite():
                logger.log(f"gradients overflowed: skipped the step, lg_loss_scale is now {self.lg_loss_scale:g}")
                return False
        logger.logkv_mean("grad_norm", grad_norm)
        logger.logkv_mean("param_norm", param_norm)
        return True

    def step(self, opt: torch.optim.Optimizer) -> tuple[Tensor, Tensor]:
        """Take an optimizer step, unless float16 gradients have overflowed. A fused optimizer does not wait to know.

        Returns the norms of gradients and weights before the step, as 0-d tensors on the device.
        """
        self.scaler.unscale_(opt)
        grad_norm = get_total_norm([param.grad for param in self.master_params if param.grad is not None])
        # Integers, such as a frozen table of indices, have no norm.
        param_norm = get_total_norm([param.detach() for param in self.master_params if param.is_floating_point()])
        self.scaler.step(opt)
        self.scaler.update()
        return grad_norm, param_norm

    def master_params_to_state_dict(self, master_params: Iterable[Tensor]) -> dict[str, Tensor]:
        """The model's state dict with other parameter values, such as moving averages."""
        return master_params_to_state_dict(self.model, None, master_params, use_fp16=False)

    def state_dict_to_master_params(self, state_dict: dict[str, Tensor]) -> list[Tensor]:
        """The parameters in a state dict, in the model's order."""
        return state_dict_to_master_params(self.model, state_dict, use_fp16=False)


# For scripts written for guided-diffusion, which trains in half precision with two flat float32 copies of the weights;
# not used here. A group is a list of (name, parameter) with the shape of its flat copy: (-1,) for vectors and scalars,
# (1, -1) for tensors of two or more dimensions.

NamedParams = Sequence[tuple[str, nn.Parameter]]
Groups = Sequence[tuple[NamedParams, tuple[int, ...]]]


def get_param_groups_and_shapes(named_model_params: Iterable[tuple[str, nn.Parameter]]) -> Groups:
    """The two groups of parameters of a network."""
    named = list(named_model_params)
    vectors = [(name, param) for name, param in named if param.ndim <= 1]
    matrices = [(name, param) for name, param in named if param.ndim > 1]
    return [(vectors, (-1,)), (matrices, (1, -1))]


def make_master_params(param_groups_and_shapes: Groups) -> list[nn.Parameter]:
    """A flat float32 copy of each group."""
    return [
        nn.Parameter(_flat(param.detach() for _, param in group).view(shape))
        for group, shape in param_groups_and_shapes
    ]


def model_grads_to_master_grads(param_groups_and_shapes: Groups, master_params: Iterable[nn.Parameter]) -> None:
    """Copy the gradients of each group to those of its flat copy."""
    for master, (group, shape) in zip(master_params, param_groups_and_shapes, strict=True):
        master.grad = _flat(param_grad_or_zeros(param) for _, param in group).view(shape)


@torch.no_grad()
def master_params_to_model_params(param_groups_and_shapes: Groups, master_params: Iterable[Tensor]) -> None:
    """Copy the values of each flat copy back to its group."""
    for master, (group, _) in zip(master_params, param_groups_and_shapes, strict=True):
        for (_, param), values in zip(group, unflatten_master_params(group, master), strict=True):
            param.copy_(values)


def unflatten_master_params(param_group: NamedParams, master_param: Tensor) -> list[Tensor]:
    """The parts of a flat copy, shaped as the group's parameters."""
    params = [param for _, param in param_group]
    pieces = master_param.flatten().split([param.numel() for param in params])
    return [piece.view_as(param) for piece, param in zip(pieces, params, strict=True)]


def master_params_to_state_dict(
    model: nn.Module, param_groups_and_shapes: Groups | None, master_params: Iterable[Tensor], use_fp16: bool
) -> dict[str, Tensor]:
    """The model's state dict with other values: flat copies if `use_fp16` and there are groups, else a tensor each."""
    if use_fp16 and param_groups_and_shapes is not None:
        values = {
            name: piece
            for master, (group, _) in zip(master_params, param_groups_and_shapes, strict=True)
            for (name, _), piece in zip(group, unflatten_master_params(group, master.detach()), strict=True)
        }
    else:
        values = dict(zip((name for name, _ in model.named_parameters()), master_params, strict=True))
    return {**model.state_dict(), **values}


def state_dict_to_master_params(model: nn.Module, state_dict: dict[str, Tensor], use_fp16: bool) -> list[Tensor]:
    """The parameters in a state dict, as flat copies if `use_fp16`, else one tensor per parameter."""
    named = [(name, state_dict[name]) for name, _ in model.named_parameters()]
    return make_master_params(get_param_groups_and_shapes(named)) if use_fp16 else [param for _, param in named]


def param_grad_or_zeros(param: nn.Parameter) -> Tensor:
    """Gradient of a parameter, or zeros if it has none."""
    return torch.zeros_like(param) if param.grad is None else param.grad.detach()


def zero_grad(model_params: Iterable[nn.Parameter]) -> None:
    """Set the gradients to zero."""
    for param in model_params:
        if param.grad is not None:
            param.grad.detach_().zero_()


def zero_master_grads(master_params: Iterable[nn.Parameter]) -> None:
    """Set the gradients to None."""
    for param in master_params:
        param.grad = None


def check_overflow(value: float) -> bool:
    """Whether a number is NaN or infinity."""
    return not math.isfinite(value)


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    """The tensors, flattened and concatenated, in float32."""
    return torch.cat([tensor.flatten().float() for tensor in tensors])
