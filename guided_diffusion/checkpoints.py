"""Loading checkpoints, and explaining mismatches between a checkpoint and the user's flags in terms of the flags.

Most flags of a network can be inferred from the names and shapes of its weights.
"""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .compute.memory import explain_out_of_memory_for_network
from .dist_util import load_weights
from .errors import UserError
from .script_util import CHANNEL_MULT, create_classifier, create_model, downsampling_factors, numbers, sr_create_model
from .system.checkpoint_files import Shapes, check_finite_weights, difference, shapes_of
from .unet import EncoderUNetModel, SuperResModel, UNetModel

UNTRAINED = "untrained"


@dataclass(frozen=True, eq=False)
class Network:
    """One of the three kinds of networks, with the names of its flags."""

    kind: str
    create: Callable[..., torch.nn.Module]  # factory that takes its flags
    sizes: Mapping[int, tuple[float, ...]]  # channel multipliers by image size
    scripts: str  # scripts that load its checkpoint
    path_flag: str = "--model_path"
    size_flag: str = "image_size"

    def flag(self, name: str) -> str:
        """This network's name for a flag of the U-Net."""
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
    {size: CHANNEL_MULT[min(size, 256)] for size in (256, 512, 128, 64)},
    "super_res_sample.py",
    size_flag="large_size",
)
CLASSIFIER = Network(
    "a classifier of noisy images", create_classifier, CHANNEL_MULT, "classifier_sample.py", "--classifier_path"
)

CLASSIFIER_FLAGS = {  # names of the U-Net's flags for a classifier
    "num_channels": "classifier_width",
    "num_res_blocks": "classifier_depth",
    "attention_resolutions": "classifier_attention_resolutions",
    "resblock_updown": "classifier_resblock_updown",
    "use_scale_shift_norm": "classifier_use_scale_shift_norm",
    "pool": "classifier_pool",
    "channel_mult": "classifier_channel_mult",
}


def load_model(model_path: str, flags: Mapping[str, Any], seed: int = 0) -> UNetModel:
    """Build the U-Net described by `flags` and load the weights of a checkpoint, on the CPU and in float32.

    The weights are memory-mapped. If `model_path` is "untrained", they are initialised randomly from `seed` instead.

    Raises UserError if the file cannot be read or does not fit the flags.
    """
    return _load(DIFFUSION_MODEL, model_path, flags, seed=seed)


def load_upsampler(model_path: str, flags: Mapping[str, Any], seed: int = 0) -> SuperResModel:
    """`load_model` for an upsampler, with the flags of `sr_model_and_diffusion_defaults`."""
    return _load(UPSAMPLER, model_path, flags, seed=seed)


def load_noisy_classifier(classifier_path: str, flags: Mapping[str, Any], seed: int = 0) -> EncoderUNetModel:
    """`load_model` for a classifier of noisy images, with the flags of `classifier_defaults`."""
    return _load(CLASSIFIER, classifier_path, flags, seed=seed)


def _load(network: Network, path: str, flags: Mapping[str, Any], seed: int) -> Any:
    if not path:
        raise UserError(f"missing checkpoint: {network.path_flag} FILE")

    if path == UNTRAINED:
        with torch.random.fork_rng(devices=[]), explain_out_of_memory_for_network():
            torch.manual_seed(seed)
            return build(network, flags)

    with torch.device("meta"):
        model = build(network, flags)
    expected = shapes_of(model.state_dict())
    weights = load_weights(path, flag=network.path_flag, expected=expected)
    check_fit(network, path, found=shapes_of(weights), expected=expected, flags=flags)
    weights = {name: w.to(torch.float32) for name, w in weights.items()}
    check_finite_weights(weights, f"{network.path_flag} {path}")
    model.load_state_dict(weights, assign=True)
    return model


def build(network: Network, flags: Mapping[str, Any]) -> torch.nn.Module:
    """The network described by `flags`; channel_mult is optional. Raises UserError if the flags are invalid."""
    flags = {"channel_mult": "", "classifier_channel_mult": "", **flags}
    return network.create(**{name: flags[name] for name in inspect.signature(network.create).parameters})


def check_fit(
    network: Network, path: str, found: Shapes, expected: Shapes, flags: Mapping[str, Any], path_flag: str = ""
) -> None:
    """Raise UserError, naming the flags to change, unless names and shapes of checkpoint and model are equal.

    Args:
        network: expected kind of network.
        path: path of the checkpoint, for the message.
        found: names and shapes of the checkpoint.
        expected: names and shapes of the model described by `flags`.
        flags: the user's flags.
        path_flag: flag that specified the path; by default that of the sampling scripts.
    """
    named = f" ({path_flag})" if path_flag else ""
    path_flag = path_flag or network.path_flag
    if dict(found) == dict(expected):
        return
    saved = network_in(found)
    if isinstance(saved, str):
        raise UserError(f"{path_flag} {path} contains {saved}, not {network.kind}")
    if saved is not network:
        raise UserError(
            f"{path_flag} {path} contains {saved.kind}, not {network.kind}.\n"
            f"Use it with {saved.path_flag} of {saved.scripts}"
        )
    theirs, yours = read_flags(found), {**flags, **read_flags(expected)}
    sizes = []  # image sizes with the checkpoint's multipliers, if those differ from yours
    mult = network.flag("channel_mult")
    if isinstance(yours.get(mult), str):  # not inferred from the shapes
        yours[mult] = numbers(yours[mult], mult)
    if mult in theirs and theirs[mult] != yours.get(mult) and flags[network.size_flag] in network.sizes:
        sizes = [size for size, multipliers in network.sizes.items() if multipliers == theirs[mult]]
    if "attention_factors" in theirs:
        size = sizes[0] if sizes else flags[network.size_flag]
        flag, factors = network.flag("attention_resolutions"), sorted(theirs.pop("attention_factors"))
        if not _has_attention(size, flags[flag], factors, theirs[mult]):
            sides = ",".join(str(size // f) for f in factors)
            fitting = [] if sizes else _fitting_sizes(network, flags, factors, theirs[mult])
            if fitting:  # the flags are right, but for another size
                theirs[network.size_flag], yours[network.size_flag] = fitting[0], f"{size}, where {sides} fits"
            else:
                theirs[flag], yours[flag] = sides, flags[flag]
    differing = [name for name, value in theirs.items() if value != yours[name]]
    differences = [
        _in_words(network, name, theirs=theirs[name], yours=yours[name], sizes=sizes, flags=flags) for name in differing
    ]
    if not differences:
        raise UserError(f"{path_flag} {path} is not a checkpoint of this network: {difference(found, expected)}")
    reasons, remedies = zip(*differences, strict=True)
    advice = f".\nChange your flags to: {' '.join(remedies)}" if all(remedies) else ""
    raise UserError(f"the checkpoint {path}{named} does not fit your flags: {'; '.join(reasons)}{advice}")


def _has_attention(size: int, resolutions: str, factors: Sequence[int], mult: Sequence[float]) -> bool:
    """Whether a network for this image size has attention at these downsampling factors and nowhere else."""
    levels = {2**level for level in range(len(mult))}
    return levels.intersection(downsampling_factors(size, resolutions)) == {*factors}


def _fitting_sizes(
    network: Network, flags: Mapping[str, Any], factors: Sequence[int], mult: Sequence[float]
) -> list[int]:
    """The powers of two, as image sizes, at which the user's other flags give these factors and multipliers."""
    flag = network.flag("attention_resolutions")
    sizes = {int(side * factor) for side in numbers(flags[flag], flag) for factor in factors}
    given = flags.get(network.flag("channel_mult"))
    return sorted(
        size
        for size in sizes
        if size & (size - 1) == 0
        and (given or network.sizes.get(size) == mult)
        and _has_attention(size, flags[flag], factors, mult)
    )


def network_in(shapes: Shapes) -> Network | str:
    """The network in a checkpoint, or a description if it is none of the three."""
    first, embedding = (shapes.get(name, ()) for name in ("input_blocks.0.0.weight", "time_embed.0.weight"))
    if len(first) != 4 or len(embedding) != 2 or not embedding[1]:
        return f"{len(shapes)} weights of another network (the first is {next(iter(shapes), 'none')!r})"
    decoder = any(name.startswith("output_blocks.") for name in shapes)
    network = {(3, True): DIFFUSION_MODEL, (6, True): UPSAMPLER, (3, False): CLASSIFIER}.get((first[1], decoder))
    return network or f"a network for images with {first[1]} channels"


def read_flags(shapes: Shapes) -> dict[str, Any]:
    """Infer a network's flags from the names and shapes of its weights.

    Returns `num_channels`, `num_res_blocks`, `channel_mult` (a tuple), `attention_factors` (the downsampling factors
    with attention), `resblock_updown` and `use_scale_shift_norm`, as far as they can be inferred, under this network's
    names for them; for a model that generates images, also `learn_sigma` and `class_cond`; for a classifier,
    `classifier_pool`. The image size and the number and order of attention heads cannot be inferred.
    """
    flags: dict[str, Any] = {}
    channels = flags["num_channels"] = shapes["time_embed.0.weight"][1]
    inputs = _blocks(shapes, "input_blocks")  # except the first, which is a convolution
    levels = _levels(shapes, channels)
    if levels and (len(inputs) + 1) % levels == 0:
        per_level = (len(inputs) + 1) // levels  # residual blocks, and one that halves the resolution
        flags["num_res_blocks"] = per_level - 1
        firsts = [1 + level * per_level for level in range(levels)]
        flags["channel_mult"] = tuple(_whole(_width(shapes, i) / channels) for i in firsts)
        flags["attention_factors"] = tuple(2**level for level, i in enumerate(firsts) if "qkv" in inputs.get(i, ()))
    if levels != 1:
        flags["resblock_updown"] = not any("op" in kinds for kinds in inputs.values())
    embedded, activations = (
        _outputs(shapes, f"middle_block.0.{layer}.weight") for layer in ("emb_layers.1", "out_layers.0")
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
    if (out_channels := _outputs(shapes, "out.2.weight")) in (3, 6):
        flags["learn_sigma"] = out_channels == 6
    return flags


def _blocks(shapes: Shapes, part: str) -> dict[int, list[str]]:
    """Kinds of layers in each block: "in_layers" for a residual block, "qkv" for attention, "conv", "op"."""
    layers: dict[int, dict[int, str]] = {}
    for name in shapes:
        if match := re.fullmatch(rf"{part}\.(\d+)\.(\d+)\.(in_layers|qkv|conv|op)\..*", name):
            block, layer, kind = match.groups()
            layers.setdefault(int(block), {})[int(layer)] = kind
    return {block: [kinds[i] for i in sorted(kinds)] for block, kinds in sorted(layers.items())}


def _width(shapes: Shapes, block: int) -> int:
    """Number of output channels of an input block."""
    names = (f"input_blocks.{block}.0.{layer}.weight" for layer in ("out_layers.3", "op"))
    return next((_outputs(shapes, name) for name in names if name in shapes), 0)


def _outputs(shapes: Shapes, name: str) -> int:
    """Number of output channels of a layer, given the name of its weight; 0 if it has none, or is a single number."""
    return next(iter(shapes.get(name, ())), 0)


def _levels(shapes: Shapes, channels: int) -> int | None:
    """Number of resolution levels, or None if it cannot be inferred."""
    outputs = _blocks(shapes, "output_blocks").values()
    if outputs:
        return 1 + sum("conv" in kinds or kinds.count("in_layers") == 2 for kinds in outputs)
    # Without a decoder, a residual block that halves the resolution looks like any other. The number of levels follows
    # from the widths, if they are those of a published size or allow only one number.
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
    """Descriptions of the difference in one flag, and of the flag that resolves it."""
    value, mine = (shlex.quote(str(v)) for v in (theirs, yours))
    remedy = f"--{name} {value}"
    if name == "learn_sigma":
        return f"the checkpoint has {6 if theirs else 3} output channels, so {remedy}", remedy
    if name == "class_cond":
        return f"the checkpoint has {'a' if theirs else 'no'} class embedding, so {remedy}", remedy
    if name == network.size_flag:
        attention = network.flag("attention_resolutions")
        return f"{attention} {flags[attention]} fits the checkpoint at {name} {value}, not at {yours}", remedy
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
    return f"the channel multipliers are {value} in the checkpoint{whose}, {mine} in your flags", remedy


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number
