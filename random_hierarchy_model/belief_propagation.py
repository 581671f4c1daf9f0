r"""Exact inference on the tree: which derivations may have made what is seen, and with which probability.

Seen is, at every leaf i, something whose likelihood is known for each symbol: psi_i(a) = p(x_i | leaf i is a). On a
tree, belief propagation is exact. Upwards, with U of a symbol at a node the likelihood of all that is seen below it,

    U_0(a) = psi(a),    U_l(a) = 1/m sum_k prod_j U_{l-1}^{(j)}(R_l(a, k)_j),

where (j) is the j-th child of the node and R_l(a, k) its grammar's rules. The likelihood of everything is then
p(x) = 1/v sum_a U_L(a), and the rest goes down. Given that a node of level l is a, what is below it is independent of
everything else, and the tuple that it produced is number k with probability

    q(k | a) = prod_j U_{l-1}^{(j)}(R_l(a, k)_j) / (m U_l(a)).

So with P_L(a) = U_L(a) / (v p(x)), the posterior of every symbol and its exact samples follow from the top down:

    P_{l-1}^{(j)}(b) = sum_{a, k: R_l(a, k)_j = b} P_l(a) q(k | a).

U is kept as a logarithm: nothing overflows or vanishes, however clean or noisy the image. Source: Sclocchi, Favero and
Wyart, PNAS 122, e2408799121 (2025), where the same sums are the optimal denoiser; Mezard and Montanari, "Information,
Physics, and Computation" (2009), chapter 14.
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

# Where an image is read, its pixels of +1 and -1 count as seen through noise of this deviation; see `read_symbols`.
READING_NOISE = 0.5


@dataclass(frozen=True)
class Posterior:
    """The probabilities of derivations, given what is seen of B trees.

    Attributes:
        grammar: of the derivations.
        log_evidence: log p(x), the logarithm of the likelihood of what is seen, (B,).
        root: P_L, the probabilities of the classes, (B, v).
        tuples: tuples[l - 1] is q_l, the probability of each tuple given the symbol that produces it:
            (B, s^(L - l), v, m).
    """

    grammar: Grammar
    log_evidence: Tensor
    root: Tensor
    tuples: tuple[Tensor, ...]

    def marginals(self) -> tuple[Tensor, ...]:
        """The probability of every symbol at every node, level 0 first: (B, s^L, v), ..., (B, s, v), (B, 1, v)."""
        g = self.grammar
        levels = [self.root[:, None]]
        for level in range(g.depth, 0, -1):
            produced = levels[0][..., None] * self.tuples[level - 1]  # (B, nodes, v, m): P(a) q(k | a)
            children = produced.flatten(2) @ _membership(g, level).to(produced)  # (B, nodes, s v)
            levels.insert(0, children.reshape(len(children), -1, g.num_symbols))
        return tuple(levels)

    def probability_of(self, symbols: Sequence[Tensor]) -> Tensor:
        """The probability of given symbols, a mean over each level's nodes: (B, L + 1), level 0 first.

        Args:
            symbols: of every level, level 0 first: int64 (B, s^L), ..., (B, s), (B, 1).
        """
        levels = zip(self.marginals(), symbols, strict=True)
        return torch.stack([p.take_along_dim(a[..., None], dim=2).mean((1, 2)) for p, a in levels], dim=1)

    def sample(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """A derivation of each tree, drawn from the posterior: its symbols, level 0 first, int64 (B, s^L) ... (B, 1).

        `generator` is on the device of the probabilities.
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
    """The posterior of the derivations, given the leaves' log-likelihoods log psi, float64, finite, (B, s^L, v).

    Computes on their device, in `dtype`; float32 errs by up to 1e-3 in probabilities, and is twice as fast.
    """
    v, m = grammar.num_symbols, grammar.num_synonyms
    most = log_likelihoods.amax(dim=2, keepdim=True)  # (B, s^L, 1): what is large and alike needs no digits further up
    up, tuples = (log_likelihoods - most).to(dtype), []
    for level in range(1, grammar.depth + 1):
        children = up.reshape(len(up), grammar.num_nodes(level), -1)  # (B, nodes, s v)
        joint = (children @ _membership(grammar, level).to(up).T).unflatten(2, (v, m))  # sum_j log U(R(a, k)_j)
        total = joint.logsumexp(dim=3)  # (B, nodes, v)
        tuples.append((joint - total[..., None]).exp())
        up = total - math.log(m)
    log_evidence = up.logsumexp(dim=2)  # (B, 1)
    root = (up - log_evidence[..., None]).exp()[:, 0]  # (B, v)
    return Posterior(grammar, log_evidence[:, 0] + most.sum(dim=(1, 2)) - math.log(v), root, tuple(tuples))


@lru_cache(maxsize=64)  # a denoising loop asks for it at every step
def _membership(grammar: Grammar, level: int) -> Tensor:
    """Which symbols are in which tuple: 1 at [number of the tuple, place j and symbol b], where it has b at j, else 0.

    Float64 (v m, s v). Sums over tuples, and of a tuple's symbols, are products with this matrix.
    """
    rules = torch.tensor(grammar.rules[level - 1]).flatten(0, 1)  # (v m, s)
    return torch.nn.functional.one_hot(rules, grammar.num_symbols).double().flatten(1)


# Images


def log_likelihoods(images: TreeImages, x: Tensor, signal: Tensor | float) -> Tensor:
    """Log-densities of the patches of noised images, leaf by leaf, for every symbol: float64 (B, 4^L, v).

    For x = sqrt(abar) x_0 + sqrt(1 - abar) eps, with c_a the patch of symbol a, of d = 3 p^2 numbers:

        log psi_i(a) = -|x_i - sqrt(abar) c_a|^2 / (2 (1 - abar)) - d/2 log(2 pi (1 - abar)).

    Args:
        images: how derivations look.
        x: noised images, (B, 3, H, W).
        signal: abar, one number or (B,), in [0, 1).

    Raises UserError where abar is out of range.
    """
    abar = torch.as_tensor(signal, dtype=torch.float64, device=x.device).expand(len(x)).view(-1, 1, 1)
    if not ((abar >= 0) & (abar < 1)).all():
        raise UserError("noise levels abar: expected numbers from 0 on and below 1")
    patches = images.patches(x).double()  # (B, 4^L, d)
    palette = images.palette.to(patches)  # (v, d)
    distance = (
        patches.square().sum(dim=2, keepdim=True)
        - 2 * abar.sqrt() * (patches @ palette.T)
        + abar * palette.square().sum(dim=1)
    )  # (B, 4^L, v), squared
    return -distance / (2 * (1 - abar)) - palette.shape[1] / 2 * torch.log(2 * math.pi * (1 - abar))


def image_posterior(
    images: TreeImages, x: Tensor, signal: Tensor | float, dtype: torch.dtype = torch.float64
) -> Posterior:
    """The posterior of the derivations of noised images; arguments as those of `log_likelihoods` and `infer`."""
    return infer(images.grammar, log_likelihoods(images, x, signal), dtype)


def read_posterior(images: TreeImages, x: Tensor, noise: float = READING_NOISE) -> Posterior:
    """The posterior of the derivations of images x (B, 3, H, W) as if they were seen through a little noise.

    x as it is, seen through noise of deviation `noise`, is a noised image scaled by 1 / sqrt(abar).
    """
    signal = 1 / (1 + noise**2)
    return image_posterior(images, math.sqrt(signal) * x.double(), signal)


def read_symbols(images: TreeImages, x: Tensor, noise: float = READING_NOISE) -> tuple[Tensor, ...]:
    """The symbols that images show, level 0 first: int64 (B, 4^L), ..., (B, 1).

    A sample of a diffusion need not be an image of the grammar: one wrong patch, and there is no derivation. Yet nearly
    all of it may be that of some class. So a symbol of level 1 or above is read as one would read it in an image that
    has been seen through a little noise of deviation `noise`: it is the most probable one, given the pixels, by its
    posterior there. That is the reading with the fewest expected mistakes at this noise, symbol by symbol; in an image
    of the grammar it is the derivation itself, and for `noise` -> 0 it is that of the nearest image of the grammar.
    Leaves are what the pixels show, the nearest patch, grammatical or not.

    Args:
        images: how derivations look.
        x: images, (B, 3, H, W), not noised.
        noise: deviation of the noise, in units where pixels are +1 and -1.
    """
    marginals = read_posterior(images, x, noise).marginals()
    return (images.read_leaves(x), *(p.argmax(dim=2) for p in marginals[1:]))
