"""What clients of guided-diffusion do to its networks: hooks, replaced layers, subclasses, frozen parts."""

from __future__ import annotations

from functools import partial

from guided_diffusion import nn as gdnn
from guided_diffusion.fp16_util import convert_module_to_f16
from guided_diffusion.unet import (
    AttentionBlock,
    Downsample,
    EncoderUNetModel,
    ResBlock,
    TimestepEmbedSequential,
    UNetModel,
    Upsample,
)

import pytest
import torch as th
from reference import fill_weights, relative_error, seeded
from test_unet import ARCHITECTURE
from torch import nn

X, T = seeded((2, 3, 16, 16), 0), th.tensor([3, 70])


def unet(kind=UNetModel, **options):
    return fill_weights(kind(**{**ARCHITECTURE, **options})).eval()


def resblock(**options):
    return fill_weights(ResBlock(32, 16, 0.0, **options)).eval()


def reference_block(block, x, emb):
    """The residual block, layer by layer."""
    norm, activation, conv = block.in_layers
    h = conv(block.h_upd(activation(norm(x))))
    emb = block.emb_layers(emb)[:, :, None, None]
    norm, activation, dropout, conv = block.out_layers
    if block.use_scale_shift_norm:
        scale, shift = emb.chunk(2, dim=1)
        h = norm(h) * (1 + scale) + shift
    else:
        h = norm(h + emb)
    return block.skip_connection(block.x_upd(x)) + conv(dropout(activation(h)))


# Frozen parts


@pytest.mark.parametrize("part", ["label_emb", "time_embed", "input_blocks.1.0.emb_layers"])
def test_a_part_is_trained_in_a_frozen_network(part):
    model = unet(num_classes=4, use_scale_shift_norm=True)
    trained = model.get_submodule(part)
    whole = {name: w.clone() for name, w in trained.named_parameters()}
    y = th.tensor([0, 3])
    model(X, T, y).square().mean().backward()
    expected = {name: w.grad.clone() for name, w in trained.named_parameters()}
    model.zero_grad()
    model.requires_grad_(False)
    trained.requires_grad_(True)
    model(X, T, y).square().mean().backward()
    for name, w in trained.named_parameters():
        assert relative_error(w.grad, expected[name]) < 1e-5 and th.equal(w, whole[name])


# Hooks


@pytest.mark.parametrize(
    "name", ["in_layers.0", "in_layers.1", "in_layers.2", "in_layers", "out_layers", "out_layers.1"]
)
def test_backward_hooks_of_every_layer(name):
    block, seen = resblock(), []
    block.get_submodule(name).register_full_backward_hook(lambda module, grads, outs: seen.append(outs[0].shape))
    x, emb = seeded((2, 32, 8, 8), 0).requires_grad_(), seeded((2, 16), 1)
    block(x, emb).sum().backward()
    grad, x.grad = x.grad, None
    reference_block(block, x, emb).sum().backward()
    assert len(seen) >= 1 and relative_error(grad, x.grad) < 1e-6


@pytest.mark.parametrize("scale_shift", [False, True])
@th.no_grad()
def test_everything_that_a_global_hook_sees_is_kept(scale_shift):
    model, kept = unet(use_scale_shift_norm=scale_shift), []

    def keep(_module, args, output):
        tensors = [x for x in (*args, output) if isinstance(x, th.Tensor)]
        kept.extend((x, x.clone()) for x in tensors)

    expected = model(X, T)
    with nn.modules.module.register_module_forward_hook(keep):
        found = model(X, T)
    assert relative_error(found, expected) < 1e-6
    assert len(kept) > 100 and all(th.equal(x, copy) for x, copy in kept)


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
@th.no_grad()
def test_inputs_that_a_hook_keeps_are_not_overwritten(hook):
    block, kept = resblock(use_scale_shift_norm=True), []

    def keep(_module, args, *_output):
        kept.extend([args[0], args[0].clone()])

    for layer in (block.in_layers[1], block.out_layers[1], block.out_layers[3]):
        getattr(layer, hook)(keep)
    block(seeded((2, 32, 8, 8), 0), seeded((2, 16), 1))
    assert len(kept) == 6 and all(th.equal(*pair) for pair in zip(kept[::2], kept[1::2], strict=True))


@pytest.mark.parametrize("scale_shift", [False, True])
@th.no_grad()
def test_hooks_of_containers_are_called_as_in_the_original(scale_shift):
    """That is, unless the block itself calls the layers: to resample in between, or to scale and shift."""
    calls = []
    for name, options in (("in_layers", {}), ("out_layers", {}), ("in_layers", {"up": True})):
        block = resblock(use_scale_shift_norm=scale_shift, **options)
        block.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: calls.append((name, out.shape[2]))
        )
        x, emb = seeded((2, 32, 8, 8), 0), seeded((2, 16), 1)
        assert relative_error(block(x, emb), reference_block(block, x, emb)) < 1e-6
    assert calls == [("in_layers", 8)] + ([] if scale_shift else [("out_layers", 8)])


@th.no_grad()
def test_a_patched_forward_may_keep_what_it_returns():
    block, kept = resblock(use_scale_shift_norm=True), []
    for layer in (block.in_layers[0], block.out_layers[0], block.out_layers[3]):

        def forward(x, original=layer.forward):
            out = original(x)
            kept.extend([out, out.clone()])
            return out

        layer.forward = forward
    x, emb = seeded((2, 32, 8, 8), 0), seeded((2, 16), 1)
    found, pairs = block(x, emb), list(zip(kept[::2], kept[1::2], strict=True))
    assert len(pairs) == 3 and all(th.equal(*pair) for pair in pairs)
    assert relative_error(found, reference_block(block, x, emb)) < 1e-6


# Replaced layers


class Cached(nn.Module):
    """Keeps its last output, as methods that reuse features do."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        self.last = self.layer(x)
        self.copy = self.last.clone()
        return self.last


REPLACEMENTS = {
    "norm": lambda block: block.in_layers.__setitem__(0, nn.GroupNorm(8, 32)),
    "second norm": lambda block: block.out_layers.__setitem__(0, nn.BatchNorm2d(32)),
    "activation": lambda block: block.in_layers.__setitem__(1, nn.ReLU(inplace=True)),
    "wrapped convolution": lambda block: block.out_layers.__setitem__(3, Cached(block.out_layers[3])),
    "wrapped norm": lambda block: block.out_layers.__setitem__(0, Cached(block.out_layers[0])),
    "layers": lambda block: setattr(block, "in_layers", nn.Sequential(*block.in_layers)),
    "more layers": lambda block: block.in_layers.insert(2, nn.Tanh()),
}


@pytest.mark.parametrize("name", REPLACEMENTS)
@pytest.mark.parametrize("options", [{}, {"down": True}, {"use_scale_shift_norm": True}], ids=str)
@th.no_grad()
def test_layers_may_be_replaced(name, options):
    block = resblock(**options)
    REPLACEMENTS[name](block)
    x, emb = seeded((2, 32, 8, 8), 0), seeded((2, 16), 1)
    found = block(x, emb)
    for layer in block.modules():
        assert not isinstance(layer, Cached) or th.equal(layer.last, layer.copy)
    *first, conv = block.in_layers
    norm, *rest = block.out_layers
    h = conv(block.h_upd(nn.Sequential(*first)(x)))
    emb = block.emb_layers(emb)[:, :, None, None]
    if block.use_scale_shift_norm:
        scale, shift = emb.chunk(2, dim=1)
        h = norm(h) * (1 + scale) + shift
    else:
        h = norm(h + emb)
    expected = block.skip_connection(block.x_upd(x)) + nn.Sequential(*rest)(h)
    assert relative_error(found, expected) < 1e-6


def test_another_normalisation_of_the_output_and_of_all_blocks(monkeypatch):
    model = unet()
    model.out[0] = nn.GroupNorm(8, 32)
    assert model(X, T).shape == X.shape
    monkeypatch.setattr("guided_diffusion.unet.normalization", partial(nn.GroupNorm, 8))  # for other widths than 32
    model = UNetModel(**{**ARCHITECTURE, "model_channels": 24}, use_scale_shift_norm=True)
    model(X, T).sum().backward()
    monkeypatch.setattr(
        gdnn.GroupNorm32, "forward", lambda self, x: nn.GroupNorm.forward(self, x.float()).type(x.dtype)
    )
    assert unet(use_scale_shift_norm=True)(X, T).isfinite().all()


@pytest.mark.parametrize("wrap", [nn.Sequential, Cached])
def test_the_first_convolution_may_be_wrapped(wrap):
    model, plain = unet(), unet()
    model.input_blocks[0][0] = wrap(model.input_blocks[0][0])
    assert th.equal(model(X, T), plain(X, T))
    model.convert_to_fp16()
    model.convert_to_fp32()


# Subclasses


def test_a_block_with_the_published_forward():
    """A subclass that implements the block from its parts."""

    class Block(ResBlock):
        def _forward(self, x, emb):
            if self.updown:
                h = self.in_layers[:-1](x)
                h, x = self.h_upd(h), self.x_upd(x)
                h = self.in_layers[-1](h)
            else:
                h = self.in_layers(x)
            emb_out = self.emb_layers(emb).type(h.dtype)
            while emb_out.ndim < h.ndim:
                emb_out = emb_out[..., None]
            if self.use_scale_shift_norm:
                scale, shift = th.chunk(emb_out, 2, dim=1)
                h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
            else:
                h = self.out_layers(h + emb_out)
            return self.skip_connection(x) + h

    x, emb = seeded((2, 32, 8, 8), 0), seeded((2, 16), 1)
    for options in ({}, {"up": True}, {"down": True, "use_scale_shift_norm": True}):
        block = fill_weights(Block(32, 16, 0.0, **options)).eval()
        ours = resblock(**options)
        ours.load_state_dict(block.state_dict())
        with th.no_grad():
            assert relative_error(ours(x, emb), block(x, emb)) < 1e-6


def test_attributes_of_blocks():
    block = ResBlock(32, 16, 0.1, 64, use_conv=True, up=True)
    assert (block.channels, block.emb_channels, block.dropout, block.out_channels) == (32, 16, 0.1, 64)
    assert block.use_conv and block.updown and not ResBlock(32, 16, 0.1).updown
    for kind in (Upsample, Downsample):
        layer = kind(32, True, 2, 64)
        assert (layer.channels, layer.out_channels, layer.use_conv, layer.dims) == (32, 64, True, 2)
        assert kind(32, False).out_channels == 32
    assert AttentionBlock(32).channels == 32
    assert unet()._feature_size == 32 * 3 + 64 + 64 + 64 * 2 + 32 * 2
    assert unet(EncoderUNetModel, pool="spatial")._feature_size == 32 * 3 + 64 + 64


def test_a_subclass_with_modules_of_its_own():
    """Their names are not ours, and they keep their precision."""

    class Hinted(UNetModel):
        def __init__(self, **options):
            super().__init__(**options)
            self.embed = nn.Linear(7, 128)
            self.hint = TimestepEmbedSequential(nn.Conv2d(3, 32, 3, padding=1))

        def forward(self, x, timesteps, c):
            emb = self.time_embed(gdnn.timestep_embedding(timesteps, self.model_channels)) + self.embed(c)
            return self.hint(x, emb) + emb[:, :32, None, None] + super().forward(x, timesteps).mean()

    model = unet(Hinted)
    assert model(X, T, seeded((2, 7), 2)).shape == (2, 32, 16, 16)
    model.convert_to_fp16(th.float16)
    assert model.hint[0].weight.dtype == th.float32 and model.input_blocks[0][0].weight.dtype == th.float16


def test_one_timestep_for_all_images():
    model, y = unet(num_classes=4), th.tensor([0, 3])
    assert relative_error(model(X, T[:1], y), model(X, T[[0, 0]], y)) < 1e-6


# Building blocks


def test_averages_in_another_precision():
    average, source = th.zeros(3), th.ones(3, dtype=th.float16)
    gdnn.update_ema([average], [source], rate=0.75)
    assert average.tolist() == [0.25] * 3
    gdnn.update_ema([], [])


def test_noise_like_a_tensor_in_another_memory_format():
    x = seeded((2, 8, 8, 3), 0).permute(0, 3, 1, 2)
    th.manual_seed(0)
    expected = th.randn_like(x)
    th.manual_seed(0)
    assert th.equal(gdnn.randn_like(x), expected)


@pytest.mark.parametrize("dtype", [th.float32, th.bfloat16])
def test_a_replaced_norm_in_half_precision(dtype):
    block = resblock(use_scale_shift_norm=True)
    block.in_layers[0] = gdnn.GroupNorm32(8, 32)
    block.apply(partial(convert_module_to_f16, dtype=dtype))
    with th.no_grad():
        assert block(seeded((2, 32, 8, 8), 0).to(dtype), seeded((2, 16), 1)).dtype == dtype
