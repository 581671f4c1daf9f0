"""Statistics of a classifier on a set of images, which processes and shards measure in units of several batches."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from ..errors import NothingReadable
from ..runs.inputs import Entries
from ..runs.parts import Parts
from ..runs.resumable import IMAGES
from .activations import Moments
from .networks import Classifier
from .results import class_ranks

MOST_UNITS = 100  # each has a file of its own until the statistics are complete


class Statistics(NamedTuple):
    """Statistics of some images.

    Attributes:
        moments: moments of each layer, by name.
        ranks: (n,), for each readable image the number of classes with a larger logit than its own; -1 if its class is
            unknown.
        unreadable: unreadable images: path -> why.
        entries: sizes and digests of the readable images.
    """

    moments: dict[str, Moments]
    ranks: np.ndarray
    unreadable: dict[str, str]
    entries: Entries


def images_per_unit(num_images: int, batch_size: int) -> int:
    """The size of a unit of work, whose statistics are combined in order: whole batches, for at most `MOST_UNITS`."""
    return batch_size * math.ceil(num_images / (batch_size * MOST_UNITS))


def ranks_of(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The rank of each image's class, (B,), from 0, in logits (B, classes); -1 for label -1."""
    return np.where(labels >= 0, class_ranks(logits, labels.clip(min=0)), -1)


def merged(parts: Iterable[Statistics]) -> Statistics:
    """The statistics of several sets of images together."""
    total = Statistics({}, np.empty(0, np.int64), {}, {})
    for part in parts:
        for layer, moments in part.moments.items():
            if layer in total.moments:
                total.moments[layer].merge(moments)
            else:
                total.moments[layer] = moments
        total.unreadable.update(part.unreadable)
        total.entries.update(part.entries)
        total = total._replace(ranks=np.concatenate([total.ranks, part.ranks]))
    return total


def write_part(parts: Parts, index: int, statistics: Statistics) -> None:
    """Write the statistics of unit `index`."""
    states = {f"{name}/{layer}": a for layer, m in statistics.moments.items() for name, a in m.state().items()}
    notes = {"inputs": {IMAGES: statistics.entries}, "unreadable": {IMAGES: statistics.unreadable}}
    parts.write(index, notes, ranks=statistics.ranks, **states)


def read_part(parts: Parts, index: int) -> Statistics:
    """The statistics that `write_part` wrote."""
    arrays = parts.read(index)
    ranks = arrays.pop("ranks")
    states: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for key, array in arrays.items():
        name, _, layer = key.partition("/")
        states[layer][name] = array
    moments = {layer: Moments.from_state(state) for layer, state in states.items()}
    unreadable = parts.notes(index)["unreadable"][IMAGES]
    return Statistics(moments, ranks, unreadable, parts.entries(index)[IMAGES])


def as_arrays(classifier: Classifier, statistics: Statistics) -> dict[str, Any]:
    """The arrays of the file of statistics; top1 and top5 only if the classes of all images are known.

    Raises NothingReadable if no image was readable.
    """
    ranks = statistics.ranks
    if not len(ranks):
        raise NothingReadable("none of the images could be read: there is nothing to write (--data_dir)")
    arrays: dict[str, Any] = {"layers": np.array([layer.name for layer in classifier.layers])}
    for layer in classifier.layers:
        moments = statistics.moments[layer.name].as_arrays()
        arrays |= {f"{moment}/{layer.name}": values for moment, values in moments.items()}
    arrays["num_images"] = np.int64(len(ranks))
    if (ranks >= 0).all():
        arrays["top1"], arrays["top5"] = [np.float64((ranks < n).mean()) for n in (1, 5)]
    return arrays
