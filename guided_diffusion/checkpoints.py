"""A checkpoint and the flags that it was made with: compare, explain, load.

Most of a network's flags can be read off the names and shapes of its weights. Where a checkpoint does not fit the flags
that a user gave, the difference is told in the flags' own words.
"""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .compute.memory import enough_memory_for_network
from .dist_util import load_weights
from .errors import UserError
from .script_util import CHANNEL_MULT, create_classifier, create_model, downsampling_factors, numbers, sr_create_model
from .unet import EncoderUNetModel, SuperResModel, UNetModel

Shapes = Mapping[str, tuple[int, ...]]

UNTRAINED = "untrained"


@dataclass(frozen=True, eq=False)
class Network:
    """One of the three networks, and what its users call things."""

    kind: str
    create: Callable[..., torch.nn.Module]  # makes the network of its flags
    sizes: Mapping[int, tuple[float, ...]]  # the multipliers of the channels, by size of the images
    scripts: str  # that take its checkpoint
    path_flag: str = "--model_path"
    size_flag: str = "image_size"

    def flag(self, name: str) -> str:
        """What this network calls a flag of the U-Net."""
        return CLASSIFIER_FLAGS.get(name, name) if self is CLASSIFIER else name


DIFFUSION_MODEL = Network(
    "a diffusion model's U-Net",
    create_model,
    CHANNEL_MULT,
    "forward_backward_dataset_sample.py, image_sample.py or image_nll.py",
)
UPSAMPLER = Network(
    "an upsampler",
    sr_create_model,
    {size: CHANNEL_MULT[min(size, 256)] for size in (256, 512, 128, 64)},  # 512 has the multipliers of 256
    "super_res_sample.py",
    size_flag="large_size",
)
CLASSIFIER = Network(
    "a classifier of noisy images", create_classifier, CHANNEL_MULT, "classifier_sample.py", "--classifier_path"
)

# What a classifier calls its flags.
CLASSIFIER_FLAGS = {
    "num_channels": "classifier_width",
    "num_res_blocks": "classifier_depth",
    "attention_resolutions": "classifier_attention_resolutions",
    "resblock_updown": "classifier_resblock_updown",
    "use_scale_shift_norm": "classifier_use_scale_shift_norm",
    "pool": "classifier_pool",
    "channel_mult": "classifier_channel_mult",
}


def load_model(model_path: str, flags: Mapping[str, Any], seed: int = 0) -> UNetModel:
    """Build the U-Net that `flags` describe and give it the weights of a checkpoint, on the CPU and in float32.

    The weights stay mapped from the file until they are used, and nothing is initialised at random first.
    `model_path` "untrained" asks for a freshly initialised network instead, the same for the same `seed`.

    Raises UserError where the file cannot be used or does not fit the flags.
    """
    return _load(DIFFUSION_MODEL, model_path, flags, seed)


def load_upsampler(model_path: str, flags: Mapping[str, Any], seed: int = 0) -> SuperResModel:
    """As `load_model`, for an upsampler and the flags of `sr_model_and_diffusion_defaults`."""
    return _load(UPSAMPLER, model_path, flags, seed)


def load_noisy_classifier(classifier_path: str, flags: Mapping[str, Any], seed: int = 0) -> EncoderUNetModel:
    """As `load_model`, for a classifier of noisy images and the flags of `classifier_defaults`."""
    return _load(CLASSIFIER, classifier_path, flags, seed)


def _load(network: Network, path: str, flags: Mapping[str, Any], seed: int) -> Any:
    if not path:
        raise UserError(f"no checkpoint was given: {network.path_flag} FILE")

    if path == UNTRAINED:
        with torch.random.fork_rng(devices=[]), enough_memory_for_network():
            torch.manual_seed(seed)
            return build(network, flags)

    with torch.device("meta"):
        model = build(network, flags)
    expected = shapes_of(model.state_dict())
    weights = load_weights(path, flag=network.path_flag, expected=expected)
    check_fit(network, path, shapes_of(weights), expected, flags)
    model.load_state_dict({name: w.to(torch.float32) for name, w in weights.items()}, assign=True)
    return model


def build(network: Network, flags: Mapping[str, Any]) -> torch.nn.Module:
    """The network that `flags` describe; their channel_mult may be absent. Raises UserError if they describe none."""
    flags = {"channel_mult": "", "classifier_channel_mult": "", **flags}
    return network.create(**{name: flags[name] for name in inspect.signature(network.create).parameters})


def shapes_of(state_dict: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every entry of a state dict."""
    return {name: tuple(w.shape) for name, w in state_dict.items()}


def check_fit(
    network: Network, path: str, found: Shapes, expected: Shapes, flags: Mapping[str, Any], path_flag: str = ""
) -> None:
    """Raise UserError, in the words of the flags, unless a checkpoint has exactly the names and shapes of the model.

    Args:
        network: which of the networks is expected.
        path: of the checkpoint, named in the message.
        found: names and shapes of the checkpoint.
        expected: names and shapes of the model that `flags` describe.
        flags: the user's flags.
        path_flag: flag that gave the path; by default the one of scripts that sample.
    """
    named = f" ({path_flag})" if path_flag else ""
    path_flag = path_flag or network.path_flag
    if dict(found) == dict(expected):
        return
    held = network_in(found)
    if isinstance(held, str):
        raise UserError(f"{path_flag} {path} holds {held}, not {network.kind}")
    if held is not network:
        raise UserError(
            f"{path_flag} {path} holds {held.kind}, not {network.kind}.\nIt is for {held.path_flag} of {held.scripts}"
        )
    theirs, yours = read_flags(found), {**flags, **read_flags(expected)}
    sizes = []  # those whose multipliers are the checkpoint's, where yours are others
    mult = network.flag("channel_mult")
    if isinstance(yours.get(mult), str):  # the widths of your network leave it open
        yours[mult] = numbers(yours[mult], mult)
    if mult in theirs and theirs[mult] != yours.get(mult) and flags[network.size_flag] in network.sizes:
        sizes = [size for size, multipliers in network.sizes.items() if multipliers == theirs[mult]]
    if "attention_factors" in theirs:  # compared by the sides that they are at once the image size is right
        size = sizes[0] if sizes else flags[network.size_flag]
        flag = network.flag("attention_resolutions")
        levels = {2**level for level in range(len(theirs[mult]))}
        both = theirs.pop("attention_factors"), levels.intersection(downsampling_factors(size, flags[flag]))
        theirs[flag], yours[flag] = (",".join(str(size // f) for f in sorted(factors)) for factors in both)
    differing = [name for name, value in theirs.items() if value != yours[name]]
    differences = [_in_words(network, name, theirs[name], yours[name], sizes, flags) for name in differing]
    if not differences:
        raise UserError(f"{path_flag} {path} is not a checkpoint of this network: {_first_difference(found, expected)}")
    reasons, remedies = zip(*differences, strict=True)
    advice = f".\nChange your flags to: {' '.join(remedies)}" if all(remedies) else ""
    raise UserError(f"the checkpoint {path}{named} does not fit your flags: {'; '.join(reasons)}{advice}")


def network_in(shapes: Shapes) -> Network | str:
    """The network that a checkpoint holds, or words for one that is none of the three."""
    first = shapes.get("input_blocks.0.0.weight")
    if first is None or "time_embed.0.weight" not in shapes:
        return f"{len(shapes)} weights of some other network (the first is {next(iter(shapes), 'none')!r})"
    decoder = any(name.startswith("output_blocks.") for name in shapes)
    network = {(3, True): DIFFUSION_MODEL, (6, True): UPSAMPLER, (3, False): CLASSIFIER}.get((first[1], decoder))
    return network or f"a network for images with {first[1]} channels"


def read_flags(shapes: Shapes) -> dict[str, Any]:
    """Read off a network's names and shapes the flags that they show, by the names that this network has for them.

    Returns a dictionary with, as far as they can be told, `num_channels`, `num_res_blocks`, `channel_mult` (a tuple),
    `attention_factors` (the factors of downsampling at which there is attention), `resblock_updown` and
    `use_scale_shift_norm`; of a model that makes images, `learn_sigma` and `class_cond`; of a classifier,
    `classifier_pool`. The number of heads, their order and the image size leave no trace in the weights.
    """
    flags: dict[str, Any] = {}
    channels = flags["num_channels"] = shapes["time_embed.0.weight"][1]
    inputs = _blocks(shapes, "input_blocks")  # all but the first, which is a convolution
    levels = _levels(shapes, channels)
    if levels and (len(inputs) + 1) % levels == 0:
        per_level = (len(inputs) + 1) // levels  # the residual blocks, and one that halves the resolution
        flags["num_res_blocks"] = per_level - 1
        firsts = [1 + level * per_level for level in range(levels)]
        flags["channel_mult"] = tuple(_whole(_width(shapes, i) / channels) for i in firsts)
        flags["attention_factors"] = tuple(2**level for level, i in enumerate(firsts) if "qkv" in inputs.get(i, ()))
    if levels != 1:
        flags["resblock_updown"] = not any("op" in kinds for kinds in inputs.values())
    embedded, activations = (
        shapes.get(f"middle_block.0.{layer}.weight", (0,))[0] for layer in ("emb_layers.1", "out_layers.0")
    )
    flags["use_scale_shift_norm"] = embedded == 2 * activations
    if network_in(shapes) is CLASSIFIER:
        if "out.2.positional_embedding" in shapes:
            flags["pool"] = "attention"
        elif len(shapes.get("out.0.weight", ())) == 1:  # a normalisation
            flags["pool"] = "adaptive"
        else:
            flags["pool"] = "spatial_v2" if "out.1.weight" in shapes else "spatial"
        return {CLASSIFIER.flag(name): value for name, value in flags.items()}
    flags["class_cond"] = "label_emb.weight" in shapes
    if (out_channels := shapes.get("out.2.weight", (0,))[0]) in (3, 6):
        flags["learn_sigma"] = out_channels == 6
    return flags


def _blocks(shapes: Shapes, part: str) -> dict[int, list[str]]:
    """The kinds of the layers in each block: "in_layers" for a residual block, "qkv" for attention, "conv", "op"."""
    layers: dict[int, dict[int, str]] = {}
    for name in shapes:
        if match := re.fullmatch(rf"{part}\.(\d+)\.(\d+)\.(in_layers|qkv|conv|op)\..*", name):
            block, layer, kind = match.groups()
            layers.setdefault(int(block), {})[int(layer)] = kind
    return {block: [kinds[i] for i in sorted(kinds)] for block, kinds in sorted(layers.items())}


def _width(shapes: Shapes, block: int) -> int:
    """The channels that an input block puts out."""
    names = (f"input_blocks.{block}.0.{layer}.weight" for layer in ("out_layers.3", "op"))
    return next((shapes[name][0] for name in names if name in shapes), 0)


def _levels(shapes: Shapes, channels: int) -> int | None:
    """The number of levels of resolution, or None where it cannot be told."""
    outputs = _blocks(shapes, "output_blocks").values()
    if outputs:
        return 1 + sum("conv" in kinds or kinds.count("in_layers") == 2 for kinds in outputs)
    # Without a decoder, nothing tells a residual block that halves the resolution from one that does not. The widths
    # do, if they are those of one of the published sizes, or if only one number of levels is possible.
    widths = [_width(shapes, i) for i in _blocks(shapes, "input_blocks")]
    possible = []
    for levels in range(1, len(widths)):
        per_level = (len(widths) + 1) // levels
        groups = [set(widths[level * per_level : (level + 1) * per_level]) for level in range(levels)]
        if (len(widths) + 1) % levels == 0 and per_level > 1 and all(len(group) == 1 for group in groups):
            possible.append(tuple(width / channels for (width,) in groups))
    published = [multipliers for multipliers in possible if multipliers in CLASSIFIER.sizes.values()]
    candidates = published or possible
    return len(candidates[0]) if len(candidates) == 1 else None


def _in_words(
    network: Network, name: str, theirs: Any, yours: Any, sizes: list[int], flags: Mapping[str, Any]
) -> tuple[str, str]:
    """What differs between checkpoint and flags, and the flag that mends it: "" where none does."""
    value, mine = (shlex.quote(str(v)) for v in (theirs, yours))
    remedy = f"--{name} {value}"
    if name == "learn_sigma":
        return f"the checkpoint has {6 if theirs else 3} output channels, so {remedy}", remedy
    if name == "class_cond":
        return f"the checkpoint has {'a' if theirs else 'no'} class embedding, so {remedy}", remedy
    if name != network.flag("channel_mult"):
        return f"{name} is {value} in the checkpoint, {mine} in your flags", remedy
    value, mine = (",".join(map(str, multipliers)) for multipliers in (theirs, yours))
    if sizes:
        whose = f" (those of {network.size_flag} {' or '.join(map(str, sizes))})"
        remedy = f"--{network.size_flag} {sizes[0]}"
        if flags.get(name):
            remedy += f' --{name} ""'
    else:
        whose, remedy = "", f"--{name} {value}"
    return f"the multipliers of the channels are {value} in the checkpoint{whose}, {mine} in your flags", remedy


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number


def _first_difference(found: Shapes, expected: Shapes) -> str:
    """One line on how two sets of names and shapes differ."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    for names, what in ((missing, "lacks"), (unexpected, "has besides")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return f"it {what} {names[0]}{more}"
    name = next(name for name in expected if found[name] != expected[name])
    return f"{name} has shape {list(found[name])}, and not {list(expected[name])}"
