"""Tokens: the parts of an image whose changes are measured, pixels or positions in a network.

The change of token i is |x_i - y_i|, the norm over channels of the difference between the features of a start and of
its sample; for networks, divided by the root of the number of channels.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import dist_util
from ..classifier.layers import find_layers
from ..classifier.networks import call_function, load_weights, open_classifier, try_network
from ..classifier.preprocessing import Preprocess, own_preprocess, trial_image
from ..classifier.results import name_in_files, prepare
from ..correlations import GridPairs, Pairs, TablePairs
from ..errors import UserError, first_line
from ..runs.settings import digest_of, weights_digest
from .clip import LAST_BLOCK, open_clip_visual

PIXELS, CLIP = "pixels", "clip"


@dataclass
class Tokens:
    """A map from images to features at positions.

    Attributes:
        name: name in file names.
        model: network, in evaluation mode.
        preprocess: maps a uint8 image (H, W, 3) to the network's input, float32, in two steps.
        layer: module whose output has the features; "": the network's own output.
        channel_axis: axis of the channels in that output, 1 or -1.
        digest: digest of the weights.
        scaled: whether changes are divided by the root of the number of channels.
        table: distances of all pairs of tokens, (n, n); None: Euclidean, on a grid.
        shape: (h, w) of a grid, (n,) with a table.
        overwritten: whether the network changes the layer's output in place afterwards. Results of versions that then
            measured the changed output must not count as done.
    """

    name: str
    model: nn.Module
    preprocess: Preprocess
    layer: str
    channel_axis: int
    digest: str
    scaled: bool = True
    table: np.ndarray | None = None
    shape: tuple[int, ...] = ()
    overwritten: bool = False
    _caught: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model.eval().requires_grad_(False)
        self.model.get_submodule(self.layer).register_forward_hook(self._catch)

    def _catch(self, _module: nn.Module, _args: tuple, output: Any) -> None:
        # A copy: layers that work in place, such as nn.ReLU(inplace=True), overwrite the output of the one before.
        self._caught.append((output.clone() if isinstance(output, Tensor) else output, output))

    def find_shape(self, image_size: int) -> None:
        """Set `shape` for images of this size, and `overwritten`.

        Raises UserError if there are fewer than two positions, or their distances are none.
        """
        x = self.preprocess(trial_image(image_size))
        self.shape = tuple(self._of_batch(x[None]).shape[1:-1])
        copied, output = self._caught.pop()
        self.overwritten = not torch.equal(copied, output)
        if math.prod(self.shape) < 2:
            raise UserError(f"{self._what()} has one position only, expected two or more (--tokens)")
        if self.table is not None and self.table.shape != (*self.shape, *self.shape):
            raise UserError(
                f"{self._what()} has {self.shape[0]} tokens, and a table of distances of shape {self.table.shape}"
            )
        try:
            self.pairs()
        except UserError as error:
            raise UserError(f"{self._what()}: {error}") from error

    def features(self, x: Tensor) -> Tensor:
        """Features (B, h, w, channels), or (B, n, channels) with a table, float32, of preprocessed images (B, ...).

        Raises UserError if the grid is not `shape`.
        """
        found = self._of_batch(x)
        self._caught.clear()  # frees memory
        if found.shape[1:-1] != self.shape:
            raise UserError(
                f"{self._what()} has a grid of {tuple(found.shape[1:-1])}, expected {self.shape} (--tokens)"
            )
        return found

    def changes(self, difference: Tensor) -> Tensor:
        """The changes (B, n) of differences of features (B, ..., channels)."""
        norms = torch.linalg.vector_norm(difference, dim=-1).flatten(1)
        return norms / math.sqrt(difference.shape[-1]) if self.scaled else norms

    def pairs(self) -> Pairs:
        """All pairs of tokens, by distance."""
        return GridPairs(*self.shape) if self.table is None else TablePairs(self.table)

    def _of_batch(self, x: Tensor) -> Tensor:
        self._caught.clear()
        self.model(x)
        output, _ = self._caught[-1]
        if not isinstance(output, Tensor) or not 3 <= output.ndim <= 4 or len(output) != len(x):
            shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise UserError(
                f"{self._what()} has no positions: its output is {shape}, expected a map or tokens (--tokens)"
            )
        output = output.float().movedim(self.channel_axis, -1)
        if self.table is not None:
            return output.flatten(1, -2)
        return output if output.ndim == 4 else self._on_grid(output)

    def _on_grid(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T, channels) as (B, h, h, channels), without a class token, which comes first."""
        count = tokens.shape[1]
        for number in (count, count - 1):
            side = math.isqrt(number)
            if side * side == number:
                return tokens[:, count - number :].unflatten(1, (side, side))
        raise UserError(
            f"{self._what()} has {count} tokens: expected a square grid, possibly with a class token (--tokens)"
        )

    def _what(self) -> str:
        return f"the layer {self.layer}" if self.layer else f"the network of --tokens {self.name}"


def open_tokens(args: argparse.Namespace) -> tuple[Tokens, AbstractContextManager, dict[str, Any]]:
    """Load the tokens of the flags onto this rank's device. All ranks must call this.

    Args:
        args: flags tokens, classifier_name, classifier_path, clip_weights, classifier_use_fp16, image_size and
            num_threads.

    Returns:
        the tokens, the context in which to call `features`, and the properties of the machine, as `results.set_up`.

    Raises UserError if they do not exist, do not fit the weights, or have no positions.
    """
    if not args.classifier_path and args.tokens != PIXELS and dist_util.get_world_size() > 1:
        dist_util.on_main(lambda: bool(load_tokens(args)))  # only one rank downloads the weights
    tokens = dist_util.on_every_rank(load_tokens, args)
    autocast, machine = prepare(tokens.model, args)
    return tokens, autocast, machine


def load_tokens(args: argparse.Namespace) -> Tokens:
    """The tokens of the flags, on the CPU; see `open_tokens`."""
    kinds = {PIXELS: pixel_tokens, CLIP: clip_tokens}
    kind = kinds.get(args.tokens) or (custom_tokens if ":" in args.tokens else layer_tokens)
    tokens = kind(args)
    with torch.inference_mode():
        tokens.find_shape(args.image_size)
    return tokens


def pixel_tokens(_args: argparse.Namespace) -> Tokens:
    """Pixels: RGB in [-1, 1], and the norm of its change."""
    return Tokens(
        name=PIXELS,
        model=nn.Identity(),
        preprocess=Preprocess(torch.from_numpy, _centred),
        layer="",
        channel_axis=-1,
        digest=PIXELS,
        scaled=False,
    )


def _centred(x: Tensor) -> Tensor:
    """`images.io.to_float` of uint8, on any device with the same bytes (CUDA divides by a number in another way)."""
    return x.float() / torch.full((), 127.5, device=x.device) - 1


def layer_tokens(args: argparse.Namespace) -> Tokens:
    """The positions of one layer of a classifier."""
    classifier = open_classifier(
        args.classifier_name, args.classifier_path, [args.tokens], args.image_size, "--tokens", [PIXELS, CLIP]
    )
    if len(classifier.layers) > 1:
        names = [layer.name for layer in classifier.layers]
        raise UserError(f"--tokens {args.tokens} matches {len(names)} layers, {_some(names)}; expected one")
    (layer,) = classifier.layers
    return Tokens(
        name=f"{classifier.name}-{layer.name}",
        model=classifier.model,
        preprocess=classifier.preprocess,
        layer=layer.name,
        channel_axis=layer.channel_axis,
        digest=classifier.digest,
    )


def clip_tokens(args: argparse.Namespace) -> Tokens:
    """The 7 x 7 patches of CLIP ViT-B/32: the output of the last block, before the final normalisation."""
    model, preprocess, activation = open_clip_visual(args.clip_weights, args.classifier_path)
    size = preprocess(trial_image(args.image_size)).shape[-1]
    ((layer,), _) = find_layers(model, size, [LAST_BLOCK], "--tokens clip", what="--tokens clip")
    return Tokens(
        name=CLIP,
        model=model,
        preprocess=preprocess,
        layer=layer.name,
        channel_axis=layer.channel_axis,
        digest=digest_of([weights_digest(model), activation]),
    )


def custom_tokens(args: argparse.Namespace) -> Tokens:
    """The output of a network of the user's own.

    --tokens package.module:function names a function that returns (network, preprocess), as for --classifier_name. The
    network's output is a map (B, channels, h, w) or tokens (B, n, channels). If the function returns a third value, it
    is the distances of all pairs of tokens, (n, n); otherwise the tokens are on a square grid.
    """
    found = call_function(args.tokens, "--tokens")
    number = len(found) if isinstance(found, tuple) else 0
    if number not in (2, 3) or not isinstance(found[0], nn.Module) or not callable(found[1]):
        raise UserError(
            f"--tokens {args.tokens} returned {type(found).__name__}; expected (network, preprocess) or (network, "
            "preprocess, distances)"
        )
    model, preprocess, table = (*found, None)[:3]
    what = f"--tokens {args.tokens}"
    load_weights(model, args.classifier_path, what)
    preprocess = own_preprocess(preprocess, what, of_images=False)  # a network of tokens may take anything
    output = try_network(model, preprocess(trial_image(args.image_size)), what)
    axis = 1 if getattr(output, "ndim", 0) == 4 else -1
    try:
        table = None if table is None else np.asarray(table)
    except Exception as error:  # rows of different lengths, or whatever the object raises
        raise UserError(f"{what}: the distances are no array: {first_line(error)}") from error
    parts = [weights_digest(model), "" if table is None else digest_of(map(str, table.reshape(-1).tolist()))]
    return Tokens(
        name=name_in_files(args.tokens),
        model=model,
        preprocess=preprocess,
        layer="",
        channel_axis=axis,
        digest=digest_of(parts),
        table=table,
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
