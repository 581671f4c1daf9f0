r"""Mean-field theory of the Random Hierarchy Model under noise on its leaves.

In the epsilon process, the belief in each leaf is 1 - e + e/v for its true symbol and e/v for any other. Averaged over
grammars and data, beliefs in the true symbol follow from a one-dimensional map, level by level. Fluctuations are
neglected. Throughout, v is the number of symbols, m of synonyms, s the branching and L the depth;

    f = (m v - 1) / (v^s - 1),    a = (m - 1) / (v^s - 1)

are the probabilities that a random tuple, other than the true one, is in the grammar, and that it is a synonym.

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


def leaf_belief(epsilon: float | np.ndarray, v: int) -> float | np.ndarray:
    """p_0 = 1 - e + e/v, the belief in a leaf's true symbol at noise e in [0, 1]."""
    return 1 - epsilon + epsilon / v


def upward(p: float | np.ndarray, v: int, m: int, s: int) -> float | np.ndarray:
    """F(p) = (p^s + a (1 - p^s)) / (p^s + f (1 - p^s)), the belief in a symbol given the belief p in its children."""
    f, a = other_tuples(v, m, s)
    return (p**s + a * (1 - p**s)) / (p**s + f * (1 - p**s))


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


def upward_beliefs(epsilon: float, v: int, m: int, s: int, depth: int) -> list[float]:
    """p_0, ..., p_L, the beliefs in the true symbols given the leaves below them: p_l = F(p_(l-1))."""
    beliefs = [leaf_belief(epsilon, v)]
    for _ in range(depth):
        beliefs.append(upward(beliefs[-1], v, m, s))
    return beliefs


def downward(q: float, p: float, v: int, m: int, s: int) -> float:
    """q_(l-1), the belief in a symbol given all leaves but those below it.

    q_(l-1) = [q p^(s-1) + (m - q) A] / [q p^(s-1) + (m - q)(v - p^(s-1)) / (v^s - 1)], A = (1 - p^(s-1)) / (v^s - 1),
    with q = q_l of its parent and p = p_(l-1) of its siblings.
    """
    siblings = q * p ** (s - 1)
    others = (m - q) / (v**s - 1)
    return (siblings + others * (1 - p ** (s - 1))) / (siblings + others * (v - p ** (s - 1)))


def downward_beliefs(upwards: list[float], q: float, v: int, m: int, s: int) -> list[float]:
    """q_0, ..., q_l, given the upward beliefs p_0, ..., p_l and the downward belief q_l = `q`."""
    beliefs = [q]
    for p in reversed(upwards[:-1]):
        beliefs.insert(0, downward(beliefs[0], p, v, m, s))
    return beliefs


def combine(p: float, q: float, v: int) -> float:
    """P = p q / (p q + (1 - p)(1 - q) / (v - 1)), the marginal of the true symbol."""
    return p * q / (p * q + (1 - p) * (1 - q) / (v - 1))


def marginals(epsilon: float, v: int, m: int, s: int, depth: int) -> list[float]:
    """P_0, ..., P_L, the posterior probabilities of the true symbols, level 0 first; q_L = 1/v."""
    up = upward_beliefs(epsilon, v, m, s, depth)
    down = downward_beliefs(up, 1 / v, v, m, s)
    return [combine(p, q, v) for p, q in zip(up, down, strict=True)]


def correlations(epsilon: float, v: int, m: int, s: int, depth: int) -> list[float]:
    """C(0), ..., C(L): covariance of the changes, +1 or -1, of two leaves whose common ancestor is at level h.

    With p = p_(h-1), q = q_h and A = (m - q) / (v^s - 1), the joint law of "child kept" for two children of the
    ancestor is

        W(++) = q p^s + A p^2 (1 - p^(s-2)),  W(+-) = W(-+) = A p (1 - p),  W(--) = A (1 - p)^2,

    normalised. T(+|.) carries it to the leaves: the marginal of a leaf whose ancestor at level h - 1 is known (q = 1)
    or excluded (q = 0). Then C(h) = 4 (T W T' - P_0^2), and C(0) = 4 P_0 (1 - P_0).
    """
    up = upward_beliefs(epsilon, v, m, s, depth)
    down = downward_beliefs(up, 1 / v, v, m, s)
    kept = combine(up[0], down[0], v)
    found = [4 * kept * (1 - kept)]
    for h in range(1, depth + 1):
        p, q = up[h - 1], down[h]
        others = (m - q) / (v**s - 1)
        both, one, none = q * p**s + others * p**2 * (1 - p ** (s - 2)), others * p * (1 - p), others * (1 - p) ** 2
        joint = np.array([[both, one], [one, none]]) / (both + 2 * one + none)
        to_leaf = np.array([combine(up[0], downward_beliefs(up[:h], known, v, m, s)[0], v) for known in (1.0, 0.0)])
        found.append(float(4 * (to_leaf @ joint @ to_leaf - kept**2)))
    return found


def susceptibility(epsilon: float, v: int, m: int, s: int, depth: int) -> float:
    """chi = 1 + sum_h (s - 1) s^(h-1) C(h) / C(0): how many leaves change together."""
    covariances = correlations(epsilon, v, m, s, depth)
    return 1 + sum((s - 1) * s ** (h - 1) * covariances[h] for h in range(1, depth + 1)) / covariances[0]
