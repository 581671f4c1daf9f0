"""The U-Net of guided-diffusion (Dhariwal and Nichol 2021, arXiv:2105.05233), its upsampler and its classifier.

In comments on shapes, B is the batch, C a number of channels, T = H * W the pixels of a feature map. All feature maps
may be contiguous or channels-last.
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
    PointwiseConv1d,
    SiLU,
    add_skip,
    avg_pool_nd,
    checkpoint,
    conv_nd,
    linear,
    normalization,
    normalize_and_activate,
    timestep_embedding,
    zero_module,
)


class TimestepBlock(nn.Module):
    """A module whose forward also takes the embedding of time and label."""

    @abstractmethod
    def forward(self, x: Tensor, emb: Tensor) -> Tensor: ...


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """A sequence of modules that hands the embedding to those that take it."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, TimestepBlock) else layer(x)
        return x


class Upsample(nn.Module):
    """Double the height and the width by repeating pixels; a 3x3 convolution follows where `use_conv` is set.

    Of three dimensions, the first stays as it is.
    """

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None):
        super().__init__()
        self.scale_factor = _scale(dims)
        self.conv = conv_nd(dims, channels, out_channels or channels, 3, padding=1) if use_conv else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=self.scale_factor, mode="nearest")  # (B, C, 2H, 2W)
        return x if self.conv is None else self.conv(x)


class Downsample(nn.Module):
    """Halve the height and the width: by a strided 3x3 convolution where `use_conv` is set, else by the mean of 2x2.

    Of three dimensions, the first stays as it is.
    """

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None):
        super().__init__()
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
    """A residual block that is told the time, and may double or halve the resolution.

    Args:
        channels: channels of the input.
        emb_channels: channels of the embedding of time.
        dropout: probability of dropout.
        out_channels: channels of the output; None: as the input.
        use_conv: where the channels change, the skip connection is a 3x3 convolution instead of 1x1.
        use_scale_shift_norm: the embedding scales and shifts the normalised activations; else it is added to them.
        dims: spatial dimensions.
        use_checkpoint: compute activations again in the backward pass.
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
        out_channels = out_channels or channels
        self.use_checkpoint = use_checkpoint
        self.use_scale_shift_norm = use_scale_shift_norm
        self.in_layers = nn.Sequential(
            normalization(channels), SiLU(inplace=True), conv_nd(dims, channels, out_channels, 3, padding=1)
        )
        self.resample = Upsample(channels, False, dims) if up else Downsample(channels, False, dims) if down else None
        self.emb_layers = nn.Sequential(SiLU(), linear(emb_channels, out_channels * (1 + use_scale_shift_norm)))
        self.out_layers = nn.Sequential(
            normalization(out_channels),
            SiLU(inplace=True),
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
        norm, activation, conv = self.in_layers
        h = normalize_and_activate(norm, activation, x)  # (B, channels, H, W)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)  # (B, channels, H', W')
        h = conv(h)  # (B, out_channels, H', W')

        emb = self.emb_layers(emb).to(h.dtype)  # (B, out_channels or twice as many)
        emb = emb.reshape(*emb.shape, *[1] * (h.ndim - 2))  # (B, ..., 1, 1)
        norm, activation, dropout, conv = self.out_layers
        if self.use_scale_shift_norm:
            h = normalize_and_activate(norm, activation, h, *emb.chunk(2, dim=1))
        else:
            h = normalize_and_activate(norm, activation, h + emb)
        h = conv(dropout(h))  # (B, out_channels, H', W')
        return add_skip(conv, h, self.skip_connection(x))


def count_flops_attn(model: nn.Module, _x: Any, y: Tensor | tuple[Tensor, ...]) -> None:
    """Add the operations of attention's two matrix products to `model.total_ops`, for the package thop.

    Args:
        model: the attention.
        _x: its inputs, not used.
        y: its output, (B, C, T).
    """
    batch, channels, *pixels = (y[0] if isinstance(y, tuple) else y).shape
    model.total_ops += torch.tensor([2.0 * batch * channels * math.prod(pixels) ** 2], dtype=torch.float64)


class QKVAttention(nn.Module):
    """Multi-head attention; the channels of its input are q, k, v first, and heads within each of them."""

    heads_first = False

    def __init__(self, n_heads: int):
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: Tensor) -> Tensor:
        """(B, 3 * n_heads * C, T) -> (B, n_heads * C, T)."""
        qkv = qkv.mT.contiguous()  # (B, T, 3 * n_heads * C): the fast kernels want channels last
        if self.heads_first:
            q, k, v = qkv.unflatten(2, (self.n_heads, 3, -1)).unbind(3)  # each (B, T, n_heads, C)
        else:
            q, k, v = qkv.unflatten(2, (3, self.n_heads, -1)).unbind(2)
        a = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return a.transpose(1, 2).flatten(2).mT  # (B, n_heads, T, C) -> (B, n_heads * C, T)

    count_flops = staticmethod(count_flops_attn)


class QKVAttentionLegacy(QKVAttention):
    """Multi-head attention; the channels of its input are heads first, and q, k, v within each of them."""

    heads_first = True


class AttentionBlock(nn.Module):
    """Attention between all pixels of a feature map, added to it.

    Args:
        channels: channels of the input and the output.
        num_heads: attention heads, where `num_head_channels` is -1.
        num_head_channels: channels per head; -1: `num_heads` decides.
        use_checkpoint: compute activations again in the backward pass.
        use_new_attention_order: order of the channels of q, k, v; see `QKVAttention`.

    Raises UserError where the heads do not divide the channels.
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
    """Pool a feature map by the attention of its mean to its pixels (CLIP, Radford et al. 2021, arXiv:2103.00020).

    Args:
        spacial_dim: height and width of the feature map.
        embed_dim: channels of the feature map.
        num_heads_channels: channels per attention head.
        output_dim: channels of the output; None: as the input.
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
    """What the U-Net and the classifier have in common: the embedding, the input blocks, and the middle block.

    A subclass adds its output by `_build_output`, which is given the channels of every input block.
    """

    _convert_when_moved = False  # whether `convert_to_fp16` waits for the weights to be moved to an accelerator

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

        channels = [self._width(0)]  # of every input block's output
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
            4 * self.model_channels,
            self.dropout,
            out_channels,
            use_scale_shift_norm=self.use_scale_shift_norm,
            dims=self.dims,
            use_checkpoint=self.use_checkpoint,
            up=up,
            down=down,
        )

    def _attention_block(self, channels: int, num_heads: int) -> AttentionBlock:
        return AttentionBlock(
            channels, num_heads, self.num_head_channels, self.use_checkpoint, self.use_new_attention_order
        )

    def _attention(self, level: int, num_heads: int) -> list[AttentionBlock]:
        """The attention that follows a residual block: one, or none where the level's resolution has none."""
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

    def embed(self, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """Embed times (B,) and labels (B,): (B, 4 * model_channels). Raises UserError unless labels fit the model."""
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels))
        if self.num_classes is None:
            if y is not None:
                raise UserError("labels were given to a model that is not conditioned on them (--class_cond False)")
            return emb
        if y is None or y.shape != timesteps.shape:
            found = "none" if y is None else f"a tensor of shape {tuple(y.shape)}"
            raise UserError(
                f"the model is conditioned on labels (--class_cond True): expected one for each of {len(timesteps)} "
                f"images, found {found}"
            )
        return emb + self.label_emb(y)

    def convert_to_fp16(self, dtype: torch.dtype | None = None) -> None:
        """Convert the torso, all blocks but not the output, to half precision, in place.

        `dtype` None: float16 on an accelerator. On a CPU the weights stay in float32 until they are moved to one, and
        the forward pass computes as `use_mixed_precision` says.
        """
        if dtype is None and self.time_embed[0].weight.device.type == "cpu":
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
        """Keep the weights in float32 and compute in the `half_precision_dtype` of the input's device, by autocast."""
        self.convert_to_fp32()
        self.dtype = torch.float16

    def _apply(self, *args: Any, **kwargs: Any) -> _Encoder:  # what moves a module, alone or as a part of another
        super()._apply(*args, **kwargs)
        if self._convert_when_moved and self.time_embed[0].weight.device.type != "cpu":
            self.convert_to_fp16()
        return self

    def _precision(self, x: Tensor) -> tuple[AbstractContextManager, Tensor]:
        """The context to compute in, and the input as the torso takes it.

        That is autocast if the network is to compute in half precision, its weights are in float32, and the caller has
        not called it in one.
        """
        weights = self.input_blocks[0][0].weight.dtype  # parameters() would be empty in replicas of DataParallel
        if self.dtype == weights or weights != torch.float32 or torch.is_autocast_enabled(x.device.type):
            return nullcontext(), x.to(self.dtype)
        dtype = half_precision_dtype(x.device)
        return torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32), x.float()

    def _apply_to_torso(self, function: Callable[[nn.Module], None]) -> None:
        for name, child in self.named_children():
            if name != "out":
                child.apply(function)


class _Output(nn.Sequential):
    """Normalisation, activation and convolution, in float32 whatever the precision of the input."""

    def forward(self, h: Tensor) -> Tensor:
        norm, activation, conv = self
        return conv(normalize_and_activate(norm, activation, h, dtype=torch.float32))


class UNetModel(_Encoder):
    """The U-Net of a diffusion model.

    Args:
        image_size: height and width of the images, in pixels; noted only.
        in_channels: channels of the input.
        model_channels: channels at the first level, before its multiplier.
        out_channels: channels of the output.
        num_res_blocks: residual blocks per level, and one more in the decoder.
        attention_resolutions: factors of downsampling at which attention follows every residual block.
        dropout: probability of dropout in the residual blocks.
        channel_mult: multiplier of the channels of every level, first to last.
        conv_resample: plain resampling uses convolutions.
        dims: spatial dimensions.
        num_classes: number of classes of a model that is conditioned on them, else None.
        use_checkpoint: compute activations again in the backward pass, to save memory.
        use_fp16: compute in half precision: by autocast until `convert_to_fp16` converts the torso's weights.
        num_heads: attention heads, where `num_head_channels` is -1.
        num_head_channels: channels per attention head; -1: the number of heads decides.
        num_heads_upsample: attention heads in the decoder; -1: as `num_heads`.
        use_scale_shift_norm: the embedding scales and shifts activations (FiLM), else it is added to them.
        resblock_updown: residual blocks change the resolution, instead of plain resampling.
        use_new_attention_order: order of the channels of q, k, v; see `QKVAttention`.

    Raises UserError where attention heads do not divide the channels.
    """

    def _build_output(self, channels: list[int]) -> None:
        skips = list(channels)
        width = skips[-1]
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(self.channel_mult))):
            for i in range(self.num_res_blocks + 1):
                residual = self._residual(width + skips.pop(), self._width(level))
                width = self._width(level)
                block = [residual, *self._attention(level, self.num_heads_upsample)]
                if level > 0 and i == self.num_res_blocks:
                    block.append(self._upsample(width))
                self.output_blocks.append(TimestepEmbedSequential(*block))
        self.out = _Output(
            normalization(width),
            SiLU(inplace=True),
            zero_module(conv_nd(self.dims, width, self.out_channels, 3, padding=1)),
        )

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """Apply the network.

        Args:
            x: noised images, (B, in_channels, H, W); each level but the last halves H and W.
            timesteps: times, (B,).
            y: labels, (B,), of a model that is conditioned on them.

        Returns:
            (B, out_channels, H, W), in the dtype of `x`.

        Raises UserError where `y` is missing, superfluous or of another length.
        """
        precision, h = self._precision(x)
        with precision:
            emb = self.embed(timesteps, y)  # (B, 4 * model_channels)
            skips = []
            for block in self.input_blocks:
                h = block(h, emb)  # (B, C, H / 2**level, W / 2**level)
                skips.append(h)
            h = self.middle_block(h, emb)
            for block in self.output_blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), emb)
        with torch.autocast(x.device.type, enabled=False):  # the output is in float32 in training too
            return self.out(h).to(x.dtype)  # (B, out_channels, H, W)


class SuperResModel(UNetModel):
    """A U-Net that is shown a smaller image too: its arguments are those of `UNetModel`."""

    def __init__(self, image_size: int, in_channels: int, *args: Any, **kwargs: Any):
        super().__init__(image_size, 2 * in_channels, *args, **kwargs)

    def forward(self, x: Tensor, timesteps: Tensor, low_res: Tensor | None = None, **kwargs: Any) -> Tensor:
        """As `UNetModel.forward`, given besides `low_res`, (B, in_channels, h, w) of any h and w.

        Raises UserError where `low_res` is missing.
        """
        if low_res is None:
            raise UserError("the upsampler needs the small images: low_res is missing")
        low_res = F.interpolate(low_res.to(x.dtype), x.shape[2:], mode="bilinear")  # (B, in_channels, H, W)
        return super().forward(torch.cat([x, low_res], dim=1), timesteps, **kwargs)


class EncoderUNetModel(_Encoder):
    """The encoder half of the U-Net, pooled: a classifier of noised images.

    Args are those of `UNetModel`, but for the classes that it is conditioned on, and `pool`:
        "adaptive": the mean over all pixels, then a linear map;
        "attention": `AttentionPool2d`;
        "spatial": the means over all pixels after every block, then two layers with ReLU;
        "spatial_v2": likewise, with group normalisation and SiLU.

    Raises UserError for another pool, or where attention heads do not divide the channels.
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
            image_size,
            in_channels,
            model_channels,
            out_channels,
            num_res_blocks,
            attention_resolutions,
            dropout,
            channel_mult,
            conv_resample,
            dims,
            None,
            use_checkpoint,
            use_fp16,
            num_heads,
            num_head_channels,
            num_heads_upsample,
            use_scale_shift_norm,
            resblock_updown,
            use_new_attention_order,
        )

    def _build_output(self, channels: list[int]) -> None:
        width, out_channels = channels[-1], self.out_channels
        features = sum(channels) + width  # of all input blocks and the middle block
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
                normalization(width), SiLU(), AttentionPool2d(side, width, self.num_head_channels, out_channels)
            )
        elif self.pool == "spatial":
            self.out = nn.Sequential(linear(features, 2048), nn.ReLU(), linear(2048, out_channels))
        elif self.pool == "spatial_v2":
            self.out = nn.Sequential(linear(features, 2048), normalization(2048), SiLU(), linear(2048, out_channels))
        else:
            raise UserError(f"--classifier_pool {self.pool}: expected adaptive, attention, spatial or spatial_v2")

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """(B, in_channels, image_size, image_size) at times (B,) -> logits (B, out_channels), in the dtype of `x`."""
        precision, h = self._precision(x)
        means = []
        with precision:
            emb = self.embed(timesteps)  # (B, 4 * model_channels)
            for block in [*self.input_blocks, self.middle_block]:
                h = block(h, emb)  # (B, C, H / 2**level, W / 2**level)
                if self.pool.startswith("spatial"):
                    means.append(h.flatten(2).mean(dim=2, dtype=torch.float32))  # (B, C)
        features = torch.cat(means, dim=1) if means else h.float()
        with torch.autocast(x.device.type, enabled=False):
            return self.out(features).to(x.dtype)  # (B, out_channels)
