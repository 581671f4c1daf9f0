"""torchvision's image classifiers by name: their weights, their preprocessing, and the layers to watch."""

from __future__ import annotations

import difflib
import fnmatch
import http.client
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.models.convnext import CNBlock
from torchvision.models.efficientnet import FusedMBConv, MBConv
from torchvision.models.regnet import ResBottleneckBlock
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.swin_transformer import SwinTransformerBlock
from torchvision.models.vision_transformer import EncoderBlock

from .checkpoint_file import read_checkpoint
from .checkpoints import UNTRAINED, shapes_of
from .errors import UserError, first_line
from .run_record import weights_digest

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
class Classifier:
    """A classifier, ready for use: in float32 on the CPU, in evaluation mode, without gradients.

    `preprocess` makes of a uint8 image (H, W, 3) the network's input, float32 (3, S, S). `num_classes` is the number of
    logits, `digest` that of the weights.
    """

    name: str
    model: nn.Module
    layers: tuple[WatchedLayer, ...]
    preprocess: Callable[[np.ndarray], Tensor]
    num_classes: int
    digest: str


def load_classifier(name: str, classifier_path: str = "", layers: Sequence[str] = ()) -> Classifier:
    """Load a classifier of torchvision.

    Args:
        name: torchvision's name for it, such as convnext_base.
        classifier_path: file of its state dict, for 1000 classes or another number. Without one, torchvision's weights
            are taken from torch.hub's folder or downloaded into it. "untrained": random weights, always the same.
        layers: the layers to watch, by name or pattern, where * stands for any characters, dots too; for none,
            `default_layers`.

    The preprocessing is that of torchvision's file of the same name as `classifier_path`'s, else that of the default
    weights. It is applied to a Pillow image, as it was where torchvision's accuracies come from.

    Raises UserError where there is no such classifier, file or layer, or a layer cannot be watched.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        close = difflib.get_close_matches(name.lower(), known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "expected one such as convnext_base or resnet50"
        raise UserError(f"--classifier_name is {name!r}, which torchvision {torchvision.__version__} lacks; {hint}")
    weights = _weights_of(name, classifier_path)
    if classifier_path == UNTRAINED:
        model = _build(name, weights)
    else:
        model = _with_weights_of(name, weights, classifier_path or _cached_file(name, weights))
    model.eval().requires_grad_(False)
    preset = weights.transforms()
    watched, num_classes = _watched(model, preset.crop_size[0], layers)
    return Classifier(name, model, watched, partial(_preprocess, preset), num_classes, weights_digest(model))


def _preprocess(preset: Callable[[Image.Image], Tensor], image: np.ndarray) -> Tensor:
    return preset(Image.fromarray(image))


# Weights


def _weights_of(name: str, path: str) -> Any:
    """torchvision's entry for the file of this name; the default one where there is none."""
    entries = torchvision.models.get_model_weights(name)
    return next((entry for entry in entries if _file_of(entry) == os.path.basename(path)), entries.DEFAULT)


def _file_of(weights: Any) -> str:
    return weights.url.rpartition("/")[2]


def _cached_file(name: str, weights: Any) -> str:
    """torchvision's file, downloaded, whole or not at all, where torch.hub's folder does not have it."""
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    path = os.path.join(folder, _file_of(weights))
    if not os.path.exists(path):
        try:
            weights.get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise UserError(
                f"the weights of {name} cannot be downloaded: {first_line(error)}. Fetch {weights.url}\n"
                f"where there is a network; put the file into {folder}, or name it with --classifier_path"
            ) from error
    return path


def _build(name: str, weights: Any, num_classes: int = 1000) -> nn.Module:
    """The network that fits torchvision's `weights`, with random ones, the same every time."""
    options: dict[str, Any] = {"num_classes": num_classes}
    if name in ("googlenet", "inception_v3"):  # both were trained elsewhere, on images of another range
        options |= {"transform_input": True, "init_weights": False}
    if name.startswith("vit_"):
        options["image_size"] = weights.meta["min_size"][0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torchvision.models.get_model(name, weights=None, **options)


def _with_weights_of(name: str, weights: Any, path: str) -> nn.Module:
    """The network with the weights in the file `path`, for as many classes as its head has."""
    found = read_checkpoint(path, "--classifier_path", {"map_location": "cpu", "weights_only": True})
    if name.startswith("densenet"):  # whose published files have names with a dot more: norm.1 for norm1
        for old in list(found):
            found[re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d\.)", r"\1\2", old)] = found.pop(old)
    model = _build(name, weights)
    head = [entry for entry, w in model.named_parameters() if w.ndim > 1][-1]
    if head in found and found[head].ndim > 1 and found[head].shape[0] != model.state_dict()[head].shape[0]:
        model = _build(name, weights, found[head].shape[0])
    if difference := _difference(shapes_of(found), shapes_of(model.state_dict())):
        raise UserError(f"--classifier_path {path} does not fit --classifier_name {name}: {difference}")
    for entry, w in found.items():  # in place: a state dict may have a version, which some networks ask for
        found[entry] = w.float() if w.is_floating_point() else w
    model.load_state_dict(found, assign=True)
    return model


def _difference(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> str:
    """A line on how a file's names and shapes differ from the network's; "" where they do not."""
    missing, besides = ([name for name in a if name not in b] for a, b in ((expected, found), (found, expected)))
    if missing or besides:
        counts = f"it lacks {len(missing)} of {len(expected)} weights and has {len(besides)} besides"
        return f"{counts}\n(the first: {missing[0] if missing else besides[0]})"
    wrong = [name for name in expected if found[name] != expected[name]]
    if not wrong:
        return ""
    shapes = f"{wrong[0]} has shape {list(found[wrong[0]])}, and not {list(expected[wrong[0]])}"
    return f"{shapes}\n({len(wrong)} of {len(expected)} weights have other shapes)"


# Layers


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


def _watched(model: nn.Module, size: int, patterns: Sequence[str]) -> tuple[tuple[WatchedLayer, ...], int]:
    """The layers to watch, in the order of the network, with what two forward passes tell; and the number of logits."""
    calls = _dry_run(model, 2, size).calls
    try:  # Only the channels stay as they are where the image's size changes.
        smaller = _dry_run(model, 1, 3 * size // 4).calls
    except Exception:  # of a network that takes images of one size alone: whatever its layers raise
        smaller = {}
    logits = [name for name, module in model.named_modules() if name and calls.get(name, _Calls()).storage]
    logits = [name for name in logits if calls[name].storage == calls[""].storage]
    names = _chosen(model, patterns) if patterns else default_layers(model, logits[0], calls)
    for name in names:
        if problem := _problem(calls.get(name, _Calls())):
            raise UserError(f"--layers: {name} cannot be watched: {problem}")
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


def _chosen(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """The names of the modules that patterns match. Raises UserError for one that matches nothing."""
    names = [name for name, _ in model.named_modules() if name]
    chosen: dict[str, None] = {}
    for pattern in patterns:
        matching = fnmatch.filter(names, pattern) if pattern not in names else [pattern]
        if not matching:
            close = difflib.get_close_matches(pattern, names, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"its parts are {', '.join(model._modules)}"
            raise UserError(f"--layers: {pattern} matches no layer of the classifier; {hint}")
        chosen |= dict.fromkeys(matching)
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
