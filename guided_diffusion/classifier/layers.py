"""The layers of a classifier to watch, by default or by choice, and the axis of the channels in their output."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
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

# A block of a residual network or of a transformer; version 2 of Swin's derives from version 1.
BLOCKS = (BasicBlock, Bottleneck, ResBottleneckBlock, CNBlock, MBConv, FusedMBConv, SwinTransformerBlock, EncoderBlock)
CONTAINERS = (nn.Sequential, nn.ModuleList)
NORMALISATIONS = (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True)
class WatchedLayer:
    """A module of a classifier whose output is measured.

    `channel_axis` is the axis of the channels in the output: 1 for maps (B, C, H, W) and logits (B, classes), -1 for
    Swin's maps (B, H, W, C) and ViT's tokens (B, T, C). Where `is_logits`, the output is the classifier's own, and its
    mean and variance are one number over all images and classes.
    """

    name: str  # the module's, with dots: features.1.0
    channel_axis: int
    is_logits: bool
    channels: int


@dataclass
class _Calls:
    """What a module did in a forward pass."""

    number: int = 0
    shape: tuple[int, ...] = ()  # of the output; () where that is no tensor
    storage: int = 0  # the memory of the output


@dataclass
class _DryRun:
    """What all modules did in a forward pass on random images, in the order in which they ended."""

    calls: dict[str, _Calls] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)  # kept, so that no two have the same memory

    def note(self, name: str, _module: nn.Module, _args: tuple, output: Any) -> None:
        """A forward hook."""
        calls = self.calls.setdefault(name, _Calls())
        calls.number += 1
        if isinstance(output, Tensor):
            calls.shape, calls.storage = tuple(output.shape), output.data_ptr()
            self.outputs.append(output)


def _dry_run(model: nn.Module, images: int, size: int) -> _DryRun:
    run = _DryRun()
    hooks = [module.register_forward_hook(partial(run.note, name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            model(torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(0)))
    finally:
        for hook in hooks:
            hook.remove()
    return run


def find_layers(model: nn.Module, size: int, patterns: Sequence[str] = ()) -> tuple[tuple[WatchedLayer, ...], int]:
    """Find the layers to watch, by what two forward passes on random images tell of them.

    Args:
        model: the classifier, in evaluation mode.
        size: side of the images that it takes, in pixels.
        patterns: names of layers, or patterns, where * stands for any characters, dots too; for none, `default_layers`.
            Of the layers that a pattern matches, those that cannot be watched are left out, and named in a message.

    Returns:
        the layers, in the order of the network, and the number of logits.

    Raises:
        UserError: a pattern matches no layer that can be watched, or a layer that was named cannot.
    """
    calls = _dry_run(model, 2, size).calls
    try:  # Only the channels stay as they are where the image's size changes.
        smaller = _dry_run(model, 1, 3 * size // 4).calls
    except Exception:  # of a network that takes images of one size alone: whatever its layers raise
        smaller = {}
    logits = [name for name, module in model.named_modules() if name and calls.get(name, _Calls()).storage]
    logits = [name for name in logits if calls[name].storage == calls[""].storage]
    names = _chosen(model, patterns, calls) if patterns else default_layers(model, logits[0], calls)
    layers = []
    for name in sorted(names, key=list(calls).index):
        axis = _channel_axis(model.get_submodule(name), calls[name].shape, smaller.get(name, _Calls()).shape)
        layers.append(WatchedLayer(name, axis, name in logits, calls[name].shape[axis]))
    return tuple(layers), calls[""].shape[-1]


def _problem(calls: _Calls) -> str:
    """Why a module cannot be watched; "" where it can. The batch of the dry run has two images."""
    if calls.number != 1:
        return f"the network calls it {calls.number} times per image, not once"
    if len(calls.shape) < 2 or calls.shape[0] != 2:
        return "its output is not a tensor with a row per image"
    return ""


def _chosen(model: nn.Module, patterns: Iterable[str], calls: dict[str, _Calls]) -> list[str]:
    """The names of the modules that patterns match and that can be watched; see `find_layers`."""
    names = [name for name, _ in model.named_modules() if name]
    chosen: dict[str, None] = {}
    left_out: dict[str, str] = {}  # and why
    for pattern in patterns:
        matching = fnmatch.filter(names, pattern) if pattern not in names else [pattern]
        if not matching:
            close = difflib.get_close_matches(pattern, names, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"its parts are {', '.join(model._modules)}"
            raise UserError(f"--layers: {pattern} matches no layer of the classifier; {hint}")
        problems = {name: _problem(calls.get(name, _Calls())) for name in matching}
        if all(problems.values()):
            name, problem = next(iter(problems.items()))
            which = f"none of the {len(matching)} layers that {pattern} matches can be watched: " * (name != pattern)
            raise UserError(f"--layers: {which}{name} cannot be watched: {problem}")
        chosen |= dict.fromkeys(name for name, problem in problems.items() if not problem)
        left_out |= {name: problem for name, problem in problems.items() if problem}
    if left_out:
        some = "; ".join(f"{name}: {problem}" for name, problem in [*left_out.items()][:2])
        more = "; ..." if len(left_out) > 2 else ""
        logger.info(f"--layers: {len(left_out)} layers cannot be watched and are left out ({some}{more})")
    return list(chosen)


def default_layers(model: nn.Module, head: str, calls: dict[str, _Calls]) -> list[str]:
    """The stem, every block, what lies between stages, and the head; the paper's 41 layers of a ConvNeXt Base.

    Of a network without blocks of a known kind, the modules that its plain containers are made of. Layers of
    normalisation between the others, and modules that a forward pass does not use once, are left out.
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

    return [name for name in walk(model, "") if not _problem(calls.get(name, _Calls()))]


def _channel_axis(module: nn.Module, shape: tuple[int, ...], smaller: tuple[int, ...]) -> int:
    """The axis of the channels in an output of this shape, 1 or -1; `smaller` is the shape for smaller images, if any.

    Tokens (B, T, C) end with the channels. Of a map (B, C, H, W) or (B, H, W, C), one axis does not change with the
    size of the images. Where that does not tell, as after pooling, the kind of module does.
    """
    if len(shape) < 4:
        return 1 if len(shape) == 2 else -1
    if len(smaller) == len(shape):
        fixed = [axis for axis in range(1, len(shape)) if shape[axis] == smaller[axis]]
        if fixed in ([1], [len(shape) - 1]):
            return 1 if fixed == [1] else -1
    return -1 if isinstance(module, nn.Linear) or type(module) is nn.LayerNorm else 1
