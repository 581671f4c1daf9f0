"""What a classifier's layers put out, measured inside forward hooks: moments over images, similarities of pairs.

Nothing of a layer's activations is kept beyond its hook, so that memory does not grow with the number of layers.
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
    """Mean and variance per channel of a stream of values, exact to float64 rounding however it is cut.

    Batches, and the streams of several processes, are joined by the pairwise formula of Chan, Golub and LeVeque (1983).
    Values are counted from the stream's first, so that a mean that is large beside the deviation costs no digits. The
    sums stay on the device of the values until they are asked for.
    """

    def __init__(self) -> None:
        self.count = 0
        self._shift = torch.zeros((), dtype=torch.float64)  # what values are counted from
        self._mean = torch.zeros((), dtype=torch.float64)  # less the shift
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
        """Add what another stream has seen."""
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
        """Of the population, that is divided by the count: (C,), float64."""
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
        """Everything that `merge` needs, exactly, for `from_state`."""
        sums = {"shift": self._shift, "mean": self._mean, "squares": self._squares}
        return {"count": np.int64(self.count), **{name: value.cpu().numpy() for name, value in sums.items()}}

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> Moments:
        """The moments whose `state` was kept."""
        moments = cls()
        moments.count = int(state["count"])
        moments._shift, moments._mean, moments._squares = (
            torch.from_numpy(np.asarray(state[name])) for name in ("shift", "mean", "squares")
        )
        return moments

    def __getstate__(self) -> dict[str, Any]:  # pickled from the CPU, since another process may not have this one's GPU
        return {name: v.cpu() if isinstance(v, Tensor) else v for name, v in vars(self).items()}


class _Watch:
    """Hooks on a classifier's watched layers, within a `with` block; see the two classes below."""

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
        # The network may compute in half precision, what is measured of it does not.
        with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
            self._measure(layer, output)

    def _measure(self, layer: WatchedLayer, output: Tensor) -> None:
        raise NotImplementedError


class ActivationMoments(_Watch):
    """Moments of every watched layer over all images that pass through the classifier in the `with` block.

    `moments` has them by the layer's name: per channel, over images and positions; of the logits, of all classes
    together, with C = 1.
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
    """How activations are standardised: by layer, `mean` is subtracted, then divided by `scale`; both (C,), float64.

    A layer without an entry is taken as it is.
    """

    kind: str = "none"
    mean: Mapping[str, np.ndarray] = field(default_factory=dict)
    scale: Mapping[str, np.ndarray] = field(default_factory=dict)


def load_normalization(path: str, classifier: Classifier, kind: str) -> Normalization:
    """Read the statistics that classifier_statistics.py wrote.

    Args:
        path: its file act_stat_NAME.npz; not read where `kind` is "none".
        classifier: whose layers are to be standardised.
        kind: "std" divides by the standard deviation, as the paper says; "rms" by the root of the second moment, as the
            code released with it does, after subtracting the mean all the same; "none" leaves activations alone.

    A channel that never changed (a dead one) is divided by 1, and counted in a warning.

    Raises UserError where the file is missing, damaged, or of another classifier or other layers.
    """
    if kind not in NORMALIZATIONS:
        raise UserError(f"--normalization is {kind!r}; expected {', '.join(NORMALIZATIONS)}")
    if kind == "none":
        return Normalization()
    remedy = f"Run classifier_statistics.py for {classifier.name} with the same --layers, or use --normalization none"
    if not bf.exists(path):
        raise UserError(f"there are no statistics {path} to standardise activations with.\n{remedy}")
    try:
        with bf.BlobFile(path, "rb") as f, np.load(f, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # damaged bytes raise nearly any kind
        raise UserError(f"{path} is damaged, it holds no statistics: {first_line(error)}.\n{remedy}") from error

    means, scales, dead = {}, {}, 0
    for layer in classifier.layers:
        mean, variance, second_moment = _statistics(path, layer, arrays, remedy)
        rms = np.sqrt(second_moment)
        scale = np.sqrt(variance) if kind == "std" else rms
        constant = scale <= np.finfo(np.float32).eps * rms  # nothing but the rounding of a constant
        dead += int(constant.sum())
        means[layer.name], scales[layer.name] = mean, np.where(constant, 1, scale)
    if dead:
        logger.warn(f"{path}: {dead} channels never change; they are divided by 1, not by their scale of 0")
    return Normalization(kind, means, scales)


def _statistics(path: str, layer: WatchedLayer, arrays: Mapping[str, np.ndarray], remedy: str) -> list[np.ndarray]:
    """Mean, variance and second moment of a layer, each (C,). Raises UserError where they are not there or unsound."""
    names = [f"{moment}/{layer.name}" for moment in ("mean", "variance", "second_moment")]
    if missing := [name for name in names if name not in arrays]:
        raise UserError(f"{path} holds no {missing[0]}: it is of other layers or of another classifier.\n{remedy}")
    channels = 1 if layer.is_logits else layer.channels
    for name in names:
        if arrays[name].shape != (channels,):
            raise UserError(
                f"{path} is of another classifier: {name} has shape {list(arrays[name].shape)}, "
                f"and not [{channels}].\n{remedy}"
            )
        if not np.isfinite(arrays[name]).all():
            raise UserError(f"{path}: {name} has values that are not finite.\n{remedy}")
    return [arrays[name].astype(np.float64) for name in names]


class Compared(NamedTuple):
    """What `Similarities` has found."""

    cosine: np.ndarray
    L2: np.ndarray
    L2_normalized: np.ndarray
    logits: np.ndarray


class Similarities(_Watch):
    """Compares the activations of starting images and of their samples, layer by layer, within a `with` block.

    The rows of a batch are B starting images, their B samples of the first time, of the second, ... of the last:
    (1 + times) B in all. After a forward pass, `latest()` gives what it has found, as soon as it is on the CPU; it may
    be kept, and called after the next pass has begun. With a and b the standardised activations of a start and of a
    sample, all entries of a layer in one vector, there are float64 arrays of shape (times, B, layers):

        cosine = a.b / (|a| |b|),    L2 = |a - b|,    L2_normalized = |a - b| / sqrt(|a| |b|)

    The first and the last are undefined, and NaN, if a or b is 0. Any other NaN or infinity is a ResultError, which
    `latest()` raises. `logits` is float32, of shape (1 + times, B, classes).

    Products and sums are float32, the sums pairwise as PyTorch's are: errors are below 1e-6, relative to |a| |b| for
    the cosine.
    """

    latest: Callable[[], Compared]

    def __init__(self, classifier: Classifier, normalization: Normalization, times: int):
        super().__init__(classifier)
        self.normalization = normalization
        self.times = times
        self._found: dict[str, Tensor] = {}  # layer -> sums of a.a, b.b, a.b, (a - b).(a - b): (4, times, B)
        self._constants: dict[Any, tuple[Tensor, ...]] = {}

    def __enter__(self) -> Similarities:
        super().__enter__()
        self._hooks.append(self.classifier.model.register_forward_hook(self._finish))
        return self

    def _measure(self, layer: WatchedLayer, output: Tensor) -> None:
        rows = self._standardised(layer, output)
        as_in_memory = sorted(range(1, rows.ndim), key=rows.stride, reverse=True)  # nothing is copied to flatten it
        rows = rows.permute(0, *as_in_memory).reshape(1 + self.times, -1, output[0].numel())  # (1 + T, B, D)
        a, b = rows[:1], rows[1:]
        aa = (a * a).sum(-1).expand(self.times, -1)  # (T, B)
        bb, ab = ((b * other).sum(-1) for other in (b, a))
        dd = (b - a).square_().sum(-1)  # not from the others: it may be much smaller than they
        self._found[layer.name] = torch.stack([aa, bb, ab, dd]).double()

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
            # The mean as the sum of two float32 numbers: one would be too coarse where it is large beside the scale.
            parts = mean.float(), (mean - mean.float().double()).float(), scale.float()
            self._constants[key] = tuple(part.to(output.device) for part in parts)
        mean, rest, scale = self._constants[key]
        return (output.float() - mean).sub_(rest).div_(scale)

    def _finish(self, _module: nn.Module, _args: tuple, output: Tensor) -> None:
        sums = torch.stack([self._found.pop(layer.name) for layer in self.classifier.layers], -1)  # (4, T, B, L)
        logits = output.detach().float().unflatten(0, (1 + self.times, -1))
        self.latest = partial(_compared, download(sums, logits))


def _compared(wait: Callable[[], list[np.ndarray]]) -> Compared:
    (aa, bb, ab, dd), logits = wait()
    if not all(np.isfinite(values).all() for values in (aa, bb, ab, dd, logits)):
        raise ResultError(
            "the classifier gave NaN or infinity: nothing is recorded.\n"
            "Its weights may be damaged (--classifier_path), or too large for --classifier_use_fp16"
        )
    norms = np.sqrt(aa) * np.sqrt(bb)  # (T, B, L)
    norms[norms == 0] = np.nan
    return Compared(ab / norms, np.sqrt(dd), np.sqrt(dd) / np.sqrt(norms), logits)
