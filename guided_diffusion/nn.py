"""Small building blocks of the networks and of the sampling loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

SiLU = nn.SiLU

Module = TypeVar("Module", bound=nn.Module)


class NormalStream(Protocol):
    """Anything that hands out standard normal numbers on request."""

    def randn(self, shape: Sequence[int], device: Any = None, dtype: torch.dtype | None = None) -> Tensor: ...


class GroupNorm32(nn.GroupNorm):
    """Group normalisation with float32 parameters, computed in float32 and returned in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        # Given channels-last input, the CPU's kernel takes E[x^2] - E[x]^2 for the variance: wrong for a large mean.
        x = x.contiguous()
        if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16):
            return super().forward(x)  # this kernel computes in float32 of itself; no copies are needed
        return super().forward(x.float()).to(x.dtype)


def normalization(channels: int) -> GroupNorm32:
    """Group normalisation of `channels` channels, a multiple of 32, in 32 groups (Wu and He 2018, arXiv:1803.08494)."""
    return GroupNorm32(32, channels)


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
    """A convolution over `dims` = 1, 2 or 3 dimensions. Raises ValueError for another number."""
    return _of_dimension(dims, nn.Conv1d, nn.Conv2d, nn.Conv3d)(*args, **kwargs)


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d:
    """Average pooling over `dims` = 1, 2 or 3 dimensions. Raises ValueError for another number."""
    return _of_dimension(dims, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)(*args, **kwargs)


def _of_dimension(dims: int, *classes: type) -> type:
    if dims not in (1, 2, 3):
        raise ValueError(f"expected 1, 2 or 3 dimensions, not {dims}")
    return classes[dims - 1]


def linear(*args: Any, **kwargs: Any) -> nn.Linear:
    """A linear layer."""
    return nn.Linear(*args, **kwargs)


def scale_module(module: Module, scale: float) -> Module:
    """Multiply all parameters of `module` by `scale`, in place, and return it."""
    for parameter in module.parameters():
        parameter.detach().mul_(scale)
    return module


def zero_module(module: Module) -> Module:
    """Set all parameters of `module` to zero, in place, and return it."""
    for parameter in module.parameters():
        parameter.detach().zero_()
    return module


def update_ema(target_params: Iterable[Tensor], source_params: Iterable[Tensor], rate: float = 0.99) -> None:
    """Move the exponential moving averages `target_params` towards `source_params`, in place.

    target <- rate * target + (1 - rate) * source, with 0 <= rate <= 1.
    """
    get_ema_multi_avg_fn(rate)(list(target_params), list(source_params), None)


def mean_flat(x: Tensor) -> Tensor:
    """Mean over all dimensions but the first: (B, ...) -> (B,)."""
    return x.reshape(len(x), -1).mean(dim=1)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """Sinusoidal embedding of time (Vaswani et al. 2017, arXiv:1706.03762, section 3.5).

    Args:
        timesteps: times, (B,), integers or fractions.
        dim: channels of the embedding.
        max_period: the longest period is nearly 2 pi times this.

    Returns:
        (B, dim), float32: cosines, then sines, then a zero where `dim` is odd.
    """
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=timesteps.device) * (-math.log(max_period) / half))
    angles = timesteps[:, None].float() * frequencies  # (B, half)
    return nn.functional.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


def checkpoint(func: Callable[..., Any], inputs: Sequence[Any], params: Iterable[Tensor], flag: bool) -> Any:
    """Call `func(*inputs)`; where `flag` is set, keep no activations for the backward pass but compute them again.

    `params`, the parameters that `func` uses, are found by autograd itself: the argument stands for its callers' sake.
    """
    if flag:
        return torch.utils.checkpoint.checkpoint(func, *inputs, use_reentrant=False)
    return func(*inputs)


def randn(
    shape: Sequence[int],
    generator: torch.Generator | NormalStream | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Draw standard normal numbers.

    Args:
        shape: shape of the result.
        generator: None for torch's own stream; a generator, which draws where it lives; or a `NormalStream`.
        device: where the result is wanted.
        dtype: floating-point type of the result.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        return generator.randn(shape, device=device, dtype=dtype)
    drawn_on = device if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, device=drawn_on, dtype=dtype).to(device=device)


def randn_like(x: Tensor, generator: torch.Generator | NormalStream | None = None) -> Tensor:
    """Draw standard normal numbers of the shape, device and dtype of `x`; see `randn`."""
    return randn(x.shape, generator, x.device, x.dtype)
