"""The U-Net of guided-diffusion (Dhariwal and Nichol 2021, arXiv:2105.05233), its upsampler and its classifier.

Shapes: B is the batch size, C a number of channels, T = H * W the number of pixels. Feature maps may be contiguous or
channels-last.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError
from .fp16_util import convert_module_to_f16, convert_module_to_f32, half_precision_dtype
from .nn import (
    MM_HAS_OUT_DTYPE,
    NormActConv,
    PointwiseConv1d,
    SiLU,
    avg_pool_nd,
    checkpoint,
    conv3x3_split_float16,
    conv_nd,
    infers_on_gpu,
    is_observed,
    linear,
    materialised,
    normalization,
    timestep_embedding,
    zero_module,
)


class TimestepBlock(nn.Module):
    """A module whose forward also takes the embedding of timestep and label."""

    @abstractmethod
    def forward(self, x: Tensor, emb: Tensor) -> Tensor: ...


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """A sequence of modules that passes the embedding to each `TimestepBlock`."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, TimestepBlock) else layer(x)
        return x


class Upsample(nn.Module):
    """Double height and width by repeating pixels, then apply a 3x3 convolution if `use_conv`.

    In three dimensions, the first is unchanged.
    """

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None):
        super().__init__()
        self.channels, self.out_channels = channels, out_channels or channels
        self.use_conv, self.dims = use_conv, dims
        self.scale_factor = _scale(dims)
        self.conv = conv_nd(dims, channels, out_channels or channels, 3, padding=1) if use_conv else None

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and torch.is_grad_enabled():
            # The compiled gradient of `interpolate` uses atomic additions: nondeterministic, slow in half precision.
            for dim, factor in enumerate(self.scale_factor, start=2):
                x = x.repeat_interleave(factor, dim)
        else:
            x = F.interpolate(x, scale_factor=self.scale_factor, mode="nearest")  # (B, C, 2H, 2W)
        return x if self.conv is None else self.conv(x)


class Downsample(nn.Module):
    """Halve height and width, by a strided 3x3 convolution if `use_conv`, else by averaging 2x2 pixels.

    In three dimensions, the first is unchanged.
    """

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None):
        super().__init__()
        self.channels, self.out_channels = channels, out_channels or channels
        self.use_conv, self.dims = use_conv, dims
        stride = _scale(dims)
        if use_conv:
            self.op = conv_nd(dims, channels, out_channels or channels, 3, stride=stride, padding=1)
        else:
            self.op = avg_pool_nd(dims, kernel_size=stride, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)  # (B, C, H/2, W/2)


def _scale(dims: int) -> tuple[int, ...]:
    return (1, 2, 2) if dims == 3 else (2,) * dims


class ResBlock(TimestepBlock):
    """A residual block, conditioned on the timestep.

    Args:
        channels: input channels.
        emb_channels: channels of the embedding.
        dropout: dropout probability.
        out_channels: output channels; None: as many as input channels.
        use_conv: use a 3x3 instead of a 1x1 convolution in the skip connection if the number of channels changes.
        use_scale_shift_norm: scale and shift the normalised activations by the embedding, instead of adding it.
        dims: number of spatial dimensions.
        use_checkpoint: recompute activations in the backward pass.
        up: double the resolution.
        down: halve the resolution.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
    ):
        super().__init__()
        self.channels = channels
        self.emb_channels = emb_channels
        self.dropout = dropout
        self.out_channels = out_channels = out_channels or channels
        self.use_conv = use_conv
        self.use_checkpoint = use_checkpoint
        self.use_scale_shift_norm = use_scale_shift_norm
        self.in_layers = NormActConv(
            normalization(channels), SiLU(), conv_nd(dims, channels, out_channels, 3, padding=1)
        )
        self.updown = up or down
        resample = partial(Upsample if up else Downsample, channels, False, dims) if self.updown else nn.Identity
        self.h_upd, self.x_upd = resample(), resample()
        self.emb_layers = nn.Sequential(SiLU(), linear(emb_channels, out_channels * (1 + use_scale_shift_norm)))
        self.out_layers = NormActConv(
            normalization(out_channels),
            SiLU(),
            nn.Dropout(dropout),
            zero_module(conv_nd(dims, out_channels, out_channels, 3, padding=1)),
        )
        if out_channels == channels:
            self.skip_connection = nn.Identity()
        elif use_conv:
            self.skip_connection = conv_nd(dims, channels, out_channels, 3, padding=1)
        else:
            self.skip_connection = conv_nd(dims, channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(B, channels, H, W) and (B, emb_channels) -> (B, out_channels, H', W'), H' = H, 2H or H/2."""
        return checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        reuses_memory = all(type(s) is NormActConv and not is_observed(s) for s in (self.in_layers, self.out_layers))
        if not reuses_memory or len(self.in_layers) != 3:
            return self._forward_of_layers(x, emb)
        h = self.in_layers.activate(x)  # (B, channels, H, W)
        h, x = self.h_upd(h), self.x_upd(x)  # (B, channels, H', W')
        h = self.in_layers.convolve(h)  # (B, out_channels, H', W')
        emb = self._embed(emb, h)
        h, scale_shift = (h, emb.chunk(2, dim=1)) if self.use_scale_shift_norm else (h + emb, ())
        h = self.out_layers.activate(h, *scale_shift)
        h = self.out_layers.convolve(h)  # (B, out_channels, H', W')
        return self.out_layers.add(h, self.skip_connection(x))

    def _forward_of_layers(self, x: Tensor, emb: Tensor) -> Tensor:
        """`_forward` if a client has replaced the sequences of layers or watches them: they are called themselves."""
        if self.updown:
            *layers, conv = self.in_layers
            h, x = self.h_upd(nn.Sequential(*layers)(x)), self.x_upd(x)
            h = conv(h)
        else:
            h = self.in_layers(x)
        emb = self._embed(emb, h)
        if self.use_scale_shift_norm:
            norm, *layers = self.out_layers
            scale, shift = emb.chunk(2, dim=1)
            h = nn.Sequential(*layers)(norm(h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb)
        return self.skip_connection(x) + h

    def _embed(self, emb: Tensor, h: Tensor) -> Tensor:
        """(B, out_channels, 1, 1), in the dtype of h; twice as many channels with use_scale_shift_norm."""
        emb = self.emb_layers(emb).to(h.dtype)
        return emb.reshape(*emb.shape, *[1] * (h.ndim - 2))


def count_flops_attn(model: nn.Module, _x: Any, y: Tensor | tuple[Tensor, ...]) -> None:
    """Add the operations of attention's two matrix products to `model.total_ops`, for the package thop.

    `_x` is unused; `y` is the output of the attention, (B, C, T).
    """
    batch, channels, *pixels = (y[0] if isinstance(y, tuple) else y).shape
    model.total_ops += torch.tensor([2.0 * batch * channels * math.prod(pixels) ** 2], dtype=torch.float64)


class QKVAttention(nn.Module):
    """Multi-head attention; the input channels are ordered (q, k, v) x heads."""

    heads_first = False

    def __init__(self, n_heads: int):
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: Tensor) -> Tensor:
        """(B, 3 * n_heads * C, T) -> (B, n_heads * C, T)."""
        qkv = qkv.mT.contiguous()  # (B, T, 3 * n_heads * C), as fast kernels require
        if self.heads_first:
            q, k, v = qkv.unflatten(2, (self.n_heads, 3, -1)).unbind(3)  # each (B, T, n_heads, C)
        else:
            q, k, v = qkv.unflatten(2, (3, self.n_heads, -1)).unbind(2)
        a = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return a.transpose(1, 2).flatten(2).mT  # (B, n_heads, T, C) -> (B, n_heads * C, T)

    count_flops = staticmethod(count_flops_attn)


class QKVAttentionLegacy(QKVAttention):
    """Multi-head attention; the input channels are ordered heads x (q, k, v)."""

    heads_first = True


class AttentionBlock(nn.Module):
    """Residual self-attention between all pixels of a feature map.

    Args:
        channels: input and output channels.
        num_heads: attention heads, if `num_head_channels` is -1.
        num_head_channels: channels per head.
        use_checkpoint: recompute activations in the backward pass.
        use_new_attention_order: use `QKVAttention` instead of `QKVAttentionLegacy`.

    Raises UserError if the channels are not divisible into such heads.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_checkpoint: bool = False,
        use_new_attention_order: bool = False,
    ):
        super().__init__()
        self.channels = channels
        self.num_heads = _heads(channels, num_heads, num_head_channels)
        self.use_checkpoint = use_checkpoint
        self.norm = normalization(channels)
        self.qkv = PointwiseConv1d(channels, 3 * channels)
        self.attention = (QKVAttention if use_new_attention_order else QKVAttentionLegacy)(self.num_heads)
        self.proj_out = zero_module(PointwiseConv1d(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return checkpoint(self._forward, (x,), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x).flatten(2))  # (B, 3C, T)
        h = self.proj_out(self.attention(qkv))  # (B, C, T)
        return x + h.reshape(x.shape)


def _heads(channels: int, num_heads: int, num_head_channels: int) -> int:
    if num_head_channels == -1:
        if num_heads < 1 or channels % num_heads:
            raise UserError(
                f"{channels} channels cannot be split into {num_heads} attention heads (--num_heads, "
                "--num_heads_upsample)"
            )
        return num_heads
    if num_head_channels < 1 or channels % num_head_channels:
        raise UserError(
            f"{channels} channels cannot be split into attention heads of --num_head_channels {num_head_channels}"
        )
    return channels // num_head_channels


class AttentionPool2d(nn.Module):
    """Attention pooling, with the mean of a feature map as query (CLIP, Radford et al. 2021, arXiv:2103.00020).

    Args:
        spacial_dim: height and width of the feature map.
        embed_dim: input channels.
        num_heads_channels: channels per attention head.
        output_dim: output channels; None: as many as input channels.
    """

    def __init__(self, spacial_dim: int, embed_dim: int, num_heads_channels: int, output_dim: int | None = None):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(embed_dim, spacial_dim**2 + 1) / embed_dim**0.5)
        self.qkv_proj = PointwiseConv1d(embed_dim, 3 * embed_dim)
        self.c_proj = PointwiseConv1d(embed_dim, output_dim or embed_dim)
        self.num_heads = _heads(embed_dim, 1, num_heads_channels)
        self.attention = QKVAttention(self.num_heads)

    def forward(self, x: Tensor) -> Tensor:
        """(B, embed_dim, spacial_dim, spacial_dim) -> (B, output_dim)."""
        x = x.flatten(2)  # (B, C, T)
        x = torch.cat([x.mean(dim=2, keepdim=True), x], dim=2)  # (B, C, 1 + T)
        x = x + self.positional_embedding.to(x.dtype)
        x = self.attention(self.qkv_proj(x))  # (B, C, 1 + T)
        return self.c_proj(x[:, :, :1]).squeeze(2)  # (B, output_dim)


class _Encoder(nn.Module):
    """Embedding, input blocks and middle block, shared by the U-Net and the classifier.

    Subclasses implement `_build_output`, which receives the number of output channels of each input block.
    """

    _convert_when_moved = False  # convert the weights to half precision as soon as they are on an accelerator

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Collection[int],
        dropout: float = 0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
    ):
        super().__init__()
        self.image_size = image_size
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.num_res_blocks = num_res_blocks
        self.attention_resolutions = attention_resolutions
        self.dropout = dropout
        self.channel_mult = channel_mult
        self.conv_resample = conv_resample
        self.dims = dims
        self.num_classes = num_classes
        self.use_checkpoint = use_checkpoint
        self.dtype = torch.float16 if use_fp16 else torch.float32
        self.num_heads = num_heads
        self.num_head_channels = num_head_channels
        self.num_heads_upsample = num_heads if num_heads_upsample == -1 else num_heads_upsample
        self.use_scale_shift_norm = use_scale_shift_norm
        self.resblock_updown = resblock_updown
        self.use_new_attention_order = use_new_attention_order

        emb_channels = 4 * model_channels
        self.time_embed = nn.Sequential(
            linear(model_channels, emb_channels), SiLU(), linear(emb_channels, emb_channels)
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb_channels)

        channels = [self._width(0)]  # of each input block's output
        self.input_blocks = nn.ModuleList(
            [TimestepEmbedSequential(conv_nd(dims, in_channels, channels[0], 3, padding=1))]
        )
        for level in range(len(channel_mult)):
            width = self._width(level)
            for _ in range(num_res_blocks):
                block = [self._residual(channels[-1], width), *self._attention(level, num_heads)]
                self.input_blocks.append(TimestepEmbedSequential(*block))
                channels.append(width)
            if level < len(channel_mult) - 1:
                self.input_blocks.append(TimestepEmbedSequential(self._downsample(width)))
                channels.append(width)
        self.middle_block = TimestepEmbedSequential(
            self._residual(width, width), self._attention_block(width, num_heads), self._residual(width, width)
        )
        self._build_output(channels)

    def _build_output(self, channels: list[int]) -> None:
        raise NotImplementedError

    def _width(self, level: int) -> int:
        return int(self.channel_mult[level] * self.model_channels)

    def _residual(self, channels: int, out_channels: int, up: bool = False, down: bool = False) -> ResBlock:
        return ResBlock(
            channels,
            emb_channels=4 * self.model_channels,
            dropout=self.dropout,
            out_channels=out_channels,
            use_scale_shift_norm=self.use_scale_shift_norm,
            dims=self.dims,
            use_checkpoint=self.use_checkpoint,
            up=up,
            down=down,
        )

    def _attention_block(self, channels: int, num_heads: int) -> AttentionBlock:
        return AttentionBlock(
            channels,
            num_heads=num_heads,
            num_head_channels=self.num_head_channels,
            use_checkpoint=self.use_checkpoint,
            use_new_attention_order=self.use_new_attention_order,
        )

    def _attention(self, level: int, num_heads: int) -> list[AttentionBlock]:
        """The attention block after a residual block, if the level's resolution has one."""
        if 2**level not in self.attention_resolutions:
            return []
        return [self._attention_block(self._width(level), num_heads)]

    def _downsample(self, channels: int) -> ResBlock | Downsample:
        if self.resblock_updown:
            return self._residual(channels, channels, down=True)
        return Downsample(channels, self.conv_resample, self.dims)

    def _upsample(self, channels: int) -> ResBlock | Upsample:
        if self.resblock_updown:
            return self._residual(channels, channels, up=True)
        return Upsample(channels, self.conv_resample, self.dims)

    def _embed_timesteps(self, timesteps: Tensor, batch: int, y: Tensor | None = None) -> Tensor:
        """Embed timesteps (B,) or (1,), and labels (B,), B = `batch`: (B, 4 * model_channels), or (1, ...).

        Raises UserError if labels do not fit.
        """
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels))
        if self.num_classes is None:
            if y is not None:
                raise UserError("found labels for an unconditional model (--class_cond False)")
            return emb
        if y is None or y.shape != (batch,):
            found = "none" if y is None else f"a tensor of shape {tuple(y.shape)}"
            raise UserError(
                f"the model is class-conditional (--class_cond True): expected a label for each of {batch} images, "
                f"found {found}"
            )
        return emb + self.label_emb(y)

    def convert_to_fp16(self, dtype: torch.dtype | None = None) -> None:
        """Convert the weights of all blocks except the output to half precision, in place.

        By default, convert to float16, and only on an accelerator: on a CPU, call `use_mixed_precision`, and convert
        when the model is moved to an accelerator.
        """
        if dtype is None and self._first_weight().device.type == "cpu":
            self.use_mixed_precision()
            self._convert_when_moved = True
            return
        self._convert_when_moved = False
        self.dtype = dtype or torch.float16
        self._apply_to_torso(partial(convert_module_to_f16, dtype=self.dtype))

    def convert_to_fp32(self) -> None:
        """Undo `convert_to_fp16`."""
        self._convert_when_moved = False
        self.dtype = torch.float32
        self._apply_to_torso(convert_module_to_f32)

    def use_mixed_precision(self) -> None:
        """Keep float32 weights and compute under autocast, in the `half_precision_dtype` of the input's device."""
        self.convert_to_fp32()
        self.dtype = torch.float16

    def _apply(self, *args: Any, **kwargs: Any) -> _Encoder:  # called by .to() of this module or its parents
        super()._apply(*args, **kwargs)
        if self._convert_when_moved and self._first_weight().device.type != "cpu":
            self.convert_to_fp16()
        return self

    def _precision(self, x: Tensor) -> tuple[AbstractContextManager, Tensor]:
        """The context to compute in, and `x` in the dtype that the blocks expect.

        The context is autocast for half precision with float32 weights, unless the caller has enabled autocast.
        """
        weights = self._first_weight().dtype
        if self.dtype == weights or weights != torch.float32 or torch.is_autocast_enabled(x.device.type):
            return nullcontext(), x.to(self.dtype)
        dtype = half_precision_dtype(x.device)
        return torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32), x.float()

    def _first_weight(self) -> Tensor:
        first = self.input_blocks[0][0]  # a convolution, unless a client has wrapped it
        weight = getattr(first, "weight", None)  # parameters() is empty in DataParallel replicas
        return weight if isinstance(weight, Tensor) else next(first.parameters())

    def _apply_to_torso(self, function: Callable[[nn.Module], None]) -> None:
        for name in ("input_blocks", "middle_block", "output_blocks"):
            if hasattr(self, name):
                getattr(self, name).apply(function)


class _Output(NormActConv):
    """Normalisation, activation and convolution, in float32 regardless of the dtype of the input."""

    def forward(self, h: Tensor) -> Tensor:
        *_, conv = self
        if h.dtype == torch.float16 and infers_on_gpu(h) and MM_HAS_OUT_DTYPE and isinstance(conv, nn.Conv2d):
            return conv3x3_split_float16(self.activate(materialised(h), dtype=torch.float32), conv)
        return self.convolve(self.activate(h, dtype=torch.float32))


class UNetModel(_Encoder):
    """The U-Net of a diffusion model.

    Args:
        image_size: height and width of the images, in pixels; informative only.
        in_channels: input channels.
        model_channels: base number of channels, multiplied by `channel_mult`.
        out_channels: output channels.
        num_res_blocks: residual blocks per level of the encoder; the decoder has one more.
        attention_resolutions: downsampling factors at which attention follows each residual block.
        dropout: dropout probability in residual blocks.
        channel_mult: channel multiplier of each level.
        conv_resample: resample with a convolution, unless `resblock_updown`.
        dims: number of spatial dimensions.
        num_classes: number of classes of a class-conditional model; None: unconditional.
        use_checkpoint: recompute activations in the backward pass, to save memory.
        use_fp16: compute in half precision, under autocast until `convert_to_fp16` converts the weights.
        num_heads: attention heads, if `num_head_channels` is -1.
        num_head_channels: channels per attention head.
        num_heads_upsample: attention heads in the decoder; -1: `num_heads`.
        use_scale_shift_norm: scale and shift activations by the embedding (FiLM), instead of adding it.
        resblock_updown: resample within residual blocks.
        use_new_attention_order: use `QKVAttention` instead of `QKVAttentionLegacy`.

    Raises UserError if the channels are not divisible into such attention heads.
    """

    def _build_output(self, channels: list[int]) -> None:
        skips = list(channels)
        width = skips[-1]
        self._feature_size = sum(channels) + width  # of all blocks
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(self.channel_mult))):
            for i in range(self.num_res_blocks + 1):
                residual = self._residual(width + skips.pop(), self._width(level))
                width = self._width(level)
                self._feature_size += width
                block = [residual, *self._attention(level, self.num_heads_upsample)]
                if level > 0 and i == self.num_res_blocks:
                    block.append(self._upsample(width))
                self.output_blocks.append(TimestepEmbedSequential(*block))
        self.out = _Output(
            normalization(width),
            SiLU(),
            zero_module(conv_nd(self.dims, width, self.out_channels, 3, padding=1)),
        )

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """Apply the network.

        Args:
            x: noised images, (B, in_channels, H, W); H and W divisible by 2**(levels - 1).
            timesteps: (B,).
            y: labels of a class-conditional model, (B,).

        Returns:
            (B, out_channels, H, W), in the dtype of `x`.

        Raises UserError if `y` is missing, unexpected or of the wrong length.
        """
        precision, h = self._precision(x)
        with precision:
            emb = self._embed_timesteps(timesteps, len(x), y)  # (B, 4 * model_channels)
            skips = []
            for block in self.input_blocks:
                h = block(h, emb)  # (B, C, H / 2**level, W / 2**level)
                skips.append(h)
            h = self.middle_block(h, emb)
            for block in self.output_blocks:
                h = block(materialised(torch.cat([h, skips.pop()], dim=1)), emb)
        with torch.autocast(x.device.type, enabled=False):  # float32, in training too
            return self.out(h).to(x.dtype)  # (B, out_channels, H, W)


class SuperResModel(UNetModel):
    """A U-Net conditioned on a low-resolution image. Args are those of `UNetModel`."""

    def __init__(self, image_size: int, in_channels: int, *args: Any, **kwargs: Any):
        super().__init__(image_size, 2 * in_channels, *args, **kwargs)

    def forward(self, x: Tensor, timesteps: Tensor, low_res: Tensor | None = None, **kwargs: Any) -> Tensor:
        """As `UNetModel.forward`, with `low_res` of shape (B, in_channels, h, w). Raises UserError if it is None."""
        if low_res is None:
            raise UserError("the upsampler needs low-resolution images: low_res is missing")
        low_res = F.interpolate(low_res.to(x.dtype), x.shape[2:], mode="bilinear")  # (B, in_channels, H, W)
        return super().forward(torch.cat([x, low_res], dim=1), timesteps, **kwargs)


class EncoderUNetModel(_Encoder):
    """The encoder half of the U-Net, pooled: a classifier of noised images.

    Args are those of `UNetModel`, without `num_classes`, and `pool`:
        "adaptive": mean over all pixels, then a linear map;
        "attention": `AttentionPool2d`;
        "spatial": means over all pixels after each block, then two linear maps with ReLU in between;
        "spatial_v2": likewise, with group normalisation and SiLU in between.

    Raises UserError if `pool` is unknown or the channels are not divisible into such attention heads.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Collection[int],
        dropout: float = 0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        pool: str = "adaptive",
    ):
        self.pool = pool
        super().__init__(
            image_size=image_size,
            in_channels=in_channels,
            model_channels=model_channels,
            out_channels=out_channels,
            num_res_blocks=num_res_blocks,
            attention_resolutions=attention_resolutions,
            dropout=dropout,
            channel_mult=channel_mult,
            conv_resample=conv_resample,
            dims=dims,
            use_checkpoint=use_checkpoint,
            use_fp16=use_fp16,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            num_heads_upsample=num_heads_upsample,
            use_scale_shift_norm=use_scale_shift_norm,
            resblock_updown=resblock_updown,
            use_new_attention_order=use_new_attention_order,
        )

    def _build_output(self, channels: list[int]) -> None:
        width, out_channels = channels[-1], self.out_channels
        self._feature_size = features = sum(channels) + width  # of all input blocks and the middle block
        if self.pool == "adaptive":
            self.out = nn.Sequential(
                normalization(width),
                SiLU(),
                nn.AdaptiveAvgPool2d(1),
                zero_module(conv_nd(self.dims, width, out_channels, 1)),
                nn.Flatten(),
            )
        elif self.pool == "attention":
            side = self.image_size // 2 ** (len(self.channel_mult) - 1)
            self.out = nn.Sequential(
                normalization(width),
                SiLU(),
                AttentionPool2d(side, width, self.num_head_channels, output_dim=out_channels),
            )
        elif self.pool == "spatial":
            self.out = nn.Sequential(linear(features, 2048), nn.ReLU(), linear(2048, out_channels))
        elif self.pool == "spatial_v2":
            self.out = nn.Sequential(linear(features, 2048), normalization(2048), SiLU(), linear(2048, out_channels))
        else:
            raise UserError(f"--classifier_pool {self.pool}: expected adaptive, attention, spatial or spatial_v2")

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Logits (B, out_channels), in the dtype of `x` (B, in_channels, image_size, image_size), at timesteps (B,)."""
        precision, h = self._precision(x)
        means = []
        with precision:
            emb = self._embed_timesteps(timesteps, len(x))  # (B, 4 * model_channels)
            for block in [*self.input_blocks, self.middle_block]:
                h = block(h, emb)  # (B, C, H / 2**level, W / 2**level)
                if self.pool.startswith("spatial"):
                    means.append(h.flatten(2).mean(dim=2, dtype=torch.float32))  # (B, C)
        features = torch.cat(means, dim=1) if means else h.float()
        with torch.autocast(x.device.type, enabled=False):
            return self.out(features).to(x.dtype)  # (B, out_channels)
