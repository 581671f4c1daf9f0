"""Image classifiers by name, torchvision's or one's own: their weights and their preprocessing."""

from __future__ import annotations

import difflib
import http.client
import importlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from .. import dist_util
from ..checkpoints import UNTRAINED
from ..errors import UserError, first_line
from ..runs.settings import weights_digest
from ..system.checkpoint_files import difference, read_checkpoint, shapes_of
from .layers import WatchedLayer, find_layers

AUXILIARY_HEADS = ("aux1", "aux2", "AuxLogits")  # of GoogLeNet and Inception

Preprocess = Callable[[np.ndarray], Tensor]


@dataclass
class Classifier:
    """A classifier, ready for use: in float32 on the CPU, in evaluation mode, without gradients.

    `preprocess` makes of a uint8 image (H, W, 3) the network's input, float32 (3, S, S). `num_classes` is the number of
    logits, `digest` that of the weights.
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
    """A classifier of torchvision as the released experiment loads it; `open_classifier` is what our scripts use.

    Args:
        classifier_name, classifier_path: as `name` and `classifier_path` of `open_classifier`.

    Returns:
        the network, on this process's device, in evaluation mode and without gradients;
        the preprocessing, which makes of images in [-1, 1], (3, H, W) or (B, 3, H, W), the network's input;
        the names of the layers to watch, by which `named_modules` knows them.

    Raises UserError as `open_classifier`, and for a network of one's own, whose preprocessing takes no such images.
    """
    if ":" in classifier_name:
        raise UserError(f"load_classifier: found {classifier_name!r}, expected a classifier of torchvision")
    classifier = open_classifier(classifier_name, classifier_path)
    preset = _weights_of(classifier_name, classifier_path).transforms()
    names = [layer.name for layer in classifier.layers]
    return classifier.model.to(dist_util.dev()), partial(_preprocess_tensor, preset), names


def _preprocess_tensor(preset: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return preset((images + 1) / 2)


def open_classifier(
    name: str, classifier_path: str = "", layers: Sequence[str] = (), image_size: int = 256
) -> Classifier:
    """Load a classifier of torchvision, or one's own.

    Args:
        name: torchvision's name for it, such as convnext_base; or "package.module:function", where the function returns
            (network, preprocess): an nn.Module, and what makes of a uint8 image (H, W, 3) its input, float (3, S, S).
        classifier_path: file of its state dict; torchvision's may have another number of classes than 1000. Without
            one, torchvision's weights are taken from torch.hub's folder or downloaded into it, and one's own network is
            taken as it was returned. "untrained": random weights, always the same.
        layers: the layers to watch; see `find_layers`.
        image_size: side of the images before preprocessing, in pixels.

    The preprocessing of a torchvision classifier is that of torchvision's file of the same name as `classifier_path`'s,
    else that of the default weights. It is applied to a Pillow image, as it was where torchvision's accuracies come
    from.

    Raises UserError where there is no such classifier, file or layer, or a layer cannot be watched.
    """
    model, preprocess = (_own if ":" in name else _of_torchvision)(name, classifier_path)
    model.eval().requires_grad_(False)
    size = preprocess(np.zeros((image_size, image_size, 3), np.uint8)).shape[-1]
    watched, num_classes = find_layers(model, size, layers)
    return Classifier(name.rpartition(":")[2], model, watched, preprocess, num_classes, weights_digest(model))


def _of_torchvision(name: str, path: str) -> tuple[nn.Module, Preprocess]:
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        close = difflib.get_close_matches(name.lower(), known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "expected one such as convnext_base or resnet50"
        raise UserError(f"--classifier_name is {name!r}, which torchvision {torchvision.__version__} lacks; {hint}")
    weights = _weights_of(name, path)
    if path == UNTRAINED:
        model = _build(name, weights)
    else:
        model = _with_weights_of(name, weights, path or _cached_file(name, weights))
    return model, partial(_preprocess, weights.transforms())


def _preprocess(preset: Callable[[Image.Image], Tensor], image: np.ndarray) -> Tensor:
    return preset(Image.fromarray(image))


def _own(name: str, path: str) -> tuple[nn.Module, Preprocess]:
    """What the user's function returns, with the weights of the file where there is one."""
    module, _, function = name.partition(":")
    try:
        create = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"--classifier_name is {name!r}, which cannot be found: {first_line(error)}.\n"
            "Expected package.module:function, of a module that Python can import"
        ) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = create()
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module) and callable(made[1])):
        raise UserError(
            f"--classifier_name {name} returned {type(made).__name__}; expected a function that returns (network, "
            "preprocess)"
        )
    model, preprocess = made
    if path not in ("", UNTRAINED):
        _load(model, _read(path, model), path, name)
    return model, preprocess


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
    model = _build(name, weights)
    found = _read(path, model)
    if name.startswith("densenet"):  # whose published files have names with a dot more: norm.1 for norm1
        for old in list(found):
            found[re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d\.)", r"\1\2", old)] = found.pop(old)
    head = [entry for entry, w in model.named_parameters() if w.ndim > 1][-1]
    if head in found and found[head].ndim > 1 and found[head].shape[0] != model.state_dict()[head].shape[0]:
        model = _build(name, weights, found[head].shape[0])
    for auxiliary in AUXILIARY_HEADS:  # used in training alone
        if hasattr(model, auxiliary) and not any(entry.startswith(f"{auxiliary}.") for entry in found):
            setattr(model, auxiliary, None)
    _load(model, found, path, name)
    return model


def _read(path: str, model: nn.Module) -> dict[str, Tensor]:
    """The state dict in a file, in float32."""
    options = {"map_location": "cpu", "weights_only": True}
    found = read_checkpoint(path, "--classifier_path", options, shapes_of(model.state_dict()))
    for entry, w in found.items():  # in place: a state dict may have a version, which some networks ask for
        found[entry] = w.float() if w.is_floating_point() else w
    return found


def _load(model: nn.Module, found: dict[str, Tensor], path: str, name: str) -> None:
    """Give a network the weights `found` in a file. Raises UserError if PyTorch does not take them."""
    shapes, expected = shapes_of(found), shapes_of(model.state_dict())
    refusal = ""
    try:
        lacks, besides = model.load_state_dict(found, strict=False, assign=True)
    except (RuntimeError, ValueError) as error:  # the shapes, or a version that a network needs
        lacks, besides, refusal = [], [], " ".join(str(error).split())[:300]
    if lacks or besides or refusal:
        problem = difference(shapes, expected) or refusal
        raise UserError(f"--classifier_path {path} does not fit --classifier_name {name}: {problem}")
