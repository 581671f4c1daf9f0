"""Building blocks of the networks and of the sampling loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.modules import module as all_modules
from torch.optim.swa_utils import get_ema_multi_avg_fn

Module = TypeVar("Module", bound=nn.Module)


class NormalStream(Protocol):
    """A source of standard normal numbers."""

    def randn(self, shape: Sequence[int], device: Any = None, dtype: torch.dtype | None = None) -> Tensor: ...


class SiLU(nn.SiLU):
    """The activation x * sigmoid(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class GroupNorm32(nn.GroupNorm):
    """Group normalisation in float32, with float32 parameters.

    norm(x) has the shape and dtype of x (B, C, ...); `dtype` overrides the latter. norm(x, scale, shift) returns
    norm(x) * (1 + scale) + shift for scale and shift of shape (B, C, 1, ...): AdaGN (Dhariwal and Nichol 2021,
    arXiv:2105.05233, section 3.1).
    """

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        dtype = dtype or x.dtype
        if infers_on_gpu(x) and x.dtype != torch.float64 and x.ndim > 2:
            return self._as_affine_map(x, scale, shift, dtype)
        compiling = torch.compiler.is_compiling()
        half_on_cpu = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and not compiling
        if half_on_cpu and not torch.is_grad_enabled() and _is_channels_last(x):
            return self._channels_last(x, scale, shift, dtype=dtype)
        x = x if compiling else x.contiguous()  # compiled kernels accept any memory layout
        # The CPU's kernel for half precision computes in float32 internally.
        h = super().forward(x.to(dtype) if half_on_cpu else x.float()).to(dtype)
        if scale is None:
            return h
        in_place = not (compiling or h.requires_grad or scale.requires_grad or shift.requires_grad)
        return torch.addcmul(shift, h, 1 + scale, out=h if in_place else None)

    def _as_affine_map(self, x: Tensor, scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
        """`forward` for inference on a GPU: one pass over x for the moments, and one for factor * x + offset.

        The factor and the offset of each image and channel include the modulation. Half precision is rounded once.
        """
        mean, variance = self._moments(x)  # (B, G)
        factor = self.weight.view(self.num_groups, -1) * torch.rsqrt(variance + self.eps)[:, :, None]  # (B, G, C / G)
        offset = self.bias.view(self.num_groups, -1) - mean[:, :, None] * factor
        factor, offset = factor.flatten(1), offset.flatten(1)  # (B, C)
        if scale is not None:
            modulation = 1 + scale.flatten(1).float()
            factor, offset = factor * modulation, offset * modulation + shift.flatten(1).float()
        if torch.compiler.is_compiling():
            factor, offset = (
                materialised(values).reshape(*values.shape, *[1] * (x.ndim - 2)) for values in (factor, offset)
            )
            return torch.addcmul(offset, x.float(), factor).to(dtype)
        # batch_norm with mean 0 and variance 1: the only eager operation for factor * x + offset in half precision.
        channels, factor, offset = x.to(dtype).reshape(1, factor.numel(), -1), factor.flatten(), offset.flatten()
        zeros, ones = torch.zeros_like(offset), torch.ones_like(offset)
        h = torch.batch_norm(channels, factor, offset, zeros, ones, False, 0.0, 0.0, False)  # (1, B * C, ...)
        return h.view(x.shape)

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of each group of each image, (B, G), in float32."""
        if not torch.compiler.is_compiling():
            groups = x.reshape(1, len(x) * self.num_groups, -1)  # (1, B * G, ...)
            unused = x.new_zeros(2, groups.shape[1], dtype=torch.float32)  # running averages, a required argument
            mean, variance = torch.batch_norm_update_stats(groups, *unused, 0.0)
            return mean.view(len(x), -1), variance.view(len(x), -1)
        # First the moments of channels (channels-last), in chunks of about 4096 pixels that keep the whole GPU busy.
        pixels = x.movedim(1, -1).float().flatten(1, -2)  # (B, T, C)
        chunks = math.gcd(pixels.shape[1], 2 ** max(0, (pixels.shape[1] // 4096).bit_length() - 1))
        variance, mean = torch.var_mean(pixels.unflatten(1, (chunks, -1)), dim=2, correction=0)  # (B, chunks, C)
        variance, mean = (m.unflatten(2, (self.num_groups, -1)) for m in (variance, mean))  # (B, chunks, G, C / G)
        group_mean = mean.mean(dim=(1, 3), keepdim=True)  # (B, 1, G, 1)
        group_variance = (variance + (mean - group_mean).square()).mean(dim=(1, 3))
        return group_mean.flatten(1), group_variance

    def _channels_last(self, x: Tensor, scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
        """`forward` for a channels-last x (B, C, H, W) in half precision on a CPU.

        PyTorch's group normalisation computes the variance as E[x^2] - E[x]^2 there, which cancels if the mean is
        large. Its batch normalisation does not: for a single image, it yields the moments of each channel, and applies
        normalisation and modulation in one pass.
        """
        images = []
        unused = torch.zeros_like(self.bias), torch.zeros_like(self.bias)  # running averages, a required argument
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


def infers_on_gpu(x: Tensor) -> bool:
    """Whether x is on a GPU, and autograd needs nothing of what is computed from it."""
    return x.device.type == "cuda" and not torch.is_grad_enabled()


def materialised(x: Tensor) -> Tensor:
    """x, which the compiler is made to materialise for inference on a GPU, in its uncompiled memory format.

    The compiler would recompute small tensors for every element of a large one, and choose memory formats itself.
    """
    return x.as_strided(x.shape, x.stride()) if infers_on_gpu(x) and torch.compiler.is_compiling() else x


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


class NormActConv(nn.Sequential):
    """Group normalisation, activation, optional dropout and a convolution, with methods that reuse memory.

    On a CPU, element-wise operations spend most of their time allocating memory. So `activate` overwrites the output of
    the normalisation, and `add` that of the convolution, unless autograd, a hook or a client's layer may need it.
    """

    def activate(self, x: Tensor, *scale_shift: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Normalise and activate x (B, C, H, W); see `GroupNorm32` for the other arguments."""
        norm, activation, *_ = self
        if type(norm).forward is not _GROUP_NORM or is_patched(norm):  # a client's
            h = norm(x if dtype is None else x.to(torch.promote_types(x.dtype, dtype)))
            return activation(h * (1 + scale_shift[0]) + scale_shift[1] if scale_shift else h)
        h = norm(x, *scale_shift, dtype=dtype)
        if type(activation) is SiLU and not (is_observed(norm) or is_observed(activation)):
            return nn.functional.silu(h, inplace=True)
        return activation(h)

    def convolve(self, h: Tensor) -> Tensor:
        """Apply the layers after the activation: (B, C, H, W) -> (B, D, H, W)."""
        _, _, *layers = self
        for layer in layers:
            h = layer(h)
        return h

    def add(self, h: Tensor, skip: Tensor) -> Tensor:
        """The sum of the output `h` of `convolve` and a skip connection, both (B, D, H, W)."""
        *_, conv = self
        is_new = type(conv) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and not is_observed(conv)
        return h.add_(skip) if is_new and not h.requires_grad else h + skip


_GROUP_NORM = GroupNorm32.forward  # which scripts may replace


def is_observed(module: nn.Module) -> bool:
    """Whether others than the caller may keep inputs or outputs of `module`: it has hooks, or is patched."""
    if torch.compiler.is_compiling():
        return bool(module._forward_hooks)
    kinds = "forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks"
    hooks = (getattr(module, f"_{kind}") or getattr(all_modules, f"_global_{kind}") for kind in kinds)
    return is_patched(module) or any(hooks)


def is_patched(module: nn.Module) -> bool:
    """Whether the forward of this module has been replaced, and not that of its class."""
    return not torch.compiler.is_compiling() and "forward" in vars(module)


class PointwiseConv1d(nn.Conv1d):
    """A convolution with kernel size 1, computed as a linear map: (B, C, T) -> (B, D, T).

    Channels-last tensors are not copied.
    """

    def __init__(self, channels: int, out_channels: int):
        super().__init__(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.mT, self.weight.squeeze(2), self.bias).mT


MM_HAS_OUT_DTYPE = "dtype" in torch.ops.aten.mm.overloads()  # torch.mm(out_dtype=...), from PyTorch 2.8 on


def conv3x3_split_float16(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A padded 3x3 convolution in float32 with few output channels, by products of float16 matrices: (B, C, H, W) ->
    (B, D, H, W).

    Inputs and weights are sums of a high and a low float16 part, and products are accumulated in float32, so the error
    is that of float32. The product of two low parts is negligible. GPUs have fast units for float16, but not for
    float32. Requires `MM_HAS_OUT_DTYPE`.
    """
    (batch, channels, height, width), outputs = x.shape, conv.out_channels
    weight = conv.weight.permute(2, 3, 0, 1).reshape(9 * outputs, channels)  # of all shifts
    weight = nn.functional.pad(weight, (0, 0, 0, -len(weight) % 8)).mT  # matrices of odd sizes are slow
    (x_high, x_low), (high, low) = _split_float16(x.movedim(1, -1).reshape(-1, channels)), _split_float16(weight)
    both = torch.mm(x_high, torch.cat([high, low], dim=1), out_dtype=torch.float32)
    product = torch.mm(x_low, high, out_dtype=torch.float32) + both[:, : high.shape[1]] + both[:, high.shape[1] :]
    product = product[:, : 9 * outputs].view(batch, height, width, 3, 3, outputs)
    product = nn.functional.pad(product, (0, 0, 0, 0, 0, 0, 1, 1, 1, 1))
    shifted = (product[:, i : i + height, j : j + width, i, j] for i in range(3) for j in range(3))
    return (sum(shifted) + conv.bias).movedim(-1, 1)


def _split_float16(x: Tensor) -> tuple[Tensor, Tensor]:
    """Float16 tensors whose sum is x (float32), to 21 bits."""
    # Not x.half(): a compiler may skip its rounding where the value is used in float32 again.
    high = (x.view(torch.int32) & ~(2**13 - 1)).view(torch.float32)  # a significand of 11 bits
    return high.half(), (x - high).half()


def normalization(channels: int) -> GroupNorm32:
    """Group normalisation of `channels`, a multiple of 32, in 32 groups (Wu and He 2018, arXiv:1803.08494)."""
    return GroupNorm32(32, channels)


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
    """A convolution in `dims` = 1, 2 or 3 dimensions. Raises ValueError for other `dims`."""
    return _of_dimension(dims, nn.Conv1d, nn.Conv2d, nn.Conv3d)(*args, **kwargs)


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d:
    """Average pooling in `dims` = 1, 2 or 3 dimensions. Raises ValueError for other `dims`."""
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
    """Update exponential moving averages in place: target <- rate * target + (1 - rate) * source, 0 <= rate <= 1.

    Sources are converted to the dtypes of their targets.
    """
    pairs = [(target, source.to(target.dtype)) for target, source in zip(target_params, source_params, strict=False)]
    if pairs:
        get_ema_multi_avg_fn(rate)(*map(list, zip(*pairs, strict=True)), None)


def mean_flat(tensor: Tensor) -> Tensor:
    """Mean over all dimensions except the first: (B, ...) -> (B,)."""
    return tensor.reshape(len(tensor), -1).mean(dim=1)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """Sinusoidal embedding of timesteps (Vaswani et al. 2017, arXiv:1706.03762, section 3.5).

    Args:
        timesteps: (B,), integer or fractional.
        dim: number of channels of the embedding.
        max_period: longest period, approximately, divided by 2 pi.

    Returns:
        (B, dim), float32: cosines, then sines, then a zero if `dim` is odd.
    """
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=timesteps.device) * (-math.log(max_period) / half))
    angles = timesteps[:, None].float() * frequencies  # (B, half)
    if torch.compiler.is_compiling() and angles.device.type == "cuda":
        angles = angles.double()  # compiled sines of float32 numbers are approximate, worse for large angles
    embedding = torch.cat([angles.cos(), angles.sin()], dim=1).float()
    return nn.functional.pad(embedding, (0, dim % 2))


def checkpoint(func: Callable[..., Any], inputs: Sequence[Any], params: Iterable[Tensor], flag: bool) -> Any:
    """Call `func(*inputs)`; if `flag`, recompute its activations in the backward pass instead of storing them.

    `params`, the parameters that `func` uses, is ignored: autograd finds them.
    """
    if flag:
        return torch.utils.checkpoint.checkpoint(func, *inputs, use_reentrant=False)
    return func(*inputs)


class CheckpointFunction(torch.autograd.Function):
    """Activation checkpointing as an autograd function, for clients of guided-diffusion; not used here.

    CheckpointFunction.apply(run_function, length, *args) returns the output of `run_function`, a tensor or a tuple of
    tensors. The first `length` of `args` are its inputs, the others the parameters that it uses.
    """

    @staticmethod
    def forward(ctx: Any, run_function: Callable[..., Any], length: int, *args: Any) -> Tensor | tuple[Tensor, ...]:
        ctx.run_function, ctx.length, ctx.args = run_function, length, args
        with torch.no_grad():
            return run_function(*args[:length])

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
    """Standard normal numbers of the given shape, device and dtype.

    A `torch.Generator` draws on its own device. None stands for PyTorch's global generator.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        return generator.randn(shape, device=device, dtype=dtype)
    drawn_on = device if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, device=drawn_on, dtype=dtype).to(device=device)


def randn_like(x: Tensor, generator: torch.Generator | NormalStream | None = None) -> Tensor:
    """Standard normal numbers of the shape, device and dtype of `x`; see `randn`."""
    if generator is None:
        return torch.randn_like(x)
    return randn(x.shape, generator, device=x.device, dtype=x.dtype)
