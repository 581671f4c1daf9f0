"""The image network of CLIP ViT-B/32, through open_clip (extra "clip").

Source: Radford et al., "Learning transferable visual models from natural language supervision", ICML 2021,
arXiv:2103.00020. OpenAI's weights, and a few others, need the activation x sigmoid(1.702 x), QuickGELU, instead of
GELU. Weights load into either network: with the wrong activation, the features are wrong, without an error.
"""

from __future__ import annotations

import logging
import warnings
import zipfile
from types import ModuleType

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..checkpoints import UNTRAINED
from ..classifier.preprocessing import Preprocess
from ..errors import UserError, first_line
from ..system.checkpoint_files import check_finite_weights, difference, read_checkpoint, shapes_of
from ..system.files import is_remote

NAME = "ViT-B-32"
QUICK_NAME = "ViT-B-32-quickgelu"
LAST_BLOCK = "transformer.resblocks.11"  # its output is not normalised yet
OPENAI = "openai"
OPENAI_ENTRIES = {"input_resolution", "context_length", "vocab_size"}  # only in OpenAI's own files


def open_clip_visual(weights: str = "", path: str = "") -> tuple[nn.Module, Preprocess, str]:
    """The image network of CLIP, on the CPU in float32, without gradients.

    Args:
        weights: open_clip's name of the weights, such as openai or laion2b_s34b_b79k, which determines the activation.
            "": openai; with a file, the file must be OpenAI's own.
        path: file of weights: OpenAI's TorchScript program, or a state dict of all of CLIP with OpenAI's or open_clip's
            names. "": downloaded. "untrained": random weights, always the same.

    Returns:
        the network, whose block `LAST_BLOCK` gives (B, 1 + 49, 768); its preprocessing of uint8 images (H, W, 3); and
        the name of its activation.

    Raises UserError if open_clip is not installed, or the weights do not exist or do not fit.
    """
    open_clip = _import()
    found, model = None, None
    if path not in ("", UNTRAINED):
        model = _build(open_clip, QUICK_NAME)
        found, is_openai = _read(path, shapes_of(model.state_dict()))
        weights = _name_of(weights, path, is_openai)
    weights = weights or OPENAI
    quick = _needs_quick_gelu(open_clip, weights)
    name = QUICK_NAME if quick else NAME
    if not path:
        model = _download(open_clip, name, weights)
    elif model is None or not quick:
        model = _build(open_clip, name)
    if found is not None:
        _load(model.visual, found, path)
    visual = model.visual.eval().requires_grad_(False)
    config = open_clip.get_pretrained_cfg(NAME, weights)
    transform = open_clip.image_transform(
        visual.image_size, is_train=False, mean=config["mean"], std=config["std"], interpolation=config["interpolation"]
    )
    preprocess = Preprocess(lambda image: transform(Image.fromarray(np.asarray(image))))
    return visual, preprocess, "QuickGELU" if quick else "GELU"


def _import() -> ModuleType:
    try:
        import open_clip  # here because it is an optional package, which takes seconds to import
    except ImportError as error:
        raise UserError(f'--tokens clip needs open_clip ({first_line(error)}): pip install -e ".[clip]"') from error
    return open_clip


def _build(open_clip: ModuleType, name: str) -> nn.Module:
    """CLIP with random weights, always the same."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # open_clip warns that there are no weights
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return open_clip.create_model(name, pretrained=None)
    finally:
        logging.disable(disabled)


def _needs_quick_gelu(open_clip: ModuleType, weights: str) -> bool:
    """Whether weights were trained with QuickGELU, by open_clip's list. Raises UserError if it does not have them."""
    config = open_clip.get_pretrained_cfg(NAME, weights)
    if not config:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(NAME))
        raise UserError(f"--clip_weights {weights!r} is not known to open_clip for {NAME}; it knows {known}")
    return bool(config.get("quick_gelu", False))


def _name_of(weights: str, path: str, is_openai: bool) -> str:
    """The name of the weights in a file. Raises UserError if it contradicts the file, or is needed and missing."""
    if is_openai and weights not in ("", OPENAI):
        raise UserError(f"--classifier_path {path} is OpenAI's own file, but --clip_weights is {weights}")
    if not is_openai and not weights:
        raise UserError(
            f"--classifier_path {path} does not say how it was trained, and so which activation it needs.\n"
            "Add open_clip's name of these weights: --clip_weights openai, or laion2b_s34b_b79k, ..."
        )
    return weights or OPENAI


def _read(path: str, expected: dict[str, tuple[int, ...]]) -> tuple[dict[str, Tensor], bool]:
    """The state dict in a file, and whether the file is in OpenAI's own format. Raises UserError."""
    if _is_torchscript(path):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # newer versions of PyTorch advise against TorchScript
                state = torch.jit.load(path, map_location="cpu").state_dict()
        except RuntimeError as error:
            raise UserError(f"--classifier_path {path} cannot be loaded: {first_line(error)}") from error
        return state, True
    state = read_checkpoint(path, "--classifier_path", {"map_location": "cpu", "weights_only": True}, expected)
    return state, state.keys() >= OPENAI_ENTRIES


def _load(visual: nn.Module, found: dict[str, Tensor], path: str) -> None:
    """Load the weights of the image network. Raises UserError if they do not fit."""
    of_images = {entry.removeprefix("visual."): w for entry, w in found.items() if entry.startswith("visual.")}
    if problem := difference(shapes_of(of_images), shapes_of(visual.state_dict())):
        raise UserError(f"--classifier_path {path} is not CLIP {NAME} (--tokens clip): {problem}")
    visual.load_state_dict({entry: w.float() for entry, w in of_images.items()})
    check_finite_weights(dict(visual.named_parameters()), f"--classifier_path {path}")


def _is_torchscript(path: str) -> bool:
    """Whether a local file is a TorchScript program: a zip archive with code."""
    if is_remote(path) or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _download(open_clip: ModuleType, name: str, weights: str) -> nn.Module:
    """CLIP with the weights of this name, from open_clip's cache or downloaded into it."""
    try:
        return open_clip.create_model(name, pretrained=weights)
    except Exception as error:  # depends on the network and the hub
        raise UserError(
            f"the weights {weights} of CLIP cannot be downloaded: {first_line(error)}.\n"
            "Download them on another computer, and give the file with --classifier_path (and --clip_weights)"
        ) from error
