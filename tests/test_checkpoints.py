"""Flags inferred from names and shapes of weights, for every published checkpoint."""

from __future__ import annotations

import argparse
import shlex
from functools import cache

from guided_diffusion.checkpoints import (
    CLASSIFIER,
    DIFFUSION_MODEL,
    UPSAMPLER,
    build,
    check_fit,
    load_model,
    load_noisy_classifier,
    load_upsampler,
    network_in,
    read_flags,
    shapes_of,
)
from guided_diffusion.errors import UserError
from guided_diffusion.script_util import (
    CHANNEL_MULT,
    add_dict_to_argparser,
    classifier_defaults,
    downsampling_factors,
    model_and_diffusion_defaults,
    sr_model_and_diffusion_defaults,
)

import pytest
import torch
from conftest import SMALL_MODEL, save_checkpoint
from reference import fill_weights, published_checkpoints

PUBLISHED = published_checkpoints()
NETWORKS = {"diffusion": DIFFUSION_MODEL, "super_resolution": UPSAMPLER, "classifier": CLASSIFIER}
DEFAULTS = {
    DIFFUSION_MODEL: model_and_diffusion_defaults(),
    UPSAMPLER: sr_model_and_diffusion_defaults(),
    CLASSIFIER: classifier_defaults(),
}
LOADERS = {DIFFUSION_MODEL: load_model, UPSAMPLER: load_upsampler, CLASSIFIER: load_noisy_classifier}

# Flags with a wrong value; None: the opposite of the correct one.
WRONG_FLAGS = {
    DIFFUSION_MODEL: [
        *(("image_size", size) for size in CHANNEL_MULT),
        ("num_channels", 64),
        ("num_res_blocks", 1),
        ("attention_resolutions", "16"),
        ("attention_resolutions", ""),
        ("channel_mult", "1,2"),
        ("channel_mult", "1"),
        ("class_cond", None),
        ("learn_sigma", None),
        ("resblock_updown", None),
        ("use_scale_shift_norm", None),
    ],
    UPSAMPLER: [
        *(("large_size", size) for size in CHANNEL_MULT),
        ("num_channels", 64),
        ("num_res_blocks", 1),
        ("attention_resolutions", "16"),
        ("channel_mult", "1,2"),
        ("class_cond", None),
        ("learn_sigma", None),
        ("resblock_updown", None),
        ("use_scale_shift_norm", None),
    ],
    CLASSIFIER: [
        *(("image_size", size) for size in CHANNEL_MULT),
        ("classifier_width", 64),
        ("classifier_depth", 1),
        ("classifier_depth", 5),
        ("classifier_attention_resolutions", "16"),
        ("classifier_channel_mult", "1,2"),
        ("classifier_channel_mult", "1,2,4"),
        ("classifier_pool", "adaptive"),
        ("classifier_pool", "spatial"),
        ("classifier_pool", "spatial_v2"),
        ("classifier_use_scale_shift_norm", None),
        ("classifier_resblock_updown", None),
    ],
}
SMALL_UPSAMPLER = {
    "large_size": 64,
    "small_size": 16,
    "num_channels": 32,
    "num_res_blocks": 1,
    "num_heads": 2,
    "attention_resolutions": "16",
    "learn_sigma": True,
}
SMALL_CLASSIFIER = {"image_size": 64, "classifier_width": 64, "classifier_depth": 1}
SMALL = {DIFFUSION_MODEL: SMALL_MODEL, UPSAMPLER: SMALL_UPSAMPLER, CLASSIFIER: SMALL_CLASSIFIER}


def network_of(name: str):
    return NETWORKS[PUBLISHED[name]["kind"]]


def parse(network, flags: str) -> dict:
    parser = argparse.ArgumentParser()
    add_dict_to_argparser(parser, DEFAULTS[network])
    return vars(parser.parse_args(shlex.split(flags)))


def shapes_made(network, flags: dict) -> dict:
    return _shapes_made(network, tuple((name, flags[name]) for name in DEFAULTS[network]))


@cache
def _shapes_made(network, flags: tuple) -> dict:
    with torch.device("meta"):
        return shapes_of(build(network, dict(flags)).state_dict())


def shapes_in(name: str) -> dict:
    return {key: tuple(shape) for key, shape in PUBLISHED[name]["shapes"].items()}


def check_advice(network, name: str, found: dict, flags: dict) -> None:
    """A mismatch is reported, and the message's advice, taken literally, resolves it."""
    expected = shapes_made(network, flags)
    if expected == found:  # image sizes with the same multipliers
        check_fit(network, name, found, expected, flags)
        return
    with pytest.raises(UserError) as error:
        check_fit(network, name, found, expected, flags)
    message = str(error.value)
    assert name in message and len(message.splitlines()) == 2
    advice = message.split("Change your flags to: ")[1]
    given = " ".join(f"--{key} {shlex.quote(str(value))}" for key, value in flags.items())
    assert shapes_made(network, parse(network, f"{given} {advice}")) == found, message


@pytest.mark.parametrize("name", PUBLISHED)
def test_flags_of_published_models(name):
    network, found = network_of(name), read_flags(shapes_in(name))
    flags = parse(network, PUBLISHED[name]["flags"])
    assert network_in(shapes_in(name)) is network
    size, prefix = flags[network.size_flag], "classifier_" if network is CLASSIFIER else ""
    assert found.pop(f"{prefix}channel_mult") == CHANNEL_MULT[256 if network is UPSAMPLER else size]
    factors = downsampling_factors(size, flags[f"{prefix}attention_resolutions"])
    assert found.pop("attention_factors") == tuple(sorted(factors))
    assert found == {flag: flags[flag] for flag in found}
    assert len(found) == 5 if network is CLASSIFIER else 6
    check_fit(network, name, shapes_in(name), shapes_made(network, flags), flags)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_wrong_flag_is_named_and_the_remedy_works(name):
    network, found = network_of(name), shapes_in(name)
    right = parse(network, PUBLISHED[name]["flags"])
    if network is UPSAMPLER:
        right["small_size"] = 16  # no larger than any large_size; the weights do not depend on it
    for flag, wrong in WRONG_FLAGS[network]:
        check_advice(network, name, found, {**right, flag: not right[flag] if wrong is None else wrong})


@pytest.mark.parametrize("network", SMALL, ids=NETWORKS)
def test_published_defaults_do_not_fit_and_the_remedy_works_for_every_option(network):
    """Networks that differ from published ones in one option, compared with the default flags."""
    small = {**DEFAULTS[network], **SMALL[network]}
    for flag, other in WRONG_FLAGS[network]:
        flags = {**small, flag: not small[flag] if other is None else other}
        if (network, flag, other) != (DIFFUSION_MODEL, "channel_mult", "1"):  # here, resblock_updown has no effect
            check_advice(network, "mine.pt", shapes_made(network, flags), DEFAULTS[network])


def test_several_wrong_flags_are_all_named():
    flags = {**model_and_diffusion_defaults(), "image_size": 256}
    name = "256x256_diffusion_uncond.pt"
    with pytest.raises(UserError) as error:
        check_fit(DIFFUSION_MODEL, name, shapes_in(name), shapes_made(DIFFUSION_MODEL, flags), flags)
    assert "num_channels is 256 in the checkpoint, 128 in your flags" in str(error.value)
    assert "the checkpoint has 6 output channels, so --learn_sigma True" in str(error.value)
    for words in ("--num_channels 256", "--attention_resolutions 32,16,8", "--resblock_updown True"):
        assert words in str(error.value).splitlines()[1]


def test_the_classifier_does_not_change_the_flags_of_the_model_beside_it():
    """Classifier-guided sampling has the flags of both."""
    name = "128x128_classifier.pt"
    flags = {**model_and_diffusion_defaults(), **classifier_defaults(), "channel_mult": "1,2", "classifier_depth": 3}
    with pytest.raises(UserError) as error:
        check_fit(CLASSIFIER, name, shapes_in(name), shapes_made(CLASSIFIER, flags), flags)
    assert str(error.value).splitlines()[1] == "Change your flags to: --classifier_depth 2 --image_size 128"


@pytest.mark.parametrize("name", ["256x256_diffusion.pt", "256x256_classifier.pt", "64_256_upsampler.pt"])
@pytest.mark.parametrize("network", SMALL, ids=NETWORKS)
def test_other_networks_are_recognised(name, network):
    held, flags = network_of(name), DEFAULTS[network]
    if held is network:
        return
    with pytest.raises(UserError) as error:
        check_fit(network, name, shapes_in(name), shapes_made(network, flags), flags)
    assert str(error.value).splitlines() == [
        f"{network.path_flag} {name} contains {held.kind}, not {network.kind}.",
        f"Use it with {held.path_flag} of {held.scripts}",
    ]


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (
            {"features.0.0.weight": (96, 3, 4, 4)},
            "1 weights of another network (the first is 'features.0.0.weight')",
        ),
        (
            {"input_blocks.0.0.weight": (32, 4, 3, 3), "time_embed.0.weight": (128, 32)},
            "a network for images with 4 channels",
        ),
    ],
)
def test_networks_of_others_are_named(shapes, words):
    for network, defaults in DEFAULTS.items():
        with pytest.raises(UserError) as error:
            check_fit(network, "x.pt", shapes, shapes_made(network, defaults), defaults)
        assert str(error.value) == f"{network.path_flag} x.pt contains {words}, not {network.kind}"


def test_sizes_that_share_their_multipliers_are_both_named():
    name, flags = "128_512_upsampler.pt", {**sr_model_and_diffusion_defaults(), "large_size": 64}
    with pytest.raises(UserError, match=r"\(those of large_size 256 or 512\)"):
        check_fit(UPSAMPLER, name, shapes_in(name), shapes_made(UPSAMPLER, flags), flags)


@pytest.mark.parametrize("network", SMALL, ids=NETWORKS)
def test_multipliers_of_no_published_size(network):
    """The message names the flag of that network, and the advice works."""
    flags = {**DEFAULTS[network], **SMALL[network], network.size_flag: 64}
    flag = "classifier_channel_mult" if network is CLASSIFIER else "channel_mult"
    small = {**flags, network.size_flag: 32, flag: "1,2"}  # not a published size: no advice to change it
    found = shapes_made(network, {**small, flag: "1,2,3,4"})
    with pytest.raises(UserError, match=f"Change your flags to: --{flag} 1,2,3,4"):
        check_fit(network, "mine.pt", found, shapes_made(network, small), small)
    for theirs in ("1,2", "1,2,2", "2,1"):
        found = shapes_made(network, {**flags, flag: theirs})
        for yours in ("", "1,3", "1,2,3,6", "1,1,1"):
            check_advice(network, "mine.pt", found, {**flags, flag: yours})


def test_a_classifier_whose_widths_leave_its_levels_open_is_refused_in_words():
    flags = {**classifier_defaults(), **SMALL_CLASSIFIER, "classifier_channel_mult": "1,1,2,2"}
    found = shapes_made(CLASSIFIER, flags)  # or 1,2 with a depth of 3
    assert "classifier_channel_mult" not in read_flags(found)
    check_fit(CLASSIFIER, "x.pt", found, shapes_made(CLASSIFIER, flags), flags)
    for wrong in ({"classifier_channel_mult": "1,2"}, {"classifier_width": 128}, {"classifier_depth": 2}):
        with pytest.raises(UserError, match=r"x\.pt"):
            check_fit(CLASSIFIER, "x.pt", found, shapes_made(CLASSIFIER, {**flags, **wrong}), {**flags, **wrong})


def test_flags_for_another_image_size():
    """The weights do not depend on the size, except through the levels that have attention."""
    right = {**model_and_diffusion_defaults(), **SMALL_MODEL}
    found = shapes_made(DIFFUSION_MODEL, right)
    for wrong, words in (
        (
            {"image_size": 64},
            "attention_resolutions 16 fits .* at image_size 32, not at 64, where 32 fits",
        ),
        ({"attention_resolutions": "9"}, "attention_resolutions is 16 in the checkpoint, 9 in your flags"),
        ({"attention_resolutions": ""}, "attention_resolutions is 16 in the checkpoint, '' in your flags"),
    ):
        flags = {**right, **wrong}
        with pytest.raises(UserError, match=words):
            check_fit(DIFFUSION_MODEL, "x.pt", found, shapes_made(DIFFUSION_MODEL, flags), flags)
        check_advice(DIFFUSION_MODEL, "x.pt", found, flags)
    name, flags = "128_512_upsampler.pt", parse(UPSAMPLER, PUBLISHED["128_512_upsampler.pt"]["flags"])
    flags |= {"large_size": 256}
    with pytest.raises(UserError, match=r"32,16 fits .* at large_size 512, not at 256, where 16,8 fits"):
        check_fit(UPSAMPLER, name, shapes_in(name), shapes_made(UPSAMPLER, flags), flags)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("network", SMALL, ids=NETWORKS)
def test_weights_that_are_not_finite(network, value, tmp_path):
    """Clipping the predicted image would hide them."""
    flags = {**DEFAULTS[network], **SMALL[network]}
    weights = fill_weights(build(network, flags)).state_dict()
    weights["middle_block.0.in_layers.2.weight"][0, 0, 0, 0] = value
    torch.save(weights, tmp_path / "damaged.pt")
    words = rf"{network.path_flag} .*damaged\.pt is damaged: middle_block\.0\.in_layers\.2\.weight has weights that"
    with pytest.raises(UserError, match=words):
        LOADERS[network](str(tmp_path / "damaged.pt"), flags)


@pytest.mark.parametrize("network", SMALL, ids=NETWORKS)
def test_weights_of_any_number_of_dimensions_are_refused_in_words(network):
    flags = {**DEFAULTS[network], **SMALL[network]}
    expected = shapes_made(network, flags)
    for name in expected:
        for shape in ((), (0,), (4, 0), (3, 3, 3)):
            with pytest.raises(UserError, match=r"x\.pt"):
                check_fit(network, "x.pt", {**expected, name: shape}, expected, flags)


def test_differences_that_no_flag_explains():
    flags = {**model_and_diffusion_defaults(), **SMALL_MODEL}
    expected = shapes_made(DIFFUSION_MODEL, flags)
    differences = {
        r"1 of \d+ weights are missing, such as out\.2\.bias$": {
            n: s for n, s in expected.items() if n != "out.2.bias"
        },
        "it has 1 unexpected weights, such as extra$": {**expected, "extra": (1,)},
        r"out\.2\.bias has shape \[5\], expected \[6\] \(1 of \d+ shapes differ\)$": {**expected, "out.2.bias": (5,)},
        r"out\.2\.weight has shape \[5, 32, 3, 3\]": {**expected, "out.2.weight": (5, 32, 3, 3)},
    }
    for words, found in differences.items():
        with pytest.raises(UserError, match=words):
            check_fit(DIFFUSION_MODEL, "x.pt", found, expected, flags)
    flags = {**classifier_defaults(), **SMALL_CLASSIFIER}
    expected = shapes_made(CLASSIFIER, flags)
    found = {**expected, "out.2.c_proj.weight": (10, 256, 1)}
    with pytest.raises(
        UserError, match=r"classifier_path x\.pt is not a .*: out\.2\.c_proj\.weight has shape \[10, 256"
    ):
        check_fit(CLASSIFIER, "x.pt", found, expected, flags)


@pytest.mark.parametrize("network", SMALL, ids=NETWORKS)
def test_partial_checkpoints_are_refused_in_words(network):
    """A missing block is a UserError."""
    flags = {**DEFAULTS[network], **SMALL[network]}
    expected = shapes_made(network, flags)
    for block in {".".join(name.split(".")[:2]) for name in expected}:
        found = {name: shape for name, shape in expected.items() if not name.startswith(f"{block}.")}
        with pytest.raises(UserError, match=r"x\.pt"):
            check_fit(network, "x.pt", found, expected, flags)


@pytest.mark.parametrize("network", SMALL, ids=NETWORKS)
def test_weights_are_taken_as_they_are(network, tmp_path):
    flags, path, load = {**DEFAULTS[network], **SMALL[network]}, str(tmp_path / "small.pt"), LOADERS[network]
    saved = fill_weights(build(network, flags))
    torch.save(saved.state_dict(), path)
    loaded = load(path, flags).eval()
    assert type(loaded) is type(saved)
    assert shapes_of(loaded.state_dict()) == shapes_of(saved.state_dict())
    for name, w in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], w)
    more = {"low_res": torch.randn(1, 3, 16, 16)} if network is UPSAMPLER else {}
    x, t = torch.randn(1, 3, *[flags[network.size_flag]] * 2), torch.tensor([700])
    with torch.inference_mode():
        assert torch.equal(loaded(x, t, **more), saved(x, t, **more))

    flag = "classifier_use_scale_shift_norm" if network is CLASSIFIER else "use_scale_shift_norm"
    with pytest.raises(UserError, match=f"{flag} is True in the checkpoint, False in your flags"):
        load(path, {**flags, flag: False})


@pytest.mark.parametrize("network", SMALL, ids=NETWORKS)
def test_no_file_no_network(network, tmp_path):
    flags = {**DEFAULTS[network], **SMALL[network]}
    with pytest.raises(UserError, match=rf"^missing checkpoint: {network.path_flag} FILE$"):
        LOADERS[network]("", flags)
    with pytest.raises(UserError, match=rf"^{network.path_flag} .*absent\.pt cannot be read: No such file"):
        LOADERS[network](str(tmp_path / "absent.pt"), flags)


def test_weights_saved_in_half_precision_become_float32(tmp_path):
    flags = {**model_and_diffusion_defaults(), **SMALL_MODEL}
    path = save_checkpoint(tmp_path / "small.pt", SMALL_MODEL)
    torch.save({name: w.half() for name, w in torch.load(path).items()}, path)
    assert {w.dtype for w in load_model(str(path), flags).state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("network", SMALL, ids=NETWORKS)
def test_untrained_networks_depend_on_the_seed_alone(network):
    flags, load = {**DEFAULTS[network], **SMALL[network]}, LOADERS[network]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = load("untrained", flags, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again, other = (load("untrained", flags, seed=seed).state_dict() for seed in (1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["input_blocks.0.0.weight"], other["input_blocks.0.0.weight"])
