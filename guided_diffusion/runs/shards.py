"""Shards: a run divided among the jobs of an array, which know nothing of each other but what is on the disk.

Shard I of N does the units of work I, I + N, I + 2N, ... of the whole list, whatever is done already. The jobs may run
at the same time or one after the other, on any number of processes each.
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
    """Number `index` (0..count-1) of `count` shards."""

    index: int = 0
    count: int = 1

    def units(self, everything: Sequence[T]) -> Sequence[T]:
        """This shard's part of a list of units of work."""
        return everything[self.index :: self.count]

    def lock(self, unit: str) -> str:
        """Path of the lock file of this shard's part of a unit of output, such as results/t_125_250."""
        return f"{unit}.lock" if self.count == 1 else f"{unit}.{self.index}-of-{self.count}.lock"

    def __str__(self) -> str:
        return f"shard {self.index} of {self.count} (0..{self.count - 1})"


def cut(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Cut a list, in order, every `size` items; the last piece has what is left."""
    return [items[start : start + size] for start in range(0, len(items), size)]


WHOLE = Shard()  # all of the work


def shard_of(args: argparse.Namespace) -> Shard:
    """The shard that the flags describe. Raises UserError."""
    if args.shard >= args.num_shards:
        array = os.environ.get("SLURM_ARRAY_TASK_ID") == str(args.shard)
        remedy = f"; use #SBATCH --array=0-{args.num_shards - 1}" if array and args.num_shards > 1 else ""
        raise UserError(
            f"--shard {args.shard} --num_shards {args.num_shards}: expected a shard from 0 to "
            f"{args.num_shards - 1}{remedy}"
        )
    return Shard(args.shard, args.num_shards)


def check_num_shards(recorded: object, shard: Shard, owner: str) -> None:
    """Raise UserError unless `owner`, an output, was begun with the same number of shards; none on record means 1."""
    number = 1 if recorded is None else recorded
    if number != shard.count:
        raise UserError(
            f"{owner} was begun with --num_shards {number}, and now it is {shard.count}.\n"
            f"Resume with --num_shards {number}, or choose another --output"
        )
