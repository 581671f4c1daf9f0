"""Shards: a run divided among the jobs of a Slurm array, which share only the file system.

Shard I of N does units of work I, I + N, I + 2N, ... Jobs may run concurrently or one after the other, each on any
number of processes.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """Shard number `index` (0..count-1) of `count`."""

    index: int = 0
    count: int = 1

    def units(self, everything: Sequence[T]) -> Sequence[T]:
        """This shard's units of work, out of all of them."""
        return everything[self.index :: self.count]

    def lock(self, prefix: str) -> str:
        """Path of this shard's lock file for an output such as results/t_125_250."""
        return f"{prefix}.lock" if self.count == 1 else f"{prefix}.{self.index}-of-{self.count}.lock"

    def __str__(self) -> str:
        return f"shard {self.index} of {self.count} (0..{self.count - 1})"


def cut(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Consecutive slices of `size` items; the last one may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]


WHOLE = Shard()  # all of the work


def shard_of(args: argparse.Namespace) -> Shard:
    """The shard that the flags select. Raises UserError if it does not exist."""
    if args.shard >= args.num_shards:
        array = os.environ.get("SLURM_ARRAY_TASK_ID") == str(args.shard)
        remedy = f"; use #SBATCH --array=0-{args.num_shards - 1}" if array and args.num_shards > 1 else ""
        raise UserError(
            f"--shard {args.shard} --num_shards {args.num_shards}: expected a shard from 0 to "
            f"{args.num_shards - 1}{remedy}"
        )
    return Shard(args.shard, args.num_shards)


def check_num_shards(recorded: object, shard: Shard, owner: str) -> None:
    """Raise UserError if the output `owner` was started with another number of shards; None on record means 1."""
    number = 1 if recorded is None else recorded
    if number != shard.count:
        raise UserError(
            f"{owner} was started with --num_shards {number}, and now it is {shard.count}.\n"
            f"Resume with --num_shards {number}, or choose another --output"
        )
