"""The grammar of the Random Hierarchy Model: symbols that produce tuples of symbols, level by level.

Source: Cagnetta, Petrini, Tomasini, Favero and Wyart, "How deep neural networks learn compositional data: the random
hierarchy model", Phys. Rev. X 14, 031001 (2024).

Levels are counted from the bottom: level 0 has the s^L leaves, level L the one symbol that is the class. A symbol a of
level l >= 1 produces one of the m tuples R_l(a, 1), ..., R_l(a, m) of s symbols of level l - 1, each with probability
1 / m; classes are equally probable. The m v tuples of a level are all distinct, so a tuple determines its parent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from guided_diffusion.errors import UserError

import numpy as np

MAX_TUPLES = 2**24  # tuples to draw a level's rules from, at 16 bytes of memory each

# Independent random streams of one seed. The rules of level l have stream l.
PALETTE = 2**32
DERIVATIONS = 2**33


@dataclass(frozen=True)
class Grammar:
    """A grammar, determined by five numbers.

    Attributes:
        num_symbols: v, number of symbols of every level, 0 .. v - 1.
        branching: s, number of symbols that a symbol produces.
        depth: L, number of levels of rules.
        num_synonyms: m, number of tuples that a symbol may produce.
        seed: seed of the rules.

    Raises UserError if the numbers are out of range.
    """

    num_symbols: int
    branching: int
    depth: int
    num_synonyms: int
    seed: int = 0

    def __post_init__(self) -> None:
        v, s, m = self.num_symbols, self.branching, self.num_synonyms
        if v < 1 or s < 1 or m < 1 or self.depth < 1:
            raise UserError(f"{v} symbols, branching {s}, {m} synonyms, depth {self.depth}: expected 1 or more of each")
        if v**s > MAX_TUPLES:
            raise UserError(f"{v} symbols have {v}^{s} = {v**s} tuples; expected at most {MAX_TUPLES}")
        if m * v > v**s:
            most = v ** (s - 1)
            raise UserError(f"{v} symbols have {v}^{s} = {v**s} tuples, too few for {m} each; expected at most {most}")
        check_seed(self.seed)

    @property
    def num_leaves(self) -> int:
        """Number of leaves, s^L."""
        return self.branching**self.depth

    def num_nodes(self, level: int) -> int:
        """Number of nodes of a level, s^(L - level)."""
        return self.branching ** (self.depth - level)

    def ancestor_levels(self) -> np.ndarray:
        """The level of the lowest common ancestor of each pair of leaves, 0 for a leaf and itself: (s^L, s^L)."""
        leaves = np.arange(self.num_leaves)
        ancestors = leaves // self.branching ** np.arange(self.depth + 1)[:, None]  # (L + 1, s^L)
        return sum((row[:, None] != row).astype(np.int64) for row in ancestors)

    @cached_property
    def rules(self) -> tuple[np.ndarray, ...]:
        """rules[l - 1][a, k] is the tuple R_l(a, k): L read-only arrays (v, m, s) of int64.

        The m v tuples of a level are chosen uniformly at random from all v^s, in random order.
        """
        v, s, m = self.num_symbols, self.branching, self.num_synonyms
        powers = v ** np.arange(s)[::-1]
        levels = []
        for level in range(1, self.depth + 1):
            # Sorts random words instead of using Generator.choice, because NumPy guarantees only the words.
            chosen = np.argsort(random_words(self.seed, level, 0, v**s), kind="stable")[: m * v]
            tuples = (chosen[:, None] // powers % v).reshape(v, m, s)
            tuples.setflags(write=False)
            levels.append(tuples)
        return tuple(levels)

    def derive(self, classes: np.ndarray, choices: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        """The derivations of given classes and choices: symbols by level, level 0 first, int64 (n, s^L), ..., (n, 1).

        Args:
            classes: symbols of level L, (n,).
            choices: choices[l - 1] is the number of the tuple that each symbol of level l produces: (n, s^(L - l)).
        """
        symbols = [np.asarray(classes, dtype=np.int64).reshape(-1, 1)]
        for level in range(self.depth, 0, -1):
            tuples = self.rules[level - 1][symbols[0], choices[level - 1]]  # (n, s^(L - level), s)
            symbols.insert(0, tuples.reshape(len(tuples), -1))
        return tuple(symbols)

    def sample(
        self, count: int, seed: int, start: int = 0, classes: np.ndarray | None = None
    ) -> tuple[np.ndarray, ...]:
        """Random derivations: symbols by level, level 0 first, int64 (n, s^L), ..., (n, 1).

        Each depends only on the seed and its number in `start` .. `start` + `count` - 1.

        Args:
            count: n.
            seed: seed of the derivations, independent of the seed of the rules.
            start: number of the first derivation, 0 or more.
            classes: symbols of level L, (n,); None: random.
        """
        sizes = [self.num_nodes(level) for level in range(1, self.depth + 1)]
        per_image = 4 * -(-(sum(sizes) + 1) // 4)  # the words come in blocks of four
        words = random_words(seed, DERIVATIONS, start * per_image // 4, count * per_image).reshape(count, per_image)
        if classes is None:
            classes = words[:, -1] % self.num_symbols
        choices = np.split(words[:, : sum(sizes)] % self.num_synonyms, np.cumsum(sizes)[:-1], axis=1)
        return self.derive(classes, choices)


def random_words(seed: int, stream: int, block: int, count: int) -> np.ndarray:
    """`count` random uint64 words of a seed's stream, starting at block number `block` of four words.

    Philox is a function of key and counter (Salmon et al., SC 2011), so any block can be computed directly.
    """
    check_seed(seed)
    return np.random.Philox(key=np.array([seed, stream], dtype=np.uint64), counter=block).random_raw(count)


def check_seed(seed: int) -> None:
    """Raise UserError unless the seed is in range."""
    if not 0 <= seed < 2**64:
        raise UserError(f"seed {seed}: expected a whole number from 0 to 2^64 - 1")
