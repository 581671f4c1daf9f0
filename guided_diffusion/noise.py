"""Streams of noise that belong to an image, and not to a process or a batch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

import torch


class NoiseStreams:
    """One stream of standard normal numbers per image of a batch.

    A stream depends on the run's seed, the image's name and the step alone, never on the batch that the image is in or
    on the process that it meets. Handed to a sampling loop as its `generator`.

    Args:
        seed: the run's seed.
        names: one per row of the batch: paths of images relative to the data folder, or numbers of samples.
        step: the time k to which images are noised; the step of a training.
        device: where the numbers are drawn. Different kinds of device draw different numbers.
    """

    def __init__(self, seed: int, names: Sequence[str], step: int, device: torch.device | str):
        self.generators = [torch.Generator(device).manual_seed(noise_seed(seed, name, step)) for name in names]

    def randn(self, shape: Sequence[int], device=None, dtype=None) -> torch.Tensor:
        """Draw the next numbers of every stream: a tensor of `shape` = (B, ...), row b from stream b."""
        if shape[0] != len(self.generators):
            raise ValueError(f"{len(self.generators)} noise streams cannot fill a batch of {shape[0]}")
        rows = torch.empty(tuple(shape), device=self.generators[0].device, dtype=dtype)
        for row, generator in zip(rows, self.generators, strict=True):
            row.normal_(generator=generator)
        return rows.to(device)


def noise_seed(seed: int, name: str, step: int) -> int:
    """The 64-bit seed of one image's noise at one step: a hash, so that no two of them are related."""
    words = b"\0".join([str(seed).encode(), os.fsencode(name), str(step).encode()])
    return int.from_bytes(hashlib.sha256(words).digest()[:8], "little", signed=True)
