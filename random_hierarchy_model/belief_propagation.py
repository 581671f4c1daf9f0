r"""Exact inference on the tree: the posterior of the derivations, given an observation.

Observed is, at each leaf i, something with a known likelihood for each symbol: psi_i(a) = p(x_i | leaf i is a). On a
tree, belief propagation is exact. Upwards, let U of a symbol at a node be the likelihood of everything below it:

    U_0(a) = psi(a),    U_l(a) = 1/m sum_k prod_j U_{l-1}^{(j)}(R_l(a, k)_j),

where (j) is the j-th child of the node and R_l(a, k) are the grammar's rules. The evidence is p(x) = 1/v sum_a U_L(a).
Downwards, given symbol a at a node of level l, its subtree is independent of everything else, and its tuple is number k
with probability

    q(k | a) = prod_j U_{l-1}^{(j)}(R_l(a, k)_j) / (m U_l(a)).

Starting from P_L(a) = U_L(a) / (v p(x)), the posterior of every symbol follows from the top down, as do exact samples:

    P_{l-1}^{(j)}(b) = sum_{a, k: R_l(a, k)_j = b} P_l(a) q(k | a).

Computing log U avoids overflow and underflow, however clean or noisy the image. Source: Sclocchi, Favero and Wyart,
PNAS 122, e2408799121 (2025), where the same sums are the optimal denoiser; Mezard and Montanari, "Information, Physics,
and Computation" (2009), chapter 14.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from guided_diffusion.errors import UserError

import torch
from torch import Tensor

from .grammar import Grammar
from .images import TreeImages

READING_NOISE = 0.5  # standard deviation, for pixels of +1 and -1; see `read_symbols`


@dataclass(frozen=True)
class Posterior:
    """Posterior of the derivations of B trees.

    Attributes:
        grammar: grammar of the derivations.
        log_evidence: log p(x), (B,).
        root: P_L, the class probabilities, (B, v).
        tuples: tuples[l - 1] is q_l, the probability of each tuple given its parent: (B, s^(L - l), v, m).
    """

    grammar: Grammar
    log_evidence: Tensor
    root: Tensor
    tuples: tuple[Tensor, ...]

    def marginals(self) -> tuple[Tensor, ...]:
        """Probability of every symbol at every node, level 0 first: (B, s^L, v), ..., (B, s, v), (B, 1, v)."""
        g = self.grammar
        levels = [self.root[:, None]]
        for level in range(g.depth, 0, -1):
            joint = levels[0][..., None] * self.tuples[level - 1]  # (B, nodes, v, m): P(a) q(k | a)
            children = joint.flatten(2) @ _membership(g, level).to(joint)  # (B, nodes, s v)
            levels.insert(0, children.reshape(len(children), -1, g.num_symbols))
        return tuple(levels)

    def probability_of(self, symbols: Sequence[Tensor]) -> Tensor:
        """The probability of given symbols, a mean over each level's nodes: (B, L + 1), level 0 first.

        Args:
            symbols: symbols of every level, level 0 first: int64 (B, s^L), ..., (B, s), (B, 1).
        """
        levels = zip(self.marginals(), symbols, strict=True)
        return torch.stack([p.take_along_dim(a[..., None], dim=2).mean((1, 2)) for p, a in levels], dim=1)

    def sample(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """A posterior sample of each derivation: its symbols, level 0 first, int64 (B, s^L), ..., (B, 1).

        `generator` must be on the device of the probabilities.
        """
        return tuple(symbols[:, 0] for symbols in self.samples(generator, 1))

    def samples(self, generator: torch.Generator, count: int) -> tuple[Tensor, ...]:
        """`count` independent samples of each tree; as `sample`, with shapes (B, count, s^L), ..., (B, count, 1)."""
        roots = self.root.repeat_interleave(count, dim=0)  # (B count, v)
        symbols = [torch.multinomial(roots, 1, generator=generator).unflatten(0, (-1, count))]  # (B, count, 1)
        trees = torch.arange(len(self.root), device=self.root.device)[:, None, None]
        for level in range(self.grammar.depth, 0, -1):
            rules = torch.tensor(self.grammar.rules[level - 1], device=self.root.device)
            a = symbols[0]  # (B, count, nodes)
            q = self.tuples[level - 1][trees, torch.arange(a.shape[2], device=a.device), a]  # (B, count, nodes, m)
            k = torch.multinomial(q.flatten(0, 2), 1, generator=generator).reshape(a.shape)
            symbols.insert(0, rules[a, k].flatten(2))  # (B, count, nodes s)
        return tuple(symbols)


def infer(grammar: Grammar, log_likelihoods: Tensor, dtype: torch.dtype = torch.float64) -> Posterior:
    """The posterior of the derivations, given the leaves' log-likelihoods log psi: float64, finite, (B, s^L, v).

    Computes on their device, in `dtype`. float32 is twice as fast, with errors of up to 1e-3 in probabilities.
    """
    v, m = grammar.num_symbols, grammar.num_synonyms
    offset = log_likelihoods.amax(dim=2, keepdim=True)  # (B, s^L, 1), subtracted to keep precision
    up, tuples = (log_likelihoods - offset).to(dtype), []
    for level in range(1, grammar.depth + 1):
        children = up.reshape(len(up), grammar.num_nodes(level), -1)  # (B, nodes, s v)
        joint = (children @ _membership(grammar, level).to(up).T).unflatten(2, (v, m))  # sum_j log U(R(a, k)_j)
        total = joint.logsumexp(dim=3)  # (B, nodes, v)
        tuples.append((joint - total[..., None]).exp())
        up = total - math.log(m)
    log_evidence = up.logsumexp(dim=2)  # (B, 1)
    root = (up - log_evidence[..., None]).exp()[:, 0]  # (B, v)
    return Posterior(grammar, log_evidence[:, 0] + offset.sum(dim=(1, 2)) - math.log(v), root, tuple(tuples))


@lru_cache(maxsize=64)  # needed at every step of a denoising loop
def _membership(grammar: Grammar, level: int) -> Tensor:
    """One-hot matrix of the symbols in each tuple, float64 (v m, s v): 1 at [tuple, (j, b)] if its j-th symbol is b.

    Sums over tuples, and over a tuple's symbols, are products with it.
    """
    rules = torch.tensor(grammar.rules[level - 1]).flatten(0, 1)  # (v m, s)
    return torch.nn.functional.one_hot(rules, grammar.num_symbols).double().flatten(1)


# Images


def log_likelihoods(images: TreeImages, x: Tensor, signal: Tensor | float) -> Tensor:
    """Log-densities of each patch of noised images, for every symbol: float64 (B, 4^L, v).

    For x = sqrt(abar) x_0 + sqrt(1 - abar) eps, with c_a the patch of symbol a, of d = 3 p^2 numbers:

        log psi_i(a) = -|x_i - sqrt(abar) c_a|^2 / (2 (1 - abar)) - d/2 log(2 pi (1 - abar)).

    Args:
        images: rendering of the derivations.
        x: noised images, (B, 3, H, W).
        signal: abar, one number or (B,), in [0, 1).

    Raises UserError if abar is out of range.
    """
    abar = torch.as_tensor(signal, dtype=torch.float64, device=x.device).expand(len(x)).view(-1, 1, 1)
    if not ((abar >= 0) & (abar < 1)).all():
        raise UserError("noise levels abar: expected numbers in [0, 1)")
    patches = images.patches(x).double()  # (B, 4^L, d)
    palette = images.palette.to(patches)  # (v, d)
    squared_distance = (
        patches.square().sum(dim=2, keepdim=True)
        - 2 * abar.sqrt() * (patches @ palette.T)
        + abar * palette.square().sum(dim=1)
    )  # (B, 4^L, v)
    return -squared_distance / (2 * (1 - abar)) - palette.shape[1] / 2 * torch.log(2 * math.pi * (1 - abar))


def image_posterior(
    images: TreeImages, x: Tensor, signal: Tensor | float, dtype: torch.dtype = torch.float64
) -> Posterior:
    """The posterior of the derivations of noised images; arguments as for `log_likelihoods` and `infer`."""
    return infer(images.grammar, log_likelihoods(images, x, signal), dtype)


def read_posterior(images: TreeImages, x: Tensor, noise: float = READING_NOISE) -> Posterior:
    """The posterior of the derivations of images x (B, 3, H, W), assuming noise of standard deviation `noise`.

    Scaled by sqrt(abar) with abar = 1 / (1 + noise^2), x is a noised image in the sense of `log_likelihoods`.
    """
    signal = 1 / (1 + noise**2)
    return image_posterior(images, math.sqrt(signal) * x.double(), signal)


def read_symbols(images: TreeImages, x: Tensor, noise: float = READING_NOISE) -> tuple[Tensor, ...]:
    """The symbols shown by images, level 0 first: int64 (B, 4^L), ..., (B, 1).

    A single wrong patch leaves a sample of a diffusion model without a derivation, although the rest may fit one class.
    So symbols of level 1 and above are read as if the image were noisy: each is the most probable one given the pixels,
    which minimises the expected number of wrong symbols at this noise. For an image of the grammar this gives its
    derivation; for `noise` -> 0, the derivation of the nearest image of the grammar. A leaf is the symbol of the
    nearest patch, grammatical or not.

    Args:
        images: rendering of the derivations.
        x: images without noise, (B, 3, H, W).
        noise: standard deviation of the assumed noise, for pixels of +1 and -1.
    """
    marginals = read_posterior(images, x, noise).marginals()
    return (images.read_leaves(x), *(p.argmax(dim=2) for p in marginals[1:]))
