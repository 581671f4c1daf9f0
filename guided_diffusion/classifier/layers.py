"""The layers of a classifier to watch, and the channel axis of their outputs."""

from __future__ import annotations

import difflib
import fnmatch
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.convnext import CNBlock
from torchvision.models.efficientnet import FusedMBConv, MBConv
from torchvision.models.regnet import ResBottleneckBlock
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.swin_transformer import SwinTransformerBlock
from torchvision.models.vision_transformer import EncoderBlock

from .. import logger
from ..errors import UserError
from .preprocessing import named_failures

# Residual and transformer blocks; SwinTransformerBlockV2 derives from SwinTransformerBlock.
BLOCKS = (BasicBlock, Bottleneck, ResBottleneckBlock, CNBlock, MBConv, FusedMBConv, SwinTransformerBlock, EncoderBlock)
CONTAINERS = (nn.Sequential, nn.ModuleList)
NORMALISATIONS = (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True)
class WatchedLayer:
    """A module of a classifier whose output is measured.

    Attributes:
        name: dotted name of the module, such as features.1.0.
        channel_axis: 1 for maps (B, C, H, W) and logits (B, classes); -1 for Swin's maps (B, H, W, C) and ViT's tokens
            (B, T, C).
        is_logits: whether the output is that of the classifier; its mean and variance are over images and classes.
        channels: number of channels.
    """

    name: str
    channel_axis: int
    is_logits: bool
    channels: int


@dataclass
class _Calls:
    """A module's calls in a forward pass.

    Attributes:
        count: number of calls.
        shape: shape of the output, () if it is not a tensor.
        address: memory address of the output.
    """

    count: int = 0
    shape: tuple[int, ...] = ()
    address: int = 0


def _calls_of_modules(model: nn.Module, num_images: int, size: int) -> dict[str, _Calls]:
    """Every module's calls in a forward pass on random images, by name, in the order in which they returned."""
    calls: dict[str, _Calls] = defaultdict(_Calls)
    outputs = []  # kept alive, so that their addresses differ

    def note(name: str, _module: nn.Module, _args: tuple, output: Any) -> None:
        calls[name].count += 1
        if isinstance(output, Tensor):
            calls[name].shape, calls[name].address = tuple(output.shape), output.data_ptr()
            outputs.append(output)

    hooks = [module.register_forward_hook(partial(note, name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            model(torch.randn(num_images, 3, size, size, generator=torch.Generator().manual_seed(0)))
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def find_layers(
    model: nn.Module,
    size: int,
    patterns: Sequence[str] = (),
    flag: str = "--layers",
    others: Sequence[str] = (),
    what: str = "--classifier_name",
) -> tuple[tuple[WatchedLayer, ...], int]:
    """Find the layers to watch, with two forward passes on random images.

    Args:
        model: classifier in evaluation mode.
        size: side of its input images, in pixels.
        patterns: names of layers or patterns, in which * also matches dots; if empty, `default_layers`. Matching layers
            that cannot be watched are skipped with a message.
        flag: flag that gave the patterns, for messages.
        others: other values of this flag, that a pattern may have been meant to be.
        what: flag that gave the network, for messages.

    Returns:
        the layers, in the order of the network, and the number of logits.

    Raises:
        UserError: the output is not logits; no layer is named, and no layer's output is the classifier's output; a
            pattern matches no layer that can be watched; or a named layer cannot be watched.
    """
    with named_failures(f"the network of {what}, for an input {[2, 3, size, size]},"):
        calls = _calls_of_modules(model, 2, size)
    shape = calls[""].shape
    if len(shape) != 2 or shape[0] != 2:
        found = f"of shape {shape} for two images" if shape else "not a tensor"
        expected = "expected logits, a tensor of shape (images, classes)"
        raise UserError(f"{what}: the classifier's output is {found}; {expected}")
    try:
        smaller = _calls_of_modules(model, 1, 3 * size // 4)
    except Exception:  # the network takes images of one size only; the exception depends on its layers
        smaller = defaultdict(_Calls)
    logits = [name for name, _ in model.named_modules() if name and calls[name].address == calls[""].address]
    if not patterns and not logits:
        raise UserError(f"{flag}: no layer's output is the classifier's output, so name the layers to watch")
    names = (
        _matching_layers(model, patterns, calls, flag, others) if patterns else default_layers(model, logits[0], calls)
    )
    layers = []
    for name in sorted(names, key=list(calls).index):
        axis = _channel_axis(model.get_submodule(name), calls[name].shape, smaller[name].shape)
        layers.append(WatchedLayer(name, axis, name in logits, calls[name].shape[axis]))
    return tuple(layers), shape[1]


def _problem(calls: _Calls) -> str:
    """Why a module cannot be watched; "" if it can. `calls` are those of a batch of two images."""
    if calls.count != 1:
        return f"the network calls it {calls.count} times per image, not once"
    if len(calls.shape) < 2 or calls.shape[0] != 2:
        return "its output is not a tensor with a row per image"
    return ""


def modules_matching(model: nn.Module, pattern: str, flag: str = "--layers", others: Sequence[str] = ()) -> list[str]:
    """The names of the modules that match a pattern; see `find_layers`. Raises UserError if there are none."""
    names = [name for name, _ in model.named_modules() if name]
    matching = fnmatch.filter(names, pattern) if pattern not in names else [pattern]
    if not matching:
        close = difflib.get_close_matches(pattern, [*others, *names], n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"its modules are {', '.join(model._modules)}"
        raise UserError(f"{flag}: {pattern} matches no layer of the classifier; {hint}")
    return matching


def _matching_layers(
    model: nn.Module, patterns: Iterable[str], calls: dict[str, _Calls], flag: str, others: Sequence[str]
) -> list[str]:
    """The modules that match the patterns and can be watched; see `find_layers`."""
    chosen: dict[str, None] = {}
    skipped: dict[str, str] = {}  # name -> why
    for pattern in patterns:
        matching = modules_matching(model, pattern, flag, others)
        problems = {name: _problem(calls[name]) for name in matching}
        if all(problems.values()):
            name, problem = next(iter(problems.items()))
            which = f"none of the {len(matching)} layers matching {pattern} can be watched: " if name != pattern else ""
            raise UserError(f"{flag}: {which}{name} cannot be watched: {problem}")
        chosen |= dict.fromkeys(name for name, problem in problems.items() if not problem)
        skipped |= {name: problem for name, problem in problems.items() if problem}
    if skipped:
        examples = "; ".join(f"{name}: {problem}" for name, problem in [*skipped.items()][:2])
        more = "; ..." if len(skipped) > 2 else ""
        logger.info(f"{flag}: skipped {len(skipped)} layers that cannot be watched ({examples}{more})")
    return list(chosen)


def default_layers(model: nn.Module, head: str, calls: dict[str, _Calls]) -> list[str]:
    """The stem, every block, the layers between stages, and the head: the paper's 41 layers for ConvNeXt Base.

    For a network without known blocks, the children of its plain containers. Normalisation layers, and modules that are
    not called exactly once, are skipped.
    """
    has_blocks = any(isinstance(module, BLOCKS) for module in model.modules())

    def walk(parent: nn.Module, prefix: str) -> Iterable[str]:
        for name, module in parent.named_children():
            within = any(isinstance(inner, BLOCKS) for inner in module.modules())
            opened = within if has_blocks else type(module) in CONTAINERS
            if prefix + name == head or isinstance(module, BLOCKS):
                yield prefix + name
            elif opened:
                yield from walk(module, f"{prefix}{name}.")
            elif next(module.parameters(), None) is not None and not isinstance(module, NORMALISATIONS):
                yield prefix + name

    return [name for name in walk(model, "") if not _problem(calls[name])]


def _channel_axis(module: nn.Module, shape: tuple[int, ...], smaller: tuple[int, ...]) -> int:
    """The channel axis of an output of this shape, 1 or -1; `smaller` is the shape for smaller images, if known.

    In tokens (B, T, C), channels are last. In maps (B, C, H, W) or (B, H, W, C), they are the axis that does not depend
    on the image size; if none or several do not (after pooling, say), the type of module decides.
    """
    if len(shape) < 4:
        return 1 if len(shape) == 2 else -1
    if len(smaller) == len(shape):
        fixed = [axis for axis in range(1, len(shape)) if shape[axis] == smaller[axis]]
        if fixed in ([1], [len(shape) - 1]):
            return 1 if fixed == [1] else -1
    return -1 if isinstance(module, nn.Linear) or type(module) is nn.LayerNorm else 1
