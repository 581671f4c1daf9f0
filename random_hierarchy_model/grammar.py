"""The grammar of the Random Hierarchy Model: symbols that produce tuples of symbols, level by level.

Source: Cagnetta, Petrini, Tomasini, Favero and Wyart, "How deep neural networks learn compositional data: the random
hierarchy model", Phys. Rev. X 14, 031001 (2024).

Levels are counted from the bottom: level 0 has the s^L leaves, level L the one symbol that is the class. A symbol a of
level l >= 1 produces one of the m tuples R_l(a, 1), ..., R_l(a, m) of s symbols of level l - 1, each with probability
1 / m; classes are equally probable. The m v tuples of a level are all distinct, so that a tuple tells its parent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from guided_diffusion.errors import UserError

import numpy as np

MOST_TUPLES = 2**24  # of which a level's rules are drawn; each takes 16 bytes of memory meanwhile

# What random numbers are for: streams of one seed that have nothing in common. The rules of level l have stream l.
PALETTE = 2**32
DERIVATIONS = 2**33


@dataclass(frozen=True)
class Grammar:
    """A grammar, which is a function of five numbers.

    Attributes:
        num_symbols: v, the symbols of every level, 0 .. v - 1.
        branching: s, the symbols that a symbol produces.
        depth: L, the levels of rules.
        num_synonyms: m, the tuples that a symbol may produce.
        seed: of the rules.

    Raises UserError where there is no such grammar.
    """

    num_symbols: int
    branching: int
    depth: int
    num_synonyms: int
    seed: int = 0

    def __post_init__(self) -> None:
        v, s, m = self.num_symbols, self.branching, self.num_synonyms
        if v < 1 or s < 1 or m < 1 or self.depth < 1:
            raise UserError(
                f"a grammar of {v} symbols, branching {s}, {m} synonyms and depth {self.depth}: "
                "expected 1 or more of each"
            )
        if v**s > MOST_TUPLES:
            raise UserError(f"{v} symbols have {v}^{s} = {v**s} tuples; expected at most {MOST_TUPLES}")
        if m * v > v**s:
            raise UserError(
                f"{v} symbols have {v}^{s} = {v**s} tuples, too few for {m} each: expected at most "
                f"{v ** (s - 1)} synonyms"
            )
        check_seed(self.seed)

    @property
    def num_leaves(self) -> int:
        """s^L."""
        return self.branching**self.depth

    def num_nodes(self, level: int) -> int:
        """The symbols of a level, s^(L - level)."""
        return self.branching ** (self.depth - level)

    def ancestor_levels(self) -> np.ndarray:
        """The level of the lowest common ancestor of each pair of leaves, 0 for a leaf and itself: (s^L, s^L)."""
        leaves = np.arange(self.num_leaves)
        ancestors = leaves // self.branching ** np.arange(self.depth + 1)[:, None]  # (L + 1, s^L)
        return sum((row[:, None] != row).astype(np.int64) for row in ancestors)

    @cached_property
    def rules(self) -> tuple[np.ndarray, ...]:
        """rules[l - 1][a, k] is the tuple R_l(a, k): L arrays (v, m, s) of int64, not to be changed.

        The m v tuples of a level are a uniformly random choice of the v^s, in a uniformly random order.
        """
        v, s, m = self.num_symbols, self.branching, self.num_synonyms
        powers = v ** np.arange(s)[::-1]
        levels = []
        for level in range(1, self.depth + 1):
            # The order of random words, and not Generator.choice: NumPy promises to keep the words of a stream.
            chosen = np.argsort(random_words(self.seed, level, 0, v**s), kind="stable")[: m * v]
            tuples = (chosen[:, None] // powers % v).reshape(v, m, s)
            tuples.setflags(write=False)
            levels.append(tuples)
        return tuple(levels)

    def derive(self, classes: np.ndarray, choices: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        """Produce everything below the classes.

        Args:
            classes: symbols of level L, (n,).
            choices: choices[l - 1] tells which tuple each symbol of level l produces: (n, s^(L - l)) in 0 .. m - 1.

        Returns:
            The symbols of every level, level 0 first: int64 (n, s^L), ..., (n, s), (n, 1).
        """
        symbols = [np.asarray(classes, dtype=np.int64).reshape(-1, 1)]
        for level in range(self.depth, 0, -1):
            tuples = self.rules[level - 1][symbols[0], choices[level - 1]]  # (n, s^(L - level), s)
            symbols.insert(0, tuples.reshape(len(tuples), -1))
        return tuple(symbols)

    def sample(
        self, count: int, seed: int, start: int = 0, classes: np.ndarray | None = None
    ) -> tuple[np.ndarray, ...]:
        """Draw the derivations number `start` .. `start` + `count` - 1 of a seed, each of which depends on its number
        and the seed alone.

        Args:
            count: n.
            seed: of the derivations; has nothing to do with the seed of the rules.
            start: number of the first, 0 or more.
            classes: symbols of level L, (n,); drawn at random if None.

        Returns:
            The symbols of every level, level 0 first: int64 (n, s^L), ..., (n, s), (n, 1).
        """
        sizes = [self.num_nodes(level) for level in range(1, self.depth + 1)]
        per_image = 4 * -(-(sum(sizes) + 1) // 4)  # the words come in blocks of four
        words = random_words(seed, DERIVATIONS, start * per_image // 4, count * per_image).reshape(count, per_image)
        if classes is None:
            classes = words[:, -1] % self.num_symbols
        choices = np.split(words[:, : sum(sizes)] % self.num_synonyms, np.cumsum(sizes)[:-1], axis=1)
        return self.derive(classes, choices)


def random_words(seed: int, stream: int, block: int, count: int) -> np.ndarray:
    """`count` random 64-bit words of a stream of a seed, from its block number `block` of four words on: uint64.

    Philox is a function of key and counter (Salmon et al., SC 2011): any place of a stream is reached at once.
    """
    check_seed(seed)
    return np.random.Philox(key=np.array([seed, stream], dtype=np.uint64), counter=block).random_raw(count)


def check_seed(seed: int) -> None:
    """Raise UserError unless the seed is one."""
    if not 0 <= seed < 2**64:
        raise UserError(f"seed {seed}: expected a whole number from 0 to 2^64 - 1")
