"""Measuring the changes of a unit of work, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from ..classifier.pairs import SAMPLES, STARTS
from ..correlations import FINEST, Pairs
from ..errors import ResultError
from ..runs.resumable import Pictures
from .samples import Piece, StartBatch
from .statistics import ChangeSums, Spectrum
from .tokens import Tokens


class UnitSums:
    """The sums of all starts of a unit, at all times.

    Args:
        unit: the unit.
        tokens: the tokens.
        pairs: their pairs.
        spectrum: power spectra to compute, if any.
    """

    def __init__(self, unit: StartBatch, tokens: Tokens, pairs: Pairs, spectrum: Spectrum | None):
        self._tokens, self._pairs, self._spectrum = tokens, pairs, spectrum
        times, starts = len(unit.samples), len(unit.starts)
        self._sums = [[ChangeSums(pairs) for _ in range(starts)] for _ in range(times)]
        self._features: dict[int, Tensor] = {}  # of the latest starts, (h, w, channels)
        modes = len(spectrum.modes) if spectrum else 0
        self._start_power = np.full((starts, modes), np.nan)
        self._change_power = np.zeros((times, starts, modes))
        self._readable: list[np.ndarray] = []
        self._unreadable: dict[str, dict[str, str]] = {STARTS: {}, SAMPLES: {}}

    def add(self, piece: Piece, pictures: Pictures, features: Tensor) -> None:
        """Add a piece, given the features (B, h, w, channels) of its starts, then its samples.

        Raises ResultError if the features of a readable image contain NaN or infinity.
        """
        self._readable.append(pictures.readable)
        for kind, why in pictures.unreadable.items():
            self._unreadable[kind] |= why
        count = len(piece.starts)
        self._add_starts(piece.starts, pictures.readable[:count], features[:count])
        used = [
            row
            for row, (start, _, _) in enumerate(piece.samples)
            if start in self._features and pictures.readable[count + row]
        ]
        if used:
            self._add_samples([piece.samples[row][:2] for row in used], features[[count + row for row in used]])
        self._features = dict(sorted(self._features.items())[-1:])  # all samples of the others have been added

    def _add_starts(self, starts: Sequence[int], readable: np.ndarray, features: Tensor) -> None:
        for row, start in enumerate(starts):
            if readable[row]:
                self._features[start] = features[row].clone()
                if self._spectrum:
                    self._start_power[start] = self._spectrum.power(features[row : row + 1])[0]

    def _add_samples(self, places: list[tuple[int, int]], features: Tensor) -> None:
        """Add samples of these starts and times, whose features are (B, h, w, channels)."""
        numbers = sorted({start for start, _ in places})
        starts = torch.stack([self._features[start] for start in numbers])
        difference = features - starts[[numbers.index(start) for start, _ in places]]
        changes = self._tokens.changes(difference).double().cpu().numpy()
        if not np.isfinite(changes).all():
            raise ResultError(
                f"the features of {self._tokens.name} contain NaN or infinity: nothing is recorded.\n"
                "The weights may be damaged (--classifier_path), or too large for --classifier_use_fp16"
            )
        power = self._spectrum.power(difference) if self._spectrum else None
        rows = enumerate(places)
        for (start, time), group in groupby(rows, key=lambda entry: entry[1]):
            chosen = [row for row, _ in group]
            self._sums[time][start].add(changes[chosen])
            if power is not None:
                self._change_power[time, start] += power[chosen].sum(axis=0)

    def pictures(self) -> Pictures:
        """Which files were readable, over all pieces."""
        return Pictures([], np.concatenate(self._readable), self._unreadable)

    def arrays(self) -> dict[str, np.ndarray]:
        """The statistics of T times and B starts, by name; NaN for a start with fewer than two readable samples."""
        found = [[sums.statistics() for sums in of_time] for of_time in self._sums]
        arrays = {
            name: np.array([[getattr(one, name) for one in of_time] for of_time in found])
            for name in ("samples", "chi_numerator", "chi_denominator", "correlation")
        }
        shape = self._tokens.shape
        maps = np.array([[one.change_map for one in of_time] for of_time in found])
        arrays["change"] = maps.mean(axis=-1)
        arrays["change_map"] = block_means(maps.reshape(*maps.shape[:2], *shape)).astype(np.float32)
        if self._spectrum:
            with np.errstate(invalid="ignore"):
                arrays["spectrum_change"] = self._change_power / arrays["samples"][..., None]
            arrays["spectrum_start"] = np.broadcast_to(self._start_power, self._change_power.shape)
        return arrays


def block_means(maps: np.ndarray) -> np.ndarray:
    """Maps (T, B, h, w), reduced to at most 32 x 32 by means of blocks of tokens; others (T, B, n) as they are."""
    if maps.ndim < 4:
        return maps
    for axis in (2, 3):
        side = maps.shape[axis]
        size = -(-side // FINEST)
        firsts = np.arange(0, side, size)
        counts = np.diff(np.append(firsts, side)).reshape([-1 if a == axis else 1 for a in range(4)])
        maps = np.add.reduceat(maps, firsts, axis=axis) / counts
    return maps
