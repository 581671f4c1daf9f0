"""Measurements of a classifier's activations in forward hooks: moments over images, similarities of pairs.

Activations are reduced inside the hook, so that memory does not grow with the number of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import blobfile as bf
import numpy as np
import torch
from torch import Tensor, nn

from .. import logger
from ..compute.transfer import download
from ..errors import ResultError, UserError, first_line
from .layers import WatchedLayer
from .networks import Classifier

NORMALIZATIONS = ("std", "rms", "none")


class Moments:
    """Running mean and variance per channel, exact to float64 rounding for any batch size.

    Batches and processes are combined with the pairwise formula of Chan, Golub and LeVeque (1983). The first value is
    subtracted from all, so that precision is not lost if the mean is large compared with the deviation. The sums
    stay on the device of the values.
    """

    def __init__(self) -> None:
        self.count = 0
        self._shift = torch.zeros((), dtype=torch.float64)
        self._mean = torch.zeros((), dtype=torch.float64)  # minus the shift
        self._squares = torch.zeros((), dtype=torch.float64)  # sum of squared deviations from the mean

    def update(self, values: Tensor) -> None:
        """Add values, of shape (n, C)."""
        values = values.double()
        if self.count == 0:
            self._shift = values[0].clone()
        values = values - self._shift
        mean = values.mean(0)
        self._join(len(values), mean, (values - mean).square_().sum(0))

    def merge(self, other: Moments) -> None:
        """Add the values of other moments."""
        if self.count == 0:
            self._shift = other._shift
        self._join(other.count, other._mean + (other._shift - self._shift), other._squares)

    def _join(self, count: int, mean: Tensor, squares: Tensor) -> None:
        if count == 0:
            return
        total = self.count + count
        delta = mean - self._mean
        self._mean = self._mean + delta * (count / total)
        self._squares = self._squares + squares + delta.square() * (self.count / total * count)
        self.count = total

    @property
    def mean(self) -> np.ndarray:
        """(C,), float64."""
        return (self._shift + self._mean).cpu().numpy()

    @property
    def variance(self) -> np.ndarray:
        """Population variance (C,), float64."""
        return self._squares.cpu().numpy() / max(self.count, 1)

    @property
    def second_moment(self) -> np.ndarray:
        """Mean of the squares: (C,), float64."""
        return self.variance + self.mean**2

    def as_arrays(self) -> dict[str, np.ndarray]:
        """mean, variance, second_moment and count, by name."""
        moments = {name: getattr(self, name) for name in ("mean", "variance", "second_moment")}
        return {**moments, "count": np.int64(self.count)}

    def state(self) -> dict[str, np.ndarray]:
        """The exact internal sums, for `from_state`."""
        sums = {"shift": self._shift, "mean": self._mean, "squares": self._squares}
        return {"count": np.int64(self.count), **{name: value.cpu().numpy() for name, value in sums.items()}}

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> Moments:
        """Moments from their `state`."""
        moments = cls()
        moments.count = int(state["count"])
        moments._shift, moments._mean, moments._squares = (
            torch.from_numpy(np.asarray(state[name])) for name in ("shift", "mean", "squares")
        )
        return moments


class _Watch:
    """Forward hooks that call `_measure(layer, output)` for a classifier's watched layers, in a `with` block."""

    def __init__(self, classifier: Classifier):
        self.classifier = classifier
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self):
        for layer in self.classifier.layers:
            module = self.classifier.model.get_submodule(layer.name)
            self._hooks.append(module.register_forward_hook(partial(self._hook, layer)))
        return self

    def __exit__(self, *_: object) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _hook(self, layer: WatchedLayer, _module: nn.Module, _args: tuple, output: Tensor) -> None:
        with torch.no_grad(), torch.autocast(output.device.type, enabled=False):  # no half precision here
            self._measure(layer, output)


class ActivationMoments(_Watch):
    """Moments of every watched layer over all images that pass through the classifier in the `with` block.

    Attributes:
        moments: moments by layer name, per channel over images and positions; for the logits, over all classes, C = 1.
    """

    def __init__(self, classifier: Classifier):
        super().__init__(classifier)
        self.moments = {layer.name: Moments() for layer in classifier.layers}

    def _measure(self, layer: WatchedLayer, output: Tensor) -> None:
        channels_last = output.movedim(layer.channel_axis, -1)
        columns = 1 if layer.is_logits else output.shape[layer.channel_axis]
        self.moments[layer.name].update(channels_last.reshape(-1, columns))


@dataclass(frozen=True)
class Normalization:
    """The mean and scale by which each layer's activations are standardised, (C,) float64; none for an absent layer."""

    mean: Mapping[str, np.ndarray] = field(default_factory=dict)
    scale: Mapping[str, np.ndarray] = field(default_factory=dict)


def load_normalization(path: str, classifier: Classifier, kind: str) -> Normalization:
    """Read the statistics written by classifier_statistics.py.

    Constant (dead) channels are divided by 1, and a warning gives their number.

    Args:
        path: act_stat_NAME.npz; not read if `kind` is "none".
        classifier: classifier whose layers are standardised.
        kind: "std" subtracts the mean and divides by the standard deviation, as in the paper; "rms" subtracts the mean
            and divides by the root of the second moment, as in the released code; "none" does neither.

    Raises UserError if the file is missing, damaged, or of another classifier or other layers.
    """
    if kind not in NORMALIZATIONS:
        raise UserError(f"--normalization is {kind!r}; expected {', '.join(NORMALIZATIONS)}")
    if kind == "none":
        return Normalization()
    remedy = f"Run classifier_statistics.py for {classifier.name} with the same --layers, or use --normalization none"
    if not bf.exists(path):
        raise UserError(f"the statistics {path} do not exist.\n{remedy}")
    try:
        with bf.BlobFile(path, "rb") as f, np.load(f, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # depends on the damage
        raise UserError(
            f"the statistics {path} are damaged: {first_line(error)}.\nRemove the file. {remedy}"
        ) from error

    means, scales, dead = {}, {}, 0
    for layer in classifier.layers:
        mean, variance, second_moment = _statistics(path, layer, arrays, remedy)
        rms = np.sqrt(second_moment)
        scale = np.sqrt(variance) if kind == "std" else rms
        constant = scale <= np.finfo(np.float32).eps * rms  # up to rounding
        dead += int(constant.sum())
        means[layer.name], scales[layer.name] = mean, np.where(constant, 1, scale)
    if dead:
        logger.warn(f"{path}: {dead} channels are constant, and divided by 1 instead of their scale of 0")
    return Normalization(means, scales)


def _statistics(path: str, layer: WatchedLayer, arrays: Mapping[str, np.ndarray], remedy: str) -> list[np.ndarray]:
    """Mean, variance and second moment of a layer, each (C,). Raises UserError if they are missing or do not fit."""
    channels = 1 if layer.is_logits else layer.channels
    names = [f"{moment}/{layer.name}" for moment in ("mean", "variance", "second_moment")]
    for name in names:
        if name not in arrays:
            raise UserError(f"{path} has no {name}: it is of other layers or of another classifier.\n{remedy}")
        if arrays[name].shape != (channels,):
            shape = list(arrays[name].shape)
            raise UserError(
                f"{path} is of another classifier: {name} has shape {shape}, expected [{channels}].\n{remedy}"
            )
        if not np.isfinite(arrays[name]).all():
            raise UserError(f"{path}: {name} contains NaN or infinity.\nRemove the file. {remedy}")
    return [arrays[name].astype(np.float64) for name in names]


class Comparison(NamedTuple):
    """Similarities and logits of a batch; see `Similarities`."""

    cosine: np.ndarray
    L2: np.ndarray
    L2_normalized: np.ndarray
    logits: np.ndarray


class Similarities(_Watch):
    """Compares the activations of starting images and their samples, layer by layer, in a `with` block.

    A batch has (1 + S) B rows: B starting images, then S times a sample of each, of several times and trajectories.
    After a forward pass, `latest()` waits for the results and returns them; it can be called after the next pass has
    started. It takes which rows are images, bool ((1 + S) B,), if others only keep a place. With a and b the
    standardised activations of a layer for a start and a sample, flattened, the results are float64 arrays of shape
    (S, B, layers):

        cosine = a.b / (|a| |b|),    L2 = |a - b|,    L2_normalized = |a - b| / sqrt(|a| |b|)

    cosine and L2_normalized are NaN if a or b is 0. For any other NaN or infinity of images, `latest()` raises
    ResultError.
    `logits` is float32, of shape (1 + S, B, classes).

    Products and sums are float32, with PyTorch's pairwise summation: errors are below 1e-6 (for the cosine, relative to
    |a| |b|).

    Attributes:
        num_samples: S; may be changed before a pass.
    """

    latest: Callable[..., Comparison]

    def __init__(self, classifier: Classifier, normalization: Normalization, num_samples: int = 1):
        super().__init__(classifier)
        self.normalization = normalization
        self.num_samples = num_samples
        self._sums: dict[str, Tensor] = {}  # layer -> a.a, b.b, a.b, (a - b).(a - b): (4, S, B)
        self._constants: dict[Any, tuple[Tensor, ...]] = {}

    def __enter__(self) -> Similarities:
        super().__enter__()
        self._hooks.append(self.classifier.model.register_forward_hook(self._finish))
        return self

    def _measure(self, layer: WatchedLayer, output: Tensor) -> None:
        rows = self._standardised(layer, output)
        memory_order = sorted(range(1, rows.ndim), key=rows.stride, reverse=True)  # flattening then copies nothing
        rows = rows.permute(0, *memory_order).reshape(1 + self.num_samples, -1, output[0].numel())  # (1 + S, B, D)
        a, b = rows[:1], rows[1:]
        aa = (a * a).sum(-1).expand(self.num_samples, -1)  # (S, B)
        bb, ab = ((b * other).sum(-1) for other in (b, a))
        dd = (b - a).square_().sum(-1)  # not aa + bb - 2 ab, which would cancel
        self._sums[layer.name] = torch.stack([aa, bb, ab, dd]).double()

    def _standardised(self, layer: WatchedLayer, output: Tensor) -> Tensor:
        if layer.name not in self.normalization.mean:
            return output.float()
        key = layer.name, output.device
        if key not in self._constants:
            shape = [1] * output.ndim
            shape[layer.channel_axis] = -1
            mean, scale = (
                torch.as_tensor(values[layer.name], dtype=torch.float64).reshape(shape)
                for values in (self.normalization.mean, self.normalization.scale)
            )
            # The mean as a sum of two float32 numbers: one is too coarse if the mean is large compared with the scale.
            parts = mean.float(), (mean - mean.float().double()).float(), scale.float()
            self._constants[key] = tuple(part.to(output.device) for part in parts)
        mean, rest, scale = self._constants[key]
        return (output.float() - mean).sub_(rest).div_(scale)

    def _finish(self, _module: nn.Module, _args: tuple, output: Tensor) -> None:
        sums = torch.stack([self._sums.pop(layer.name) for layer in self.classifier.layers], -1)  # (4, S, B, L)
        logits = output.detach().float().unflatten(0, (1 + self.num_samples, -1))
        self.latest = partial(_comparison, download(sums, logits))


def _comparison(wait: Callable[[], list[np.ndarray]], rows: np.ndarray | None = None) -> Comparison:
    (aa, bb, ab, dd), logits = wait()
    images = np.ones(logits.shape[:2], bool) if rows is None else rows.reshape(logits.shape[:2])  # (1 + S, B)
    pairs = images[:1] & images[1:]
    if (
        not all(np.isfinite(values[pairs]).all() for values in (aa, bb, ab, dd))
        or not np.isfinite(logits[images]).all()
    ):
        raise ResultError(
            "the classifier gave NaN or infinity: nothing is recorded.\n"
            "Its weights may be damaged (--classifier_path), or too large for --classifier_use_fp16"
        )
    with np.errstate(invalid="ignore"):  # of the other rows
        norms = np.sqrt(aa) * np.sqrt(bb)  # (S, B, L)
        norms[norms == 0] = np.nan
        return Comparison(ab / norms, np.sqrt(dd), np.sqrt(dd) / np.sqrt(norms), logits)
