"""Flags read off the names and shapes of weights, for every published checkpoint."""

from __future__ import annotations

import argparse
import shlex

import pytest
import torch
from conftest import SMALL_MODEL, save_checkpoint
from reference import fill_weights, published_checkpoints

from guided_diffusion.checkpoints import check_fit, kind_of, load_model, read_flags, shapes_of
from guided_diffusion.errors import UserError
from guided_diffusion.script_util import (
    add_dict_to_argparser,
    create_model,
    default_channel_mult,
    downsampling_factors,
    model_and_diffusion_defaults,
    model_defaults,
)

PUBLISHED = published_checkpoints()
DIFFUSION_MODELS = [name for name, about in PUBLISHED.items() if about["kind"] == "diffusion"]


def parse(flags: str) -> dict:
    parser = argparse.ArgumentParser()
    add_dict_to_argparser(parser, model_and_diffusion_defaults())
    return vars(parser.parse_args(shlex.split(flags)))


def model_of(flags: dict) -> torch.nn.Module:
    with torch.device("meta"):
        return create_model(**{name: flags[name] for name in [*model_defaults(), "learn_sigma"]})


def shapes_in(name: str) -> dict:
    return {key: tuple(shape) for key, shape in PUBLISHED[name]["shapes"].items()}


@pytest.mark.parametrize("name", DIFFUSION_MODELS)
def test_flags_of_published_models(name):
    flags, found = parse(PUBLISHED[name]["flags"]), read_flags(shapes_in(name))
    for flag in ("num_channels", "num_res_blocks", "learn_sigma", "class_cond", "resblock_updown"):
        assert found.pop(flag) == flags[flag]
    assert found.pop("use_scale_shift_norm") == flags["use_scale_shift_norm"]
    assert found.pop("channel_mult") == default_channel_mult(flags["image_size"])
    factors = downsampling_factors(flags["image_size"], flags["attention_resolutions"])
    assert found.pop("attention_factors") == tuple(sorted(factors))
    assert not found
    check_fit(name, shapes_in(name), shapes_of(model_of(flags).state_dict()), flags)


@pytest.mark.parametrize("name", DIFFUSION_MODELS)
@pytest.mark.parametrize(
    ("flag", "wrong"),
    [
        ("image_size", 64),
        ("image_size", 128),
        ("image_size", 256),
        ("image_size", 512),
        ("num_channels", 64),
        ("num_res_blocks", 1),
        ("attention_resolutions", "16"),
        ("channel_mult", "1,2"),
        ("class_cond", None),
        ("learn_sigma", None),
        ("resblock_updown", None),
        ("use_scale_shift_norm", None),
    ],
)
def test_a_wrong_flag_is_named_and_the_remedy_works(name, flag, wrong):
    """Following the message's advice, word by word, gives the checkpoint's network."""
    right = parse(PUBLISHED[name]["flags"])
    flags = {**right, flag: not right[flag] if wrong is None else wrong}
    expected = shapes_of(model_of(flags).state_dict())
    if expected == shapes_in(name):  # image sizes that share their multipliers leave no trace
        check_fit(name, shapes_in(name), expected, flags)
        return
    with pytest.raises(UserError) as error:
        check_fit(name, shapes_in(name), expected, flags)
    message = str(error.value)
    assert name in message and len(message.splitlines()) == 2
    advice = message.split("Change your flags to: ")[1]
    given = " ".join(f"--{key} {shlex.quote(str(value))}" for key, value in flags.items())
    assert shapes_of(model_of(parse(f"{given} {advice}")).state_dict()) == shapes_in(name), message


def test_several_wrong_flags_are_all_named():
    flags = {**model_and_diffusion_defaults(), "image_size": 256}
    name = "256x256_diffusion_uncond.pt"
    with pytest.raises(UserError) as error:
        check_fit(name, shapes_in(name), shapes_of(model_of(flags).state_dict()), flags)
    assert "num_channels is 256 in the checkpoint, 128 in your flags" in str(error.value)
    assert "the checkpoint has 6 output channels, so --learn_sigma True" in str(error.value)
    for words in ("--num_channels 256", "--attention_resolutions 32,16,8", "--resblock_updown True"):
        assert words in str(error.value).splitlines()[1]


@pytest.mark.parametrize(
    ("name", "words"), [("256x256_classifier.pt", "a classifier"), ("64_256_upsampler.pt", "an upsampler")]
)
def test_other_networks_are_recognised(name, words):
    flags = model_and_diffusion_defaults()
    with pytest.raises(UserError, match=f"holds {words}"):
        check_fit(name, shapes_in(name), shapes_of(model_of(flags).state_dict()), flags)
    assert "some other network" in kind_of({"features.0.0.weight": (96, 3, 4, 4)})


def test_differences_that_no_flag_explains():
    flags = {**model_and_diffusion_defaults(), **SMALL_MODEL}
    expected = shapes_of(model_of(flags).state_dict())
    without = {name: shape for name, shape in expected.items() if name != "middle_block.1.norm.weight"}
    with pytest.raises(UserError, match=r"it lacks middle_block\.1\.norm\.weight"):
        check_fit("x.pt", without, expected, flags)
    with pytest.raises(UserError, match="it has besides extra"):
        check_fit("x.pt", {**expected, "extra": (1,)}, expected, flags)
    with pytest.raises(UserError, match=r"out\.2\.bias has shape \[5\], and not \[6\]"):
        check_fit("x.pt", {**expected, "out.2.bias": (5,)}, expected, flags)


def test_load_model_takes_the_weights_as_they_are(tmp_path):
    flags = {**model_and_diffusion_defaults(), **SMALL_MODEL}
    path = save_checkpoint(tmp_path / "small.pt", SMALL_MODEL)
    loaded = load_model(str(path), flags)
    expected = fill_weights(create_model(**{name: flags[name] for name in [*model_defaults(), "learn_sigma"]}))
    for name, w in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], w)
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([3, 700])
    assert torch.equal(loaded.eval()(x, t), expected(x, t))


def test_weights_saved_in_half_precision_become_float32(tmp_path):
    flags = {**model_and_diffusion_defaults(), **SMALL_MODEL}
    path = save_checkpoint(tmp_path / "small.pt", SMALL_MODEL)
    torch.save({name: w.half() for name, w in torch.load(path).items()}, path)
    assert {w.dtype for w in load_model(str(path), flags).state_dict().values()} == {torch.float32}


def test_untrained_networks_depend_on_the_seed_alone():
    flags = {**model_and_diffusion_defaults(), **SMALL_MODEL}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = load_model("untrained", flags, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again, other = (load_model("untrained", flags, seed=seed).state_dict() for seed in (1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["input_blocks.0.0.weight"], other["input_blocks.0.0.weight"])
