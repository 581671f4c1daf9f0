"""Noise on the leaves of a tree, as log-likelihoods log psi_i(a) for `infer`, for any branching.

Sources: Sclocchi, Favero and Wyart, PNAS 122, e2408799121 (2025), arXiv:2402.16991, for uncertainty imposed on leaves
(the epsilon process) and for diffusion of one-hot leaves; Sclocchi, Favero, Levi and Wyart, J. Stat. Mech. 084005
(2025), arXiv:2410.13770, for masking.
"""

from __future__ import annotations

import math
from typing import Any

from guided_diffusion.errors import UserError

import torch
from torch import Tensor

from .belief_propagation import infer
from .denoiser import Denoiser
from .grammar import Grammar

# Log-likelihood of an excluded symbol. Finite, since `infer` multiplies it by zeros; exp is slow where it underflows.
IMPOSSIBLE = -100.0
READING_SIGNAL = 0.8  # abar of the noise through which samples are read: deviation 0.5, as for images


def one_hot(leaves: Tensor, num_symbols: int) -> Tensor:
    """The leaves (B, n) as float32 (B, v, n): 1 for the symbol that is there, 0 for the others."""
    return torch.nn.functional.one_hot(leaves, num_symbols).mT.float()


def epsilon_log_likelihoods(leaves: Tensor, epsilon: float, num_symbols: int) -> Tensor:
    """The epsilon process: psi(a) = 1 - e + e/v for the true symbol of a leaf, and e/v for the others.

    Args:
        leaves: true symbols, int64 (B, n).
        epsilon: e in [0, 1].
        num_symbols: v.

    Returns:
        float64 (B, n, v). Raises UserError if `epsilon` is out of range.
    """
    if not 0 <= epsilon <= 1:
        raise UserError(f"noise epsilon = {epsilon}: expected a number from 0 to 1")
    true = torch.nn.functional.one_hot(leaves, num_symbols).double()
    return ((1 - epsilon) * true + epsilon / num_symbols).log().clamp(min=IMPOSSIBLE)


def gaussian_log_likelihoods(x: Tensor, signal: Tensor | float) -> Tensor:
    """Gaussian noise on one-hot leaves: log psi(a) = sqrt(abar) x_a / (1 - abar), up to a constant.

    Args:
        x: sqrt(abar) onehot + sqrt(1 - abar) eps, (B, v, n).
        signal: abar, a number or (B,), in [0, 1).

    Returns:
        float64 (B, n, v). Raises UserError if abar is out of range.
    """
    abar = torch.as_tensor(signal, dtype=torch.float64, device=x.device).expand(len(x)).view(-1, 1, 1)
    if not ((abar >= 0) & (abar < 1)).all():
        raise UserError("noise levels abar: expected numbers in [0, 1)")
    return (abar.sqrt() / (1 - abar) * x.double()).mT


def masking_log_likelihoods(leaves: Tensor, masked: Tensor, num_symbols: int) -> Tensor:
    """Masking: a masked leaf gives no information, any other is known.

    Args:
        leaves: true symbols, int64 (B, n).
        masked: bool (B, n).
        num_symbols: v.

    Returns:
        float64 (B, n, v).
    """
    true = torch.nn.functional.one_hot(leaves, num_symbols).bool()
    return IMPOSSIBLE * (~true & ~masked[..., None]).double()


class OneHotDenoiser(Denoiser[Grammar]):
    """E[x_0 | x_t] of one-hot leaves, as a model that predicts x_0; `source` is their grammar."""

    def __call__(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        """The leaves' marginals, of the shape and dtype of x (B, v, n), at timesteps t (B,)."""
        likelihoods = gaussian_log_likelihoods(x, self.signal(t))
        return infer(self.source, likelihoods, self.dtype).marginals()[0].mT.to(x.dtype)


def read_one_hot(grammar: Grammar, x: Tensor) -> tuple[Tensor, ...]:
    """The symbols that samples x (B, v, n) of one-hot leaves show, level 0 first: int64 (B, s^L), ..., (B, 1).

    As `belief_propagation.read_symbols` reads images: leaves are the largest entries; a symbol above them is the most
    probable one, as if x were seen through a little noise.
    """
    marginals = infer(grammar, gaussian_log_likelihoods(math.sqrt(READING_SIGNAL) * x, READING_SIGNAL)).marginals()
    return (x.argmax(dim=1), *(p.argmax(dim=2) for p in marginals[1:]))
