"""Small building blocks of the networks and of the sampling loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

Module = TypeVar("Module", bound=nn.Module)


class NormalStream(Protocol):
    """Anything that hands out standard normal numbers on request."""

    def randn(self, shape: Sequence[int], device: Any = None, dtype: torch.dtype | None = None) -> Tensor: ...


class SiLU(nn.SiLU):
    """The activation x * sigmoid(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class GroupNorm32(nn.GroupNorm):
    """Group normalisation with float32 parameters, computed in float32, and what may follow it at once.

    Called as norm(x), or as norm(x, scale, shift) for norm(x) * (1 + scale) + shift (AdaGN: Dhariwal and Nichol 2021,
    arXiv:2105.05233, section 3.1), where these are (B, C, 1, ...). The result has the dtype of x, or `dtype`.
    """

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        dtype = dtype or x.dtype
        if torch.compiler.is_compiling():  # the compiler's own kernels take any layout
            h = super().forward(x.float()).to(dtype)
        elif x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16):
            channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
            if channels_last and not torch.is_grad_enabled():
                return self._channels_last(x, scale, shift, dtype)
            h = super().forward(x.contiguous().to(dtype))  # the kernel computes in float32 of itself
        else:
            h = super().forward(x.contiguous().float()).to(dtype)
        if scale is None:
            return h
        in_place = not (h.requires_grad or torch.compiler.is_compiling())  # a compiler finds memory of its own
        return torch.addcmul(shift, h, 1 + scale, out=h if in_place else None)

    def _channels_last(self, x: Tensor, scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
        """`forward` on a CPU, in half precision, of x (B, C, H, W) whose channels are last in memory.

        PyTorch's group normalisation takes E[x^2] - E[x]^2 for the variance there, which is wrong for a large mean. Its
        batch normalisation is exact, and that of one image has what is needed: the moments of every channel, and the
        multiplication and addition of two numbers per channel, in one pass.
        """
        images = []
        unused = torch.zeros_like(self.bias), torch.zeros_like(self.bias)  # running averages, which it insists on
        for i, image in enumerate(x.split(1)):  # (1, C, H, W)
            mean, variance = torch.batch_norm_update_stats(image, *unused, 0.0)
            mean, variance = mean.view(self.num_groups, -1), variance.view(self.num_groups, -1)  # (G, C / G)
            spread, group_mean = torch.var_mean(mean, dim=1, correction=0, keepdim=True)
            group_variance = variance.mean(dim=1, keepdim=True) + spread  # (G, 1)
            weight, bias = self.weight, self.bias
            if scale is not None:
                factor = 1 + scale[i].flatten().float()
                weight, bias = weight * factor, torch.addcmul(shift[i].flatten().float(), bias, factor)
            moments = (m.expand_as(mean).flatten() for m in (group_mean, group_variance))
            images.append(nn.functional.batch_norm(image.to(dtype), *moments, weight, bias, eps=self.eps))
        return torch.cat(images) if len(images) > 1 else images[0]


class PointwiseConv1d(nn.Conv1d):
    """A convolution of kernel size 1, computed as the linear map of each pixel that it is: (B, C, T) -> (B, D, T).

    Input and output may have the channels last in memory; then nothing is copied.
    """

    def __init__(self, channels: int, out_channels: int):
        super().__init__(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.mT, self.weight.squeeze(2), self.bias).mT


def normalize_and_activate(
    norm: GroupNorm32,
    activation: nn.Module,
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """activation(norm(x, scale, shift, dtype)), where `activation` may overwrite its input.

    On a CPU most of the time of such steps goes into new memory.
    """
    h = norm(x, scale, shift, dtype)
    return activation(h.clone() if norm._forward_hooks else h)  # a hook may have kept the other


def add_skip(conv: nn.Module, h: Tensor, skip: Tensor) -> Tensor:
    """h + skip, where h is the output of `conv`, which is overwritten unless autograd or a hook may want it."""
    return h + skip if h.requires_grad or conv._forward_hooks else h.add_(skip)


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


def mean_flat(tensor: Tensor) -> Tensor:
    """Mean over all dimensions but the first: (B, ...) -> (B,)."""
    return tensor.reshape(len(tensor), -1).mean(dim=1)


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


class CheckpointFunction(torch.autograd.Function):
    """What `checkpoint` does as a function of autograd, for callers of guided-diffusion; `checkpoint` does without it.

    CheckpointFunction.apply(run_function, length, *args): the first `length` of `args` are the inputs, the others the
    parameters that `run_function` uses. Returns the outputs as a tuple.
    """

    @staticmethod
    def forward(ctx: Any, run_function: Callable[..., Any], length: int, *args: Any) -> tuple[Tensor, ...]:
        ctx.run_function, ctx.length, ctx.args = run_function, length, args
        with torch.no_grad():
            outputs = run_function(*args[:length])
        return outputs if isinstance(outputs, tuple) else (outputs,)

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [x.detach().requires_grad_() for x in ctx.args[: ctx.length]]
        parameters = list(ctx.args[ctx.length :])
        with torch.enable_grad():
            outputs = ctx.run_function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = torch.autograd.grad(outputs, inputs + parameters, output_grads, allow_unused=True)
        return None, None, *grads


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
