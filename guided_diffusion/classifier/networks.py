"""Image classifiers, torchvision's or the user's own: their weights and preprocessing."""

from __future__ import annotations

import difflib
import http.client
import importlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from .. import dist_util
from ..checkpoints import UNTRAINED
from ..errors import UserError, first_line
from ..runs.settings import weights_digest
from ..system.checkpoint_files import check_finite_weights, difference, read_checkpoint, shapes_of
from .layers import WatchedLayer, find_layers, modules_matching
from .preprocessing import Preprocess, as_preset, named_failures, own_preprocess, trial_image

AUXILIARY_HEADS = ("aux1", "aux2", "AuxLogits")  # of GoogLeNet and Inception


@dataclass
class Classifier:
    """A classifier in evaluation mode, float32, on the CPU, without gradients.

    Attributes:
        name: name in file names.
        model: the network.
        layers: layers to watch.
        preprocess: maps a uint8 image (H, W, 3) to the network's input, float32 (3, S, S), in two steps.
        num_classes: number of logits.
        digest: digest of the weights.
    """

    name: str
    model: nn.Module
    layers: tuple[WatchedLayer, ...]
    preprocess: Preprocess
    num_classes: int
    digest: str


def load_classifier(
    classifier_name: str = "convnext_base", classifier_path: str = ""
) -> tuple[nn.Module, Callable[[Tensor], Tensor], list[str]]:
    """Load a torchvision classifier as the released experiment does; our scripts use `open_classifier`.

    Args:
        classifier_name, classifier_path: `name` and `classifier_path` of `open_classifier`.

    Returns:
        the network, in evaluation mode on this process's device, without gradients;
        the preprocessing, which maps images in [-1, 1], (3, H, W) or (B, 3, H, W), to the network's input;
        the names of the layers to watch, as in `named_modules`.

    Raises UserError as `open_classifier` does, and for the user's own networks.
    """
    if ":" in classifier_name:
        raise UserError(f"load_classifier: found {classifier_name!r}, expected a classifier of torchvision")
    classifier = open_classifier(classifier_name, classifier_path)
    preset = _weights_of(classifier_name, classifier_path).transforms()
    names = [layer.name for layer in classifier.layers]
    return classifier.model.to(dist_util.dev()), lambda images: preset((images + 1) / 2), names


def open_classifier(
    name: str,
    classifier_path: str = "",
    layers: Sequence[str] = (),
    image_size: int = 256,
    flag: str = "--layers",
    others: Sequence[str] = (),
) -> Classifier:
    """Load a classifier of torchvision, or the user's own.

    Images for a torchvision classifier are preprocessed as for the torchvision weights with the file name of
    `classifier_path`, or else the default weights. As for torchvision's published accuracies, Pillow resizes them.

    Args:
        name: torchvision's name, such as convnext_base; or "package.module:function" for a function that returns
            (network, preprocess), where preprocess maps a uint8 image (H, W, 3) to the input, float (3, S, S).
        classifier_path: file of the state dict, with any number of classes. "": torchvision's default weights, from
            torch.hub's folder or downloaded into it, or the user's network as returned. "untrained": random weights,
            always the same.
        layers: layers to watch; see `find_layers`.
        image_size: side of the images before preprocessing, in pixels.
        flag, others: flag that selected the layers, and its other values, for messages.

    Raises UserError if the classifier, the file or a layer does not exist, a layer cannot be watched, or the user's
    function, network or preprocess fails.
    """
    if not classifier_path:
        check_before_download(name, layers, flag, others)
    model, preprocess = (_custom if ":" in name else _from_torchvision)(name, classifier_path)
    model.eval().requires_grad_(False)
    what = f"--classifier_name {name}"
    x = preprocess(trial_image(image_size))
    if ":" in name:
        try_network(model, x, what)
    watched, num_classes = find_layers(model, x.shape[-1], layers, flag, others, what)
    return Classifier(name.rpartition(":")[2], model, watched, preprocess, num_classes, weights_digest(model))


def check_before_download(
    name: str, patterns: Sequence[str], flag: str = "--layers", others: Sequence[str] = ()
) -> None:
    """Raise UserError if a pattern matches no layer of a classifier of torchvision whose weights are not here yet.

    Arguments as for `open_classifier`.
    """
    if ":" in name or not patterns or os.path.exists(_cache_path(weights := _weights_of(name, ""))):
        return
    with torch.device("meta"):  # without memory, in no time
        model = _build(name, weights)
    for pattern in patterns:
        modules_matching(model, pattern, flag, others)


def _from_torchvision(name: str, path: str) -> tuple[nn.Module, Preprocess]:
    weights = _weights_of(name, path)
    if path == UNTRAINED:
        model = _build(name, weights)
    else:
        model = _with_weights_of(name, weights, path or _cached_file(name, weights))
    return model, as_preset(weights.transforms())


def _custom(name: str, path: str) -> tuple[nn.Module, Preprocess]:
    """The result of the user's function, with the weights of the file if there is one."""
    pair = call_function(name, "--classifier_name")
    if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], nn.Module) and callable(pair[1])):
        raise UserError(f"--classifier_name {name} returned {type(pair).__name__}; expected (network, preprocess)")
    model, preprocess = pair
    what = f"--classifier_name {name}"
    load_weights(model, path, what)
    return model, own_preprocess(preprocess, what)


def call_function(name: str, flag: str) -> Any:
    """The result of a function of the user's, package.module:function; random weights are always the same.

    Raises UserError, naming `flag`, if the function does not exist or fails.
    """
    module, _, function = name.partition(":")
    try:
        create = getattr(importlib.import_module(module), function)
    except Exception as error:  # of the module itself, too
        raise UserError(
            f"{flag} {name!r} cannot be found: {first_line(error)}.\n"
            "Expected package.module:function, in a module that Python can import"
        ) from error
    with torch.random.fork_rng(devices=[]), named_failures(f"{flag} {name}"):
        torch.manual_seed(0)
        return create()


def try_network(model: nn.Module, x: Tensor, what: str) -> Any:
    """The output of the user's network `what` for one preprocessed image. Raises UserError if it fails."""
    with torch.no_grad(), named_failures(f"the network of {what}, for an input {[1, *x.shape]},"):
        return model.eval()(x[None])


# Weights


def load_weights(model: nn.Module, path: str, what: str) -> None:
    """Load the weights in a file, if `path` names one. Raises UserError if they do not fit the network `what`."""
    if path not in ("", UNTRAINED):
        _load(model, _read(path, model), path, what)


def _weights_of(name: str, path: str) -> Any:
    """torchvision's weights with this file name, or else the default ones. Raises UserError if there is no `name`."""
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        close = difflib.get_close_matches(name.lower(), known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "expected a name such as convnext_base or resnet50"
        raise UserError(f"--classifier_name {name!r} is not in torchvision {torchvision.__version__}; {hint}")
    entries = torchvision.models.get_model_weights(name)
    file = os.path.basename(path)
    return next((entry for entry in entries if os.path.basename(entry.url) == file), entries.DEFAULT)


def _cache_path(weights: Any) -> str:
    """Where torch.hub keeps torchvision's file."""
    return os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(weights.url))


def _cached_file(name: str, weights: Any) -> str:
    """Path of torchvision's file, downloaded (whole or not at all) if it is not in torch.hub's folder."""
    path = _cache_path(weights)
    folder = os.path.dirname(path)
    if not os.path.exists(path):
        try:
            weights.get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise UserError(
                f"the weights of {name} cannot be downloaded: {first_line(error)}. Download {weights.url}\n"
                f"on another computer, and put the file into {folder} or give its path with --classifier_path"
            ) from error
    return path


def _build(name: str, weights: Any, num_classes: int = 1000) -> nn.Module:
    """The network for torchvision's `weights`, with random weights that are always the same."""
    options: dict[str, Any] = {"num_classes": num_classes}
    if name in ("googlenet", "inception_v3"):  # weights from TensorFlow, for another range of pixels
        options |= {"transform_input": True, "init_weights": False}
    if name.startswith("vit_"):
        options["image_size"] = weights.meta["min_size"][0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torchvision.models.get_model(name, weights=None, **options)


def _with_weights_of(name: str, weights: Any, path: str) -> nn.Module:
    """The network with the weights in the file `path`, and as many classes as they have."""
    model = _build(name, weights)
    found = _read(path, model)
    if name.startswith("densenet"):  # published files have norm.1 for norm1
        for old in list(found):
            found[re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d\.)", r"\1\2", old)] = found.pop(old)
    head = [entry for entry, w in model.named_parameters() if w.ndim > 1][-1]
    if head in found and found[head].ndim > 1 and found[head].shape[0] != model.state_dict()[head].shape[0]:
        model = _build(name, weights, found[head].shape[0])
    for auxiliary in AUXILIARY_HEADS:  # used only in training
        if hasattr(model, auxiliary) and not any(entry.startswith(f"{auxiliary}.") for entry in found):
            setattr(model, auxiliary, None)
    _load(model, found, path, f"--classifier_name {name}")
    return model


def _read(path: str, model: nn.Module) -> dict[str, Tensor]:
    """The state dict in a file, in float32."""
    options = {"map_location": "cpu", "weights_only": True}
    found = read_checkpoint(path, "--classifier_path", options, shapes_of(model.state_dict()))
    for entry, w in found.items():  # in place, to keep the version that a state dict may have as an attribute
        found[entry] = w.float() if w.is_floating_point() else w
    return found


def _load(model: nn.Module, found: dict[str, Tensor], path: str, what: str) -> None:
    """Load the weights `found` in a file into the network `what`. Raises UserError if they do not fit."""
    shapes, expected = shapes_of(found), shapes_of(model.state_dict())
    problem = ""
    try:
        if any(model.load_state_dict(found, strict=False, assign=True)):  # missing or unexpected names
            problem = "other names"
    except (RuntimeError, ValueError) as error:  # other shapes, or another version than the network needs
        problem = " ".join(str(error).split())[:300]
    if problem:
        problem = difference(shapes, expected) or problem
        raise UserError(f"--classifier_path {path} does not fit {what}: {problem}")
    # Not of all entries: a buffer may contain -inf, such as the mask of an attention layer.
    check_finite_weights(dict(model.named_parameters()), f"--classifier_path {path}")
