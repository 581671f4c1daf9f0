r"""Mean-field theory of the Random Hierarchy Model under noise on its leaves.

In the epsilon process, the belief in each leaf is 1 - e + e/v for its true symbol and e/v for any other. Averaged over
grammars and data, beliefs in the true symbol follow from a one-dimensional map, level by level. Fluctuations are
neglected. Throughout, v is the number of symbols, m of synonyms, s the branching and L the depth;

    f = (m v - 1) / (v^s - 1),    a = (m - 1) / (v^s - 1)

are the probabilities that a random tuple, other than the true one, is in the grammar, and that it is a synonym.

The maps carry doubts, 1 - p and 1 - q, instead of beliefs: changes are about as rare as doubts are small, and the
difference of two beliefs near 1 would be lost in rounding.

Sources: Sclocchi, Favero and Wyart, PNAS 122, e2408799121 (2025), arXiv:2402.16991; Sclocchi, Favero, Levi and Wyart,
J. Stat. Mech. 084005 (2025), arXiv:2410.13770.
"""

from __future__ import annotations

import math

from guided_diffusion.errors import UserError

import numpy as np


def check_parameters(v: int, m: int, s: int) -> None:
    """Raise UserError unless grammars of v symbols, m synonyms and branching s have a mean-field theory."""
    if v < 2 or m < 1 or s < 2:
        raise UserError(
            f"mean-field theory of v = {v} symbols, m = {m} synonyms, branching s = {s}: "
            "expected v >= 2, m >= 1, s >= 2"
        )
    if m * v > v**s:
        raise UserError(f"v = {v} symbols have {v**s} tuples of s = {s}, too few for m = {m} synonyms each")


def other_tuples(v: int, m: int, s: int) -> tuple[float, float]:
    """(f, a), the fractions of the other v^s - 1 tuples that are in the grammar, and that are synonyms."""
    return (m * v - 1) / (v**s - 1), (m - 1) / (v**s - 1)


def upward(p: float | np.ndarray, v: int, m: int, s: int) -> float | np.ndarray:
    """F(p) = (p^s + a (1 - p^s)) / (p^s + f (1 - p^s)), the belief in a symbol given the belief p in its children."""
    return 1 - upward_doubt(1 - p, v, m, s)


def upward_doubt(d: float | np.ndarray, v: int, m: int, s: int) -> float | np.ndarray:
    """1 - F(p) = (f - a) u / (p^s + f u), with d = 1 - p and u = 1 - p^s = d (1 + p + ... + p^(s-1))."""
    f, a = other_tuples(v, m, s)
    u = d * sum((1 - d) ** i for i in range(s))
    return (f - a) * u / ((1 - d) ** s + f * u)


def slope(p: float, v: int, m: int, s: int) -> float:
    """F'(p) = s p^(s-1) (f - a) / (p^s + f (1 - p^s))^2."""
    f, a = other_tuples(v, m, s)
    return s * p ** (s - 1) * (f - a) / (p**s + f * (1 - p**s)) ** 2


def slope_at_one(v: int, m: int, s: int) -> float:
    """F'(1) = s m (v - 1) / (v^s - 1), called sf: noise on few leaves is corrected further up if it is below 1."""
    return s * m * (v - 1) / (v**s - 1)


def slope_at_chance(v: int, m: int, s: int) -> float:
    """F'(1/v) = s (v - 1) v^(s-1) / (m (v^s - 1)): faint evidence fades further up if it is below 1."""
    return s * (v - 1) * v ** (s - 1) / (m * (v**s - 1))


def critical_belief(v: int, m: int, s: int) -> float | None:
    """p*, the repelling fixed point of F between the attracting ones, 1/v and 1; None unless both are attracting.

    It is a root of the polynomial p (p^s + f (1 - p^s)) - p^s - a (1 - p^s), divided by its roots 1 and 1/v.
    """
    if slope_at_one(v, m, s) >= 1 or slope_at_chance(v, m, s) >= 1:
        return None
    f, a = other_tuples(v, m, s)
    polynomial = np.zeros(s + 2)  # from p^(s+1) to 1
    polynomial[0], polynomial[1] = 1 - f, a - 1
    polynomial[-2] += f
    polynomial[-1] -= a
    others, _ = np.polydiv(polynomial, np.poly([1, 1 / v]))
    roots = np.roots(others)
    (root,) = (r.real for r in roots if abs(r.imag) < 1e-9 and 1 / v < r.real < 1)
    return float(root)


def critical_noise(v: int, m: int, s: int) -> float | None:
    """e* = (1 - p*) v / (v - 1), the noise at which the class is lost for L -> infinity; None without transition."""
    p = critical_belief(v, m, s)
    return None if p is None else (1 - p) * v / (v - 1)


def correlation_exponent(v: int, m: int, s: int) -> float | None:
    """nu = ln s / ln F'(p*): the correlation length grows as |e - e*|^(-nu); None without transition."""
    p = critical_belief(v, m, s)
    return None if p is None else math.log(s) / math.log(slope(p, v, m, s))


def upward_doubts(epsilon: float, v: int, m: int, s: int, depth: int) -> list[float]:
    """1 - p_0, ..., 1 - p_L: p_l is the belief in a true symbol given the leaves below it. p_0 = 1 - e + e/v."""
    doubts = [epsilon * (v - 1) / v]
    for _ in range(depth):
        doubts.append(upward_doubt(doubts[-1], v, m, s))
    return doubts


def downward_doubt(doubt: float, d: float, v: int, m: int, s: int) -> float:
    """1 - q_(l-1), the doubt in a symbol given all leaves but those below it.

    With q = q_l of its parent, w = p^(s-1) for the beliefs p = p_(l-1) in its siblings, and A = (m - q) / (v^s - 1),

        q_(l-1) = (q w + A (1 - w)) / (q w + A (v - w)),  1 - q_(l-1) = A (v - 1) / (q w + A (v - w)).

    Args:
        doubt: 1 - q.
        d: 1 - p.
        v, m, s: numbers of the grammar.
    """
    siblings = (1 - d) ** (s - 1)
    others = (m - 1 + doubt) / (v**s - 1)
    return others * (v - 1) / ((1 - doubt) * siblings + others * (v - siblings))


def downward_doubts(upwards: list[float], doubt: float, v: int, m: int, s: int) -> list[float]:
    """1 - q_0, ..., 1 - q_l, given 1 - p_0, ..., 1 - p_l and 1 - q_l = `doubt`."""
    doubts = [doubt]
    for d in reversed(upwards[:-1]):
        doubts.insert(0, downward_doubt(doubts[0], d, v, m, s))
    return doubts


def lost(d: float, doubt: float, v: int) -> float:
    """1 - P, with the marginal P = p q / (p q + (1 - p)(1 - q) / (v - 1)) of the true symbol; of 1 - p and 1 - q."""
    others = d * doubt / (v - 1)
    return others / ((1 - d) * (1 - doubt) + others) if others else 0.0  # also if p = 1 and q = 0, which never meet


def marginals(epsilon: float, v: int, m: int, s: int, depth: int) -> list[float]:
    """P_0, ..., P_L, the posterior probabilities of the true symbols, level 0 first; q_L = 1/v."""
    up = upward_doubts(epsilon, v, m, s, depth)
    down = downward_doubts(up, 1 - 1 / v, v, m, s)
    return [1 - lost(d, doubt, v) for d, doubt in zip(up, down, strict=True)]


def correlations(epsilon: float, v: int, m: int, s: int, depth: int) -> list[float]:
    """C(0), ..., C(L): covariance of the changes, +1 or -1, of two leaves whose common ancestor is at level h.

    With p = p_(h-1), q = q_h and A = (m - q) / (v^s - 1), the joint law of "child kept" for two children of the
    ancestor is

        W(++) = q p^s + A p^2 (1 - p^(s-2)),  W(+-) = W(-+) = A p (1 - p),  W(--) = A (1 - p)^2,

    divided by Z = A + (q - A) p^s, their sum. T(+) and T(-) are the marginals of a leaf whose ancestor at level h - 1
    is known (q = 1) or excluded (q = 0). Covariances of two variables with two values each are determinants, so

        C(h) = 4 (T W T' / Z - P_0^2) = 4 (T(+) - T(-))^2 det W / Z^2,  det W = A (q - A) p^s (1 - p)^2,

    and C(0) = 4 P_0 (1 - P_0).
    """
    up = upward_doubts(epsilon, v, m, s, depth)
    down = downward_doubts(up, 1 - 1 / v, v, m, s)
    changed = lost(up[0], down[0], v)
    found = [4 * changed * (1 - changed)]
    for h in range(1, depth + 1):
        d, q = up[h - 1], 1 - down[h]
        others = (m - 1 + down[h]) / (v**s - 1)
        equal = (q - others) * (1 - d) ** s
        known, excluded = (lost(up[0], downward_doubts(up[:h], doubt, v, m, s)[0], v) for doubt in (0.0, 1.0))
        found.append(4 * (excluded - known) ** 2 * others * equal * d**2 / (others + equal) ** 2)
    return found


def susceptibility(epsilon: float, v: int, m: int, s: int, depth: int) -> float:
    """chi = 1 + sum_h (s - 1) s^(h-1) C(h) / C(0): how many leaves change together; NaN if none ever changes, e = 0."""
    own, *covariances = correlations(epsilon, v, m, s, depth)
    if not own:
        return math.nan
    return 1 + sum((s - 1) * s**h * covariance for h, covariance in enumerate(covariances)) / own
