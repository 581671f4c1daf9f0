"""A checkpoint and the flags that it was made with: compare, explain, load.

Most of a U-Net's flags can be read off the names and shapes of its weights. Where a checkpoint does not fit the flags
that a user gave, the difference is told in the flags' own words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .errors import UserError
from .script_util import CHANNEL_MULT, model_from_flags

if TYPE_CHECKING:
    import torch

    from .unet import UNetModel

Shapes = Mapping[str, tuple[int, ...]]

UNTRAINED = "untrained"


def load_model(model_path: str, flags: Mapping[str, Any], seed: int = 0) -> UNetModel:
    """Build the U-Net that `flags` describe and give it the weights of a checkpoint, on the CPU and in float32.

    The weights stay mapped from the file until they are used, and nothing is initialised at random first.
    `model_path` "untrained" asks for a freshly initialised network instead, the same for the same `seed`.

    Raises UserError where the file cannot be used or does not fit the flags.
    """
    import torch

    from .dist_util import load_state_dict

    if model_path == UNTRAINED:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return model_from_flags(flags)

    weights = load_state_dict(model_path)
    with torch.device("meta"):
        model = model_from_flags(flags)
    check_fit(model_path, shapes_of(weights), shapes_of(model.state_dict()), flags)
    model.load_state_dict({name: w.to(torch.float32) for name, w in weights.items()}, assign=True)
    return model


def shapes_of(state_dict: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every entry of a state dict."""
    return {name: tuple(w.shape) for name, w in state_dict.items()}


def check_fit(model_path: str, found: Shapes, expected: Shapes, flags: Mapping[str, Any]) -> None:
    """Raise UserError, in the words of the flags, unless a checkpoint has exactly the names and shapes of the model.

    Args:
        model_path: named in the message.
        found: names and shapes of the checkpoint.
        expected: names and shapes of the model that `flags` describe.
        flags: the user's flags.
    """
    if dict(found) == dict(expected):
        return
    kind = kind_of(found)
    if kind != "diffusion model":
        raise UserError(f"--model_path {model_path} holds {kind}, not a diffusion model's U-Net")
    theirs, yours = read_flags(found), read_flags(expected)
    if "channel_mult" in theirs and theirs.get("channel_mult") == yours.get("channel_mult"):
        image_size = flags["image_size"]
    else:
        image_size = _image_size(theirs.get("channel_mult"), flags["image_size"])
    reasons, remedy = [], []
    for name, value in theirs.items():
        if value == yours.get(name):
            continue
        reason, flag = _in_words(name, value, yours.get(name), image_size, flags)
        reasons.append(reason)
        remedy.append(flag)
    if reasons:
        raise UserError(
            f"the checkpoint {model_path} does not fit your flags: {'; '.join(reasons)}.\n"
            f"Change your flags to: {' '.join(dict.fromkeys(remedy))}"
        )
    raise UserError(
        f"--model_path {model_path} is not a checkpoint of this network: {_first_difference(found, expected)}"
    )


def kind_of(shapes: Shapes) -> str:
    """Say which kind of network a checkpoint holds."""
    first = shapes.get("input_blocks.0.0.weight")
    if first is None or "time_embed.0.weight" not in shapes:
        return f"{len(shapes)} weights of some other network (the first is {next(iter(shapes), 'none')!r})"
    if not any(name.startswith("output_blocks.") for name in shapes):
        return "a classifier of noisy images"
    return {3: "diffusion model", 6: "an upsampler"}.get(first[1], f"a model of images with {first[1]} channels")


def read_flags(shapes: Shapes) -> dict[str, Any]:
    """Read off a U-Net's names and shapes the flags that they show.

    Returns a dictionary with, as far as they can be told, `num_channels`, `num_res_blocks`, `channel_mult` (a tuple),
    `attention_factors` (the factors of downsampling at which there is attention), `learn_sigma`, `out_channels`,
    `class_cond`, `resblock_updown` and `use_scale_shift_norm`. The number of heads, their order and the image size
    leave no trace in the weights.
    """
    flags: dict[str, Any] = {}
    channels = flags["num_channels"] = shapes["time_embed.0.weight"][1]
    if "out.2.weight" in shapes:
        flags["learn_sigma"] = {3: False, 6: True}.get(shapes["out.2.weight"][0])
    flags["class_cond"] = "label_emb.weight" in shapes

    outputs = _blocks(shapes, "output_blocks")
    ups = [kinds for kinds in outputs.values() if "conv" in kinds or kinds.count("in_layers") == 2]
    levels = len(ups) + 1
    if len(outputs) % levels == 0:
        per_level = len(outputs) // levels  # residual blocks of a level in the decoder: num_res_blocks + 1
        flags["num_res_blocks"] = per_level - 1
        inputs = _blocks(shapes, "input_blocks")
        firsts = [1 + level * per_level for level in range(levels)]
        widths = [shapes.get(f"input_blocks.{i}.0.out_layers.3.weight", (0,))[0] for i in firsts]
        flags["channel_mult"] = tuple(_whole(width / channels) for width in widths)
        flags["attention_factors"] = tuple(2**level for level, i in enumerate(firsts) if "qkv" in inputs.get(i, ()))
    if ups:
        flags["resblock_updown"] = all("conv" not in kinds for kinds in ups)
    flags["use_scale_shift_norm"] = (
        shapes["middle_block.0.emb_layers.1.weight"][0] == 2 * shapes["middle_block.0.out_layers.0.weight"][0]
    )
    return flags


def _blocks(shapes: Shapes, part: str) -> dict[int, list[str]]:
    """The kinds of the layers in each block: "in_layers" for a residual block, "qkv" for attention, "conv", "op"."""
    layers: dict[int, dict[int, str]] = {}
    for name in shapes:
        if match := re.fullmatch(rf"{part}\.(\d+)\.(\d+)\.(in_layers|qkv|conv|op)\..*", name):
            block, layer, kind = match.groups()
            layers.setdefault(int(block), {})[int(layer)] = kind
    return {block: [kinds[i] for i in sorted(kinds)] for block, kinds in layers.items()}


def _in_words(name: str, theirs: Any, yours: Any, image_size: int, flags: Mapping[str, Any]) -> tuple[str, str]:
    """What differs between checkpoint and flags, and the flag that mends it."""
    if name == "learn_sigma":
        return (
            f"the checkpoint has {6 if theirs else 3} output channels, so --learn_sigma {theirs}",
            f"--{name} {theirs}",
        )
    if name == "class_cond":
        has = "has" if theirs else "has no"
        return f"the checkpoint {has} class embedding, so --class_cond {theirs}", f"--{name} {theirs}"
    if name == "attention_factors":
        sides = ",".join(str(image_size // f) for f in theirs)
        mine = ",".join(str(flags["image_size"] // f) for f in yours or ()) or "nowhere"
        return (
            f"attention is at sides {sides} in the checkpoint, {mine} in your flags",
            f"--attention_resolutions {sides}",
        )
    if name == "channel_mult":
        multipliers = ",".join(map(str, theirs))
        mine = ",".join(map(str, yours or ()))
        size = _image_size(theirs, None)
        flag = f"--channel_mult {multipliers}" if size is None else f"--image_size {size}"
        if size is not None and flags.get("channel_mult"):
            flag += ' --channel_mult ""'
        whose = "" if size is None else f" (those of image_size {size})"
        return f"the multipliers of the channels are {multipliers} in the checkpoint{whose}, {mine} in your flags", flag
    return f"{name} is {theirs} in the checkpoint, {yours} in your flags", f"--{name} {theirs}"


def _image_size(channel_mult: tuple[float, ...] | None, otherwise: Any) -> Any:
    """The image size whose default multipliers these are, or `otherwise`."""
    return next((size for size, default in CHANNEL_MULT.items() if default == channel_mult), otherwise)


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
