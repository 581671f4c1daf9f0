"""The networks agree with the reference numbers, the published weights, and each other in all variants."""

import argparse
import math
import platform
from copy import deepcopy
from functools import cache, partial
from pathlib import Path

from guided_diffusion import script_util
from guided_diffusion import unet as unet_module
from guided_diffusion.compute.inference import compute_exactly
from guided_diffusion.errors import UserError
from guided_diffusion.fp16_util import convert_module_to_f16, half_precision_dtype
from guided_diffusion.nn import (
    GroupNorm32,
    avg_pool_nd,
    checkpoint,
    conv3x3_split_float16,
    conv_nd,
    mean_flat,
    normalization,
    randn,
    randn_like,
    scale_module,
    timestep_embedding,
    update_ema,
    zero_module,
)
from guided_diffusion.unet import (
    AttentionBlock,
    AttentionPool2d,
    Downsample,
    EncoderUNetModel,
    QKVAttention,
    QKVAttentionLegacy,
    ResBlock,
    SuperResModel,
    UNetModel,
    Upsample,
)

import pytest
import torch
from reference import (
    fill_weights,
    golden,
    published_checkpoints,
    reference_inputs,
    reference_model,
    relative_error,
    seeded,
)
from torch import nn

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NETWORKS = [
    "unet_readme_like",
    "unet_conv_resample_heads",
    "unet_new_attention_order",
    "superres_16_to_64",
    "classifier_attention_pool",
    "classifier_spatial_pool",
]
PUBLISHED = published_checkpoints()


@cache
def reference_run(name):
    """The network of a golden file, its inputs and its output. Do not modify them."""
    model, (x, rest) = reference_model(name), reference_inputs(name)
    with torch.no_grad():
        return model, x, rest, model(x, **rest)


ARCHITECTURE = {
    "image_size": 16,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 3,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 2),
}


def tiny_unet(**changes):
    """A small U-Net with every kind of block and the reference weights."""
    options = {**ARCHITECTURE, "num_heads": 2, "use_scale_shift_norm": True, "resblock_updown": True}
    return fill_weights(UNetModel(**options | changes))


# Same numbers, same names


@pytest.mark.parametrize("name", NETWORKS)
def test_agrees_with_reference(name):
    g = golden(name)
    *_, out = reference_run(name)
    stride = getattr(g.meta, "stride", None)
    if stride:
        out = out[..., ::stride, ::stride]
    assert out.shape == g.out.shape
    assert relative_error(out, g.out) < 1e-4


def published_model(kind, flags):
    """The network described by the published flags, parsed like a command line."""
    defaults, factory = {
        "diffusion": (script_util.model_and_diffusion_defaults, script_util.create_model),
        "super_resolution": (script_util.sr_model_and_diffusion_defaults, script_util.sr_create_model),
        "classifier": (script_util.classifier_and_diffusion_defaults, script_util.create_classifier),
    }[kind]
    parser = argparse.ArgumentParser()
    script_util.add_dict_to_argparser(parser, defaults())
    args = parser.parse_args(flags.split())
    of_diffusion = script_util.diffusion_defaults().keys() - {"learn_sigma"}
    if kind == "classifier":
        of_diffusion |= {"learn_sigma"}
    return factory(**script_util.args_to_dict(args, defaults().keys() - of_diffusion))


@pytest.mark.parametrize("name", PUBLISHED)
def test_has_the_names_and_shapes_of_the_published_weights(name):
    published = PUBLISHED[name]
    with torch.device("meta"):
        model = published_model(published["kind"], published["flags"])
    assert {key: list(w.shape) for key, w in model.state_dict().items()} == published["shapes"]
    assert sum(p.numel() for p in model.parameters()) == published["n_params"]


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_built_without_weights_and_filled_later(name):
    filled, x, rest, expected = reference_run(name)
    meta = golden(name).meta
    with torch.device("meta"):
        model = getattr(script_util, meta.factory)(**meta.kwargs).eval()
    model.load_state_dict(filled.state_dict(), assign=True)
    assert not list(model.buffers())
    assert torch.equal(model(x, **rest), expected)


@torch.no_grad()
def test_a_fresh_network_starts_from_zero():
    model = UNetModel(16, 3, 32, 3, 1, (2,), channel_mult=(1, 2))
    blocks = [m for m in model.modules() if isinstance(m, ResBlock | AttentionBlock)]
    assert {type(block) for block in blocks} == {ResBlock, AttentionBlock}
    for block in blocks:
        last = block.out_layers[-1] if isinstance(block, ResBlock) else block.proj_out
        assert not last.weight.any() and not last.bias.any()
    assert not model(seeded((1, 3, 16, 16), 0), torch.tensor([5])).any()


# Variants that must not change the numbers


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_channels_last_changes_nothing(name):
    model, x, rest, expected = reference_run(name)
    model = deepcopy(model).to(memory_format=torch.channels_last)
    out = model(x.to(memory_format=torch.channels_last), **rest)
    assert relative_error(out, expected) < 1e-5
    if out.ndim == 4:
        assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("resblock_updown", [True, False])
def test_checkpointing_recomputes_and_changes_nothing(resblock_updown):
    results, norms_computed = [], []
    for use_checkpoint in (False, True):
        model = tiny_unet(resblock_updown=resblock_updown, num_classes=10, use_checkpoint=use_checkpoint)
        calls = []
        for module in model.modules():
            if isinstance(module, GroupNorm32):
                module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        x = seeded((2, 3, 16, 16), 0).requires_grad_()
        out = model(x, torch.tensor([3, 700]), torch.tensor([1, 9]))
        (out * seeded(out.shape, 1)).sum().backward()
        results.append([out.detach(), x.grad, *(p.grad for p in model.parameters())])
        norms_computed.append(len(calls))
    for plain, checkpointed in zip(*results, strict=True):
        assert relative_error(checkpointed, plain) < 1e-5
    assert norms_computed[1] == 2 * norms_computed[0] - 1  # all except that of the output


def test_the_flag_of_checkpointing_reaches_every_block():
    meta = golden("unet_readme_like").meta
    with torch.device("meta"):
        model = script_util.create_model(**meta.kwargs | {"use_checkpoint": True})
    blocks = [block for block in model.modules() if isinstance(block, ResBlock | AttentionBlock)]
    assert len(blocks) > 20 and all(block.use_checkpoint for block in blocks)


def test_half_precision_there_and_back():
    model = reference_model("unet_readme_like", use_fp16=True)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    assert model.dtype == torch.float16

    model.convert_to_fp16(torch.float16)
    torso = ("input_blocks", "middle_block", "output_blocks")
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            half = name.startswith(torso)
            assert module.weight.dtype == module.bias.dtype == (torch.float16 if half else torch.float32)
        elif isinstance(module, nn.Linear | nn.GroupNorm):
            assert module.weight.dtype == module.bias.dtype == torch.float32

    model.convert_to_fp32()
    assert model.dtype == torch.float32
    changed = 0
    for name, w in model.state_dict().items():
        assert w.dtype == torch.float32
        assert torch.equal(w, before[name]) or torch.equal(w, before[name].half().float())
        changed += not torch.equal(w, before[name])
    assert changed > 50


def test_half_precision_is_chosen_by_device():
    """When the network is moved or run; see also test_client_training.py."""
    model = tiny_unet(use_fp16=True)
    model.convert_to_fp16()
    assert model.dtype == torch.float16 and model.middle_block[0].out_layers[-1].weight.dtype == torch.float32
    model.to("meta")
    assert model.middle_block[0].out_layers[-1].weight.dtype == torch.float16
    model.convert_to_fp16()  # again, where it is
    assert model.middle_block[0].out_layers[-1].weight.dtype == torch.float16
    assert half_precision_dtype("cuda") == half_precision_dtype(torch.device("mps")) == torch.float16


@pytest.mark.skipif(
    not Path("/proc/cpuinfo").exists() or platform.machine() != "x86_64", reason="reads the flags of a Linux x86-64 CPU"
)
def test_half_precision_of_this_cpu():
    flags = set(Path("/proc/cpuinfo").read_text().split())
    # A virtual machine may report AMX but not allow it: then either answer is correct.
    if "avx512_bf16" in flags:
        assert half_precision_dtype("cpu") == torch.bfloat16
    elif "amx_tile" not in flags:
        assert half_precision_dtype("cpu") == torch.float32


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_bfloat16_torso_is_close_to_float32(name):
    """bfloat16 rounds to 8 bits, 0.2% rms; about 50 successive roundings add up to about 1%."""
    model, x, rest, exact = reference_run(name)
    model = deepcopy(model)
    model.convert_to_fp16(torch.bfloat16)
    rounded = model(x, **rest)
    assert rounded.dtype == torch.float32
    error = float((rounded - exact).norm() / exact.norm())
    assert 1e-5 < error < 0.03


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_output_has_the_dtype_of_the_input(dtype):
    x, t = seeded((2, 3, 16, 16), 0), torch.tensor([3, 700])
    for model in (tiny_unet(), EncoderUNetModel(16, 3, 32, 10, 1, (2,), channel_mult=(1, 2), pool="spatial")):
        expected = model(x.to(dtype).float(), t).to(dtype)
        out = model(x.to(dtype), t)
        assert out.dtype == dtype
        assert torch.equal(out, expected)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("resblock_updown", [True, False])
@torch.no_grad()
def test_any_number_of_dimensions(dims, resblock_updown):
    model = tiny_unet(dims=dims, resblock_updown=resblock_updown, use_scale_shift_norm=False)
    x = seeded((2, 3, *(4, 8, 16)[-dims:]), 0)
    out = model(x, torch.tensor([1, 2]))
    assert out.shape == x.shape
    assert out.std() > 0.1


def test_dropout_in_training_only():
    model = tiny_unet(dropout=0.5)
    x, t = seeded((1, 3, 16, 16), 0), torch.tensor([1])
    assert torch.equal(model(x, t), model(x, t))
    model.train()
    assert not torch.equal(model(x, t), model(x, t))


# Blocks against explicit formulas


@pytest.mark.parametrize("attention", [QKVAttention, QKVAttentionLegacy])
def test_attention_is_softmax_of_scaled_products(attention):
    heads, channels, length = 3, 4, 10
    qkv = seeded((2, 3 * heads * channels, length), 0)
    for h in range(heads):
        if attention is QKVAttention:
            first = [(i * heads + h) * channels for i in range(3)]
        else:
            first = [(h * 3 + i) * channels for i in range(3)]
        q, k, v = (qkv[:, f : f + channels].double() for f in first)
        weights = torch.einsum("bct,bcs->bts", q, k).div(math.sqrt(channels)).softmax(dim=-1)
        expected = torch.einsum("bts,bcs->bct", weights, v)
        out = attention(heads)(qkv)
        assert out.shape == (2, heads * channels, length)
        assert relative_error(out[:, h * channels : (h + 1) * channels], expected) < 1e-6


def test_the_two_orders_of_attention_are_permutations():
    heads, channels = 3, 4
    qkv = seeded((2, 3 * heads * channels, 10), 0)
    heads_first = qkv.unflatten(1, (3, heads, channels)).transpose(1, 2).flatten(1, 3)
    assert not torch.equal(heads_first, qkv)
    torch.testing.assert_close(QKVAttentionLegacy(heads)(heads_first), QKVAttention(heads)(qkv))


@torch.no_grad()
def test_attention_pool():
    pool = fill_weights(AttentionPool2d(4, 32, 16, 5)).double()
    x = seeded((2, 32, 4, 4), 0).double()
    tokens = torch.cat([x.mean(dim=(2, 3))[:, :, None], x.flatten(2)], dim=2) + pool.positional_embedding
    w, b = pool.qkv_proj.weight[:, :, 0], pool.qkv_proj.bias
    q, k, v = (torch.einsum("oc,bct->bot", w, tokens) + b[:, None]).chunk(3, dim=1)
    pooled = []
    for head in (slice(0, 16), slice(16, 32)):
        weights = (torch.einsum("bc,bcs->bs", q[:, head, 0], k[:, head]) / 4).softmax(dim=1)
        pooled.append(torch.einsum("bs,bcs->bc", weights, v[:, head]))
    expected = torch.cat(pooled, dim=1) @ pool.c_proj.weight[:, :, 0].T + pool.c_proj.bias
    assert expected.shape == (2, 5)
    assert relative_error(pool(x), expected) < 1e-10


def normalised(x, norm):
    """Group normalisation in float64."""
    groups = x.double().reshape(len(x), norm.num_groups, -1)
    mean, variance = groups.mean(2, keepdim=True), groups.var(2, unbiased=False, keepdim=True)
    y = ((groups - mean) / (variance + norm.eps).sqrt()).reshape(x.shape)
    per_channel = (1, -1, *[1] * (x.ndim - 2))
    return y * norm.weight.double().reshape(per_channel) + norm.bias.double().reshape(per_channel)


def silu(x):
    return x * torch.sigmoid(x)


@pytest.mark.parametrize("pool", ["adaptive", "attention", "spatial", "spatial_v2"])
@torch.no_grad()
def test_classifier_pools(pool):
    model = EncoderUNetModel(16, 3, 32, 7, 1, (2,), channel_mult=(1, 2), num_head_channels=32, pool=pool)
    fill_weights(model)
    features = []
    for block in [*model.input_blocks, model.middle_block]:
        block.register_forward_hook(lambda _, __, h: features.append(h.double()))
    logits = model(seeded((3, 3, 16, 16), 0), torch.tensor([0, 10, 900]))
    assert logits.shape == (3, 7)

    means = torch.cat([h.mean(dim=(2, 3)) for h in features], dim=1)
    last, out = features[-1], model.out.double()
    if pool == "adaptive":
        expected = silu(normalised(last, out[0])).mean(dim=(2, 3)) @ out[3].weight[:, :, 0, 0].T + out[3].bias
    elif pool == "attention":
        expected = out[2](silu(normalised(last, out[0])))  # tested above
    else:
        hidden = means @ out[0].weight.T + out[0].bias
        hidden = hidden.clamp(min=0) if pool == "spatial" else silu(normalised(hidden, out[1]))
        expected = hidden @ out[-1].weight.T + out[-1].bias
    assert relative_error(logits, expected) < 1e-5


@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize(("up", "down"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("use_conv", [True, False])
@torch.no_grad()
def test_residual_block(scale_shift, up, down, use_conv):
    block = fill_weights(ResBlock(32, 8, 0.1, 64, use_conv, use_scale_shift_norm=scale_shift, up=up, down=down))
    x, emb = seeded((2, 32, 8, 8), 0), seeded((2, 8), 1)
    out = block(x, emb)

    block, x, emb = block.double(), x.double(), emb.double()

    def resample(x):
        if up:
            return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean(dim=(3, 5)) if down else x

    h = block.in_layers[2](resample(silu(normalised(x, block.in_layers[0]))))
    told = (silu(emb) @ block.emb_layers[1].weight.T + block.emb_layers[1].bias)[:, :, None, None]
    if scale_shift:
        h = normalised(h, block.out_layers[0]) * (1 + told[:, :64]) + told[:, 64:]
    else:
        h = normalised(h + told, block.out_layers[0])
    expected = block.skip_connection(resample(x)) + block.out_layers[3](silu(h))
    assert block.skip_connection.kernel_size == ((3, 3) if use_conv else (1, 1))
    assert relative_error(out, expected) < 1e-5


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_resampling(dims):
    x = seeded((2, 3, *[4] * dims), 0)
    doubled = x.repeat_interleave(2, dim=-1)
    halved = x.unflatten(-1, (2, 2)).mean(-1)
    if dims > 1:
        doubled = doubled.repeat_interleave(2, dim=-2)
        halved = halved.unflatten(-2, (2, 2)).mean(-2)
    assert torch.equal(Upsample(3, False, dims)(x), doubled)
    torch.testing.assert_close(Downsample(3, False, dims)(x), halved)
    assert Upsample(3, True, dims, 5)(x).shape == (2, 5, *doubled.shape[2:])
    assert Downsample(3, True, dims, 5)(x).shape == (2, 5, *halved.shape[2:])


# Error messages


def test_labels_that_do_not_fit():
    x, t = seeded((2, 3, 16, 16), 0), torch.tensor([1, 2])
    with pytest.raises(UserError, match="class_cond False"):
        tiny_unet()(x, t, y=torch.tensor([0, 1]))
    conditioned = tiny_unet(num_classes=10)
    with pytest.raises(UserError, match=r"a label for each of 2 images, found none"):
        conditioned(x, t)
    with pytest.raises(UserError, match=r"found a tensor of shape \(1,\)"):
        conditioned(x, t, y=torch.tensor([0]))
    assert conditioned(x, t, y=torch.tensor([0, 1])).shape == x.shape


def test_missing_low_resolution_image():
    model = SuperResModel(16, 3, 32, 3, 1, (2,), channel_mult=(1, 2))
    with pytest.raises(UserError, match="low_res is missing"):
        model(seeded((1, 3, 16, 16), 0), torch.tensor([1]))


def test_invalid_options():
    with pytest.raises(UserError, match=r"64 channels cannot be split into 5 attention heads \(--num_heads, --num"):
        tiny_unet(num_heads=5)
    with pytest.raises(UserError, match=r"64 channels .* heads of --num_head_channels 48"):
        tiny_unet(num_head_channels=48)
    with pytest.raises(UserError, match="--classifier_pool mean: expected adaptive, attention"):
        EncoderUNetModel(16, 3, 32, 7, 1, (2,), channel_mult=(1, 2), pool="mean")


def test_public_names():
    names = """AttentionPool2d TimestepBlock TimestepEmbedSequential Upsample Downsample ResBlock AttentionBlock
        QKVAttention QKVAttentionLegacy UNetModel SuperResModel EncoderUNetModel"""
    assert all(issubclass(getattr(unet_module, name), nn.Module) for name in names.split())


# Building blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_group_norm_is_computed_in_float32(dtype, memory_format):
    norm = fill_weights(normalization(64))
    # The mean is 30 standard deviations: half-precision sums would lose the variance.
    x = (seeded((2, 64, 32, 32), 0) + 30).to(dtype).to(memory_format=memory_format)
    out = norm(x)
    assert out.dtype == dtype
    assert norm.weight.dtype == torch.float32
    # Only the result is rounded to `dtype`, by half a unit in the last place.
    assert relative_error(out, normalised(x, norm)) < 1e-5 + torch.finfo(dtype).eps / 2

    scale, shift = (seeded((2, 64, 1, 1), seed).to(dtype) for seed in (1, 2))
    modulated = norm(x, scale, shift, torch.float32)
    assert modulated.dtype == torch.float32
    assert modulated.shape == x.shape
    expected = normalised(x, norm) * (1 + scale.double()) + shift.double()
    # In half precision, 1 + scale may be rounded too.
    assert relative_error(modulated, expected) < 1e-5 + torch.finfo(dtype).eps


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compiling", [False, True], ids=["eager", "compiling"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(2, 64, 96, 128), (2, 64, 50), (1, 64, 4, 6, 10)], ids=len)
@torch.no_grad()
def test_group_norm_as_an_affine_map(shape, dtype, compiling, device, monkeypatch):
    """As on a GPU, in one step with the modulation: only the result is rounded."""
    norm = fill_weights(normalization(64)).to(device)
    x = (seeded(shape, 0) + 30).to(device, dtype)
    scale, shift = (seeded((*shape[:2], *[1] * (len(shape) - 2)), seed).to(device, dtype) for seed in (1, 2))
    right = normalised(x, norm) * (1 + scale.double()) + shift.double()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    for out_dtype in (dtype, torch.float32):
        out = norm._as_affine_map(x, scale, shift, out_dtype)
        assert out.dtype == out_dtype
        assert out.shape == x.shape
        assert relative_error(out, right) < 1e-5 + torch.finfo(out_dtype).eps / 2
        out = norm._as_affine_map(x, None, None, out_dtype)
        assert relative_error(out, normalised(x, norm)) < 1e-5 + torch.finfo(out_dtype).eps / 2


@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_a_convolution_by_products_of_halves_is_as_precise_as_float32(device, monkeypatch):
    if device == "cpu":  # where out_dtype does not exist; products of float16 numbers are exact in float32
        product = torch.mm
        monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: product(a.to(out_dtype), b.to(out_dtype)))
    conv = fill_weights(nn.Conv2d(64, 6, 3, padding=1)).to(device)
    x = (3 * seeded((2, 64, 9, 14), 0)).to(device)
    right = nn.functional.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
    assert relative_error(conv3x3_split_float16(x, conv), right) < 3e-6
    assert relative_error(conv.half()(x.half()), right) > 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_agrees_with_reference_on_a_gpu(name, dtype):
    compute_exactly()  # by default, PyTorch's float32 convolutions have 10 bits
    model, x, rest, right = reference_run(name)
    model = deepcopy(model).cuda()
    if dtype == torch.float16:
        model.convert_to_fp16()
    out = model(x.cuda(), **{name: values.cuda() for name, values in rest.items()})
    assert relative_error(out.cpu(), right) < (1e-5 if dtype == torch.float32 else 3e-3)


@pytest.mark.parametrize("layer", ["in_layers.0", "in_layers.2", "out_layers.0", "out_layers.3"])
@torch.no_grad()
def test_tensors_seen_by_a_hook_are_not_overwritten(layer):
    """Without gradients, blocks overwrite tensors, but not those that a forward hook has received."""
    block = fill_weights(ResBlock(32, 16, 0.0, use_scale_shift_norm=True)).eval()
    kept = []
    block.get_submodule(layer).register_forward_hook(lambda _module, _args, output: kept.extend([output, output * 1]))
    block(seeded((2, 32, 8, 8), 0), seeded((2, 16), 1))
    assert torch.equal(*kept)


@torch.no_grad()
def test_layers_can_be_sliced_as_in_the_original():
    """As in the ResBlock of a client."""
    block = fill_weights(ResBlock(32, 16, 0.0, 64, use_scale_shift_norm=True, down=True)).eval()
    x, emb = seeded((2, 32, 8, 8), 0), seeded((2, 16), 1)
    h = block.in_layers[-1](block.h_upd(block.in_layers[:-1](x)))
    scale, shift = block.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)
    h = block.out_layers[1:](block.out_layers[0](h) * (1 + scale) + shift)
    assert relative_error(block(x, emb), h + block.skip_connection(block.x_upd(x))) < 1e-6


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reusing_memory_changes_neither_inputs_nor_results(memory_format, dtype):
    """With gradients, no memory is reused."""
    block = fill_weights(ResBlock(32, 16, 0.0, use_scale_shift_norm=True)).eval()
    block.apply(partial(convert_module_to_f16, dtype=dtype))
    x, emb = seeded((2, 32, 8, 8), 0).to(dtype).to(memory_format=memory_format), seeded((2, 16), 1)
    before = x.clone(), emb.clone()
    with_gradients = block(x, emb)
    with torch.no_grad():
        without = block(x, emb)
    assert all(map(torch.equal, before, (x, emb)))
    assert with_gradients.requires_grad
    assert relative_error(without, with_gradients.double()) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dim", [8, 9])
def test_timestep_embedding(dim):
    t = torch.tensor([0, 1, 999])
    emb = timestep_embedding(t, dim)
    assert emb.shape == (3, dim)
    assert emb.dtype == torch.float32
    for row, time in zip(emb, t.tolist(), strict=True):
        angles = [time * 10000 ** (-i / 4) for i in range(4)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles] + [0.0] * (dim - 8)
        torch.testing.assert_close(row, torch.tensor(expected), atol=1e-4, rtol=0)  # float32 angles of up to 999


def test_timestep_embedding_of_fractions_and_periods():
    half = timestep_embedding(torch.tensor([0.5]), 2)[0]
    torch.testing.assert_close(half, torch.tensor([math.cos(0.5), math.sin(0.5)]))
    fast = timestep_embedding(torch.tensor([2]), 4, max_period=100)[0]
    torch.testing.assert_close(fast, torch.tensor([math.cos(2), math.cos(0.2), math.sin(2), math.sin(0.2)]))


def test_update_ema():
    targets = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])]
    sources = [torch.tensor([5.0, 6.0], requires_grad=True), torch.tensor([[7.0]])]
    update_ema(iter(targets), iter(sources), rate=0.75)
    torch.testing.assert_close(targets, [torch.tensor([2.0, 3.0]), torch.tensor([[4.0]])])


def test_scaled_and_zeroed_modules():
    layer = nn.Linear(2, 3)
    weight = layer.weight.detach().clone()
    assert torch.equal(scale_module(layer, 2.0).weight, 2 * weight)
    assert not any(p.any() for p in zero_module(layer).parameters())
    assert layer.weight.requires_grad


def test_modules_by_number_of_dimensions():
    assert [type(conv_nd(d, 1, 1, 1)) for d in (1, 2, 3)] == [nn.Conv1d, nn.Conv2d, nn.Conv3d]
    assert [type(avg_pool_nd(d, 2)) for d in (1, 2, 3)] == [nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d]
    with pytest.raises(ValueError, match="1, 2 or 3 dimensions, not 4"):
        conv_nd(4, 1, 1, 1)


def test_mean_flat():
    x = seeded((2, 3, 4, 5), 0)
    torch.testing.assert_close(mean_flat(x), torch.stack([x[0].mean(), x[1].mean()]))
    assert torch.equal(mean_flat(x[:, 0, 0, 0]), x[:, 0, 0, 0])


def test_checkpoint_function():
    calls = []

    def square(x):
        calls.append(1)
        return x * x.sin()

    grads = []
    for flag in (False, True):
        x = seeded((3,), 0).requires_grad_()
        checkpoint(square, (x,), (), flag).sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)
    assert len(calls) == 3


class Counting:
    """A stream of 0, 1, 2, ..."""

    def randn(self, shape, device=None, dtype=None):
        return torch.arange(math.prod(shape), device=device, dtype=dtype).reshape(*shape)


def test_randn_uses_the_given_generator():
    x = torch.empty(2, 3, dtype=torch.float64)
    assert torch.equal(randn((2, 3), torch.Generator().manual_seed(5)), seeded((2, 3), 5))
    drawn = randn_like(x, torch.Generator().manual_seed(5))
    assert drawn.dtype == torch.float64
    assert torch.equal(drawn, torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5)))
    assert torch.equal(randn_like(x, Counting()), torch.arange(6.0, dtype=torch.float64).reshape(2, 3))
    torch.manual_seed(5)
    assert torch.equal(randn((2, 3)), seeded((2, 3), 5))
    # A CPU generator works for other devices too.
    assert randn((2, 3), torch.Generator(), device="meta").device.type == "meta"
