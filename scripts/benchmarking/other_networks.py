"""Other ways to compute the U-Net, for comparison: operation by operation, in float64, with diffusers."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable

from guided_diffusion.errors import UserError
from guided_diffusion.nn import GroupNorm32, PointwiseConv1d
from guided_diffusion.unet import AttentionBlock, QKVAttention, ResBlock, UNetModel

import torch
from torch import Tensor, nn


def plain(model: UNetModel) -> UNetModel:
    """The same network with shared weights, computed operation by operation.

    Every operation makes a new tensor, normalisation and softmax cast to float32 and back, and attention is not fused.
    """
    classes: dict[type, type] = {
        GroupNorm32: PlainNorm,
        ResBlock: PlainBlock,
        nn.Conv2d: PlainConv2d,
        PointwiseConv1d: PlainConv1d,
    }
    model = copy.deepcopy(model, {id(w): w for w in model.parameters()})
    for module in model.modules():
        if isinstance(module, QKVAttention):
            module.heads_first = module.heads_first  # from its class, which changes
            module.__class__ = PlainAttention
        elif type(module) in classes:
            module.__class__ = classes[type(module)]
    return model


def float64_network(model: UNetModel) -> Callable[..., Tensor]:
    """The network in float64, except for the timestep embedding; its input and output are float32."""
    network = plain(copy.deepcopy(model).double())
    network.dtype = torch.float64
    network.time_embed.register_forward_pre_hook(lambda _module, embedding: (embedding[0].double(),))
    return lambda x, timesteps, **conditions: network(x.double(), timesteps, **conditions).float()


def diffusers_unet(model: UNetModel) -> nn.Module:
    """`diffusers.UNet2DModel` of the same architecture, with random float32 weights and the same call signature.

    Raises UserError if diffusers is not installed or lacks the architecture.
    """
    if importlib.util.find_spec("diffusers") is None:
        raise UserError("diffusers is not installed (pip install -e .[bench])")
    blocks = [module for module in model.modules() if isinstance(module, AttentionBlock)]
    heads = {block.norm.num_channels // block.num_heads for block in blocks}  # channels per head
    if not (model.resblock_updown and model.use_scale_shift_norm and len(heads) == 1):
        raise UserError("diffusers needs --resblock_updown, --use_scale_shift_norm and --num_head_channels")
    from diffusers import UNet2DModel  # optional, and slow to import

    attends = [2**level in model.attention_resolutions for level in range(len(model.channel_mult))]
    theirs = UNet2DModel(
        sample_size=model.image_size,
        in_channels=model.in_channels,
        out_channels=model.out_channels,
        layers_per_block=model.num_res_blocks,
        block_out_channels=[int(m * model.model_channels) for m in model.channel_mult],
        down_block_types=["AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attends],
        up_block_types=["AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attends)],
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=heads.pop(),
    )
    return theirs.eval().requires_grad_(False)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class PlainNorm(GroupNorm32):
    """`GroupNorm32` in four operations."""

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        h = nn.GroupNorm.forward(self, _at_least_float32(x))
        h = h if h.dtype == torch.float64 else h.to(dtype or x.dtype)
        return h if scale is None else h * (1 + scale) + shift


class PlainBlock(ResBlock):
    """`ResBlock` without in-place operations."""

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, activation, conv = self.in_layers
        h = activation(norm(x))
        h, x = self.h_upd(h), self.x_upd(x)
        h = conv(h)
        emb = self.emb_layers(emb).to(h.dtype)[..., None, None]
        norm, activation, dropout, conv = self.out_layers
        h = norm(h, *emb.chunk(2, dim=1)) if self.use_scale_shift_norm else norm(h + emb)
        return self.skip_connection(x) + conv(dropout(activation(h)))


class PlainAttention(QKVAttention):
    """`QKVAttention` that is not fused: all weights (B, heads, T, T) are in memory."""

    def forward(self, qkv: Tensor) -> Tensor:
        order = (self.n_heads, 3, -1) if self.heads_first else (3, self.n_heads, -1)
        q, k, v = qkv.unflatten(1, order).unbind(2 if self.heads_first else 1)  # each (B, heads, C, T)
        scale = q.shape[2] ** -0.25  # applied to both to avoid float16 overflow
        weights = torch.einsum("bhct,bhcs->bhts", q * scale, k * scale)
        weights = _at_least_float32(weights).softmax(-1).to(q.dtype)
        return torch.einsum("bhts,bhcs->bhct", weights, v).flatten(1, 2)


def _convolve(self: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """The convolution of torch. CPUs have no float16 kernel, so float16 is summed in float32, as on a GPU."""
    if x.device.type == "cpu" and x.dtype == torch.float16:
        return self._conv_forward(x.float(), self.weight.float(), self.bias.float()).half()
    return self._conv_forward(x, self.weight, self.bias)


class PlainConv2d(nn.Conv2d):
    """`nn.Conv2d` with float16 on CPUs."""

    forward = _convolve


class PlainConv1d(PointwiseConv1d):
    """`nn.Conv1d` with float16 on CPUs."""

    forward = _convolve
