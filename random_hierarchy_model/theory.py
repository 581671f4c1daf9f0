"""What survives noise on the leaves of a tree, measured with exact inference.

Every function measures one `Part`, a few data of one grammar, and returns an array whose first axis is the data.
Grammars are independent, so averages and standard errors follow from the means over each grammar's data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from guided_diffusion.correlations import jackknife, ratio
from guided_diffusion.errors import UserError
from guided_diffusion.forward_backward import noise_seed
from guided_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType, get_named_beta_schedule
from guided_diffusion.respace import SpacedDiffusion, space_timesteps

import numpy as np
import torch
from torch import Tensor

from .belief_propagation import infer
from .changes import changes
from .curves import fraction_equal, fraction_kept, probability_kept
from .denoiser import ExactDenoiser
from .grammar import Grammar
from .images import TreeImages
from .leaf_noise import (
    OneHotDenoiser,
    epsilon_log_likelihoods,
    gaussian_log_likelihoods,
    masking_log_likelihoods,
    one_hot,
    read_one_hot,
)

DIFFUSION_STEPS = 1000  # of the original diffusion, with the linear schedule
BETAS = get_named_beta_schedule("linear", DIFFUSION_STEPS)
SIGNAL = np.cumprod(1 - BETAS)  # abar of its timesteps
SAMPLES_AT_ONCE = 8  # masks per inference: more need more memory, and are no faster
MOST_PROBABILITIES = 2**23  # v m s^L: an inference takes about 50 bytes for each


@dataclass(frozen=True)
class Part:
    """Some data of a grammar: the derivations number `start` to `start` + `count` - 1 of `seed`."""

    grammar: Grammar
    start: int
    count: int
    seed: int

    def derivations(self) -> list[Tensor]:
        """The symbols of every level, level 0 first: int64 (D, s^L), ..., (D, 1)."""
        return [torch.from_numpy(level) for level in self.grammar.sample(self.count, self.seed, self.start)]

    def generator(self, purpose: str, number: int = 0) -> torch.Generator:
        """Random numbers for a purpose, such as the name of a noise, unrelated to those of other parts."""
        return torch.Generator().manual_seed(noise_seed(self.seed, f"{purpose} {self.grammar} {self.start}", number))


def check_size(grammar: Grammar) -> None:
    """Raise UserError if inference would need more than about half a gigabyte per datum."""
    size = grammar.num_symbols * grammar.num_synonyms * grammar.num_leaves
    if size > MOST_PROBABILITIES:
        raise UserError(
            f"{grammar.num_symbols} symbols, {grammar.num_synonyms} synonyms, branching {grammar.branching} and depth "
            f"{grammar.depth} give v m s^L = {size} numbers per datum, more than {MOST_PROBABILITIES}: "
            "choose a smaller --depth"
        )


# Averages


def independent(values: np.ndarray) -> np.ndarray:
    """Means of independent units, (U, ...), of values (grammars, data, ...): grammars, or the data of a single one."""
    return values.mean(axis=1) if len(values) > 1 else values[0]


def mean_and_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean of values (grammars, data, ...) and its standard error, (...) each."""
    units = independent(values)
    return units.mean(axis=0), units.std(axis=0, ddof=1) / len(units) ** 0.5


# Marginals


def marginals(part: Part, process: str, noises: Sequence[float]) -> np.ndarray:
    """Posterior probability of the true symbols, a mean over each level: (D, noises, L + 1), level 0 first.

    Args:
        part: data.
        process: key of `PROCESSES`.
        noises: e of "epsilon", masked fractions of "masking", times k/N of "gaussian".
    """
    true = part.derivations()
    kept = [infer(part.grammar, seen).probability_of(true) for seen in PROCESSES[process](part, true[0], noises)]
    return torch.stack(kept, dim=1).numpy()


def epsilon_seen(part: Part, leaves: Tensor, noises: Sequence[float]) -> Iterator[Tensor]:
    """log psi (D, n, v) of the leaves at each e."""
    for epsilon in noises:
        yield epsilon_log_likelihoods(leaves, epsilon, part.grammar.num_symbols)


def masking_seen(part: Part, leaves: Tensor, noises: Sequence[float]) -> Iterator[Tensor]:
    """log psi (D, n, v) with each leaf masked independently: those masked at one fraction are masked at higher ones."""
    threshold = torch.rand(leaves.shape, generator=part.generator("masking"), dtype=torch.float64)
    for fraction in noises:
        yield masking_log_likelihoods(leaves, threshold < fraction, part.grammar.num_symbols)


def gaussian_seen(part: Part, leaves: Tensor, noises: Sequence[float]) -> Iterator[Tensor]:
    """log psi (D, n, v) at each time k/N, of `noised_one_hot`."""
    for time, x in zip(noises, noised_one_hot(part, leaves, noises), strict=True):
        yield gaussian_log_likelihoods(x, SIGNAL[last_timestep(time)])


PROCESSES: dict[str, Callable[[Part, Tensor, Sequence[float]], Iterator[Tensor]]] = {
    "epsilon": epsilon_seen,
    "masking": masking_seen,
    "gaussian": gaussian_seen,
}


# Diffusion loops


def last_timestep(time: float) -> int:
    """The original timestep whose noise x_k has: k - 1 for k = N k/N."""
    return round(DIFFUSION_STEPS * time) - 1


def noised_one_hot(part: Part, leaves: Tensor, times: Sequence[float]) -> Iterator[Tensor]:
    """x = sqrt(abar) onehot + sqrt(1 - abar) eps at each time k/N, (D, v, n), with the same eps at all of them."""
    clean = one_hot(leaves, part.grammar.num_symbols)
    eps = torch.randn(clean.shape, generator=part.generator("gaussian"))
    for time in times:
        abar = float(SIGNAL[last_timestep(time)])
        yield abar**0.5 * clean + (1 - abar) ** 0.5 * eps


def chain(last: int, steps: int, predicts: ModelMeanType) -> SpacedDiffusion:
    """A diffusion that leads from the original timestep `last` to clean data in `steps` steps, uniform in t.

    DDPM has the posterior variance (fixed small). Raises UserError for less than one step.
    """
    if steps < 1:
        raise UserError(f"a chain of {steps} steps from timestep {last}: expected one step or more")
    return SpacedDiffusion(
        use_timesteps={last} if steps == 1 else space_timesteps(last + 1, [min(steps, last + 1)]),
        betas=BETAS,
        model_mean_type=predicts,
        model_var_type=ModelVarType.FIXED_SMALL,
        loss_type=LossType.MSE,
    )


def gaussian_loop(part: Part, times: Sequence[float], steps: int) -> np.ndarray:
    """Fraction of each level's symbols that the loop with the exact denoiser keeps: (D, times, L + 1), level 0 first.

    It starts from the x_k of `marginals`.

    Args:
        part: data.
        times: k/N.
        steps: N, of the whole chain; from time k/N there are round(N k/N) steps.
    """
    true = part.derivations()
    model = OneHotDenoiser(part.grammar, SIGNAL)
    found = []
    for time, x in zip(times, noised_one_hot(part, true[0], times), strict=True):
        diffusion = chain(last_timestep(time), round(steps * time), ModelMeanType.START_X)
        back = denoise(diffusion, model, x, part.generator(f"loop of {steps} steps", round(DIFFUSION_STEPS * time)))
        found.append(fraction_equal(read_one_hot(part.grammar, back), true))
    return torch.stack(found, dim=1).numpy()


def image_loop(part: Part, patch_size: int, k: int, of: int, steps: int, sampler: str = "ddpm") -> np.ndarray:
    """What the loop with the exact denoiser keeps of images, then the exact probability: (D, 2, L + 1), level 0 first.

    Args:
        part: data; branching 4.
        patch_size: side of the patch of a leaf, in pixels.
        k, of: time of reversal, k steps of a chain of `of`; determines x_k.
        steps: N, of the whole chain that denoises; from x_k there are round(N k / of) steps.
        sampler: key of `gaussian_diffusion.SAMPLERS`.
    """
    images = TreeImages(part.grammar, patch_size)
    last = sorted(space_timesteps(DIFFUSION_STEPS, [of]))[k - 1]
    abar = float(SIGNAL[last])
    true = part.derivations()
    x = images.render(true[0])
    x = abar**0.5 * x + (1 - abar) ** 0.5 * torch.randn(x.shape, generator=part.generator("image", k))
    diffusion = chain(last, round(steps * k / of), ModelMeanType.EPSILON)
    back = denoise(diffusion, ExactDenoiser(images, SIGNAL), x, part.generator(f"loop of {steps} steps", k), sampler)
    both = fraction_kept(images, back, true), probability_kept(images, x, abar, true)
    return torch.stack(both, dim=1).flip(2).numpy()


def denoise(
    diffusion: SpacedDiffusion,
    model: Callable[..., Tensor],
    x: Tensor,
    generator: torch.Generator,
    sampler: str = "ddpm",
) -> Tensor:
    """x after all steps of a chain."""
    options = {"noise": x, "clip_denoised": False, "generator": generator}
    for step in diffusion.loop_of(sampler)(model, tuple(x.shape), diffusion.num_timesteps, **options):
        x = step["sample"]
    return x


# Correlations of changes


def variances_by_level(part: Part, process: str, noises: Sequence[float], samples: int) -> np.ndarray:
    """V_h = sum_ij C_ij over the pairs of leaves with a common ancestor at level h or below: (D, noises, L + 1).

    C_ij is the covariance of the changes, +1 or -1, over `samples` samples of each datum; sum_i C_ii = V_0.

    Args:
        part: data.
        process: "epsilon", or "masking", where each sample has a mask of its own.
        noises: e or masked fractions.
        samples: M, 2 or more.
    """
    g, sample = part.grammar, SAMPLERS[process]
    leaves = part.derivations()[0]
    found = np.empty((part.count, len(noises), g.depth + 1))
    for number, noise in enumerate(noises):
        generator = part.generator(f"changes {process} {noise}")
        drawn = sample(g, leaves, noise, samples, generator)  # (D, M, n)
        sigma = changes(drawn, leaves)
        for level in range(g.depth + 1):
            groups = sigma.unflatten(2, (g.num_nodes(level), -1)).sum(3)  # (D, M, nodes)
            found[:, number, level] = groups.var(dim=1, correction=1).sum(1).numpy()
    return found


def epsilon_samples(g: Grammar, leaves: Tensor, epsilon: float, count: int, generator: torch.Generator) -> Tensor:
    """Posterior samples of leaves (D, n) at noise e: (D, count, n)."""
    return infer(g, epsilon_log_likelihoods(leaves, epsilon, g.num_symbols)).samples(generator, count)[0]


def masking_samples(g: Grammar, leaves: Tensor, fraction: float, count: int, generator: torch.Generator) -> Tensor:
    """Posterior samples of leaves (D, n), each with its own random mask: (D, count, n)."""
    drawn = []
    for some in leaves.repeat_interleave(count, dim=0).split(SAMPLES_AT_ONCE):
        masked = torch.rand(some.shape, generator=generator, dtype=torch.float64) < fraction
        drawn.append(infer(g, masking_log_likelihoods(some, masked, g.num_symbols)).sample(generator)[0])
    return torch.cat(drawn).unflatten(0, (-1, count))


SAMPLERS = {"epsilon": epsilon_samples, "masking": masking_samples}


def susceptibility(variances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """chi = V_L / V_0 of variances (grammars, data, noises, L + 1) and its standard error: (noises,) each.

    NaN where no leaf ever changes.
    """
    units = independent(variances)

    def chi(all_pairs: np.ndarray, own: np.ndarray) -> float:
        return ratio(all_pairs, own) if own.any() else np.nan

    found = [jackknife(chi, units[:, e, -1], units[:, e, 0]) for e in range(units.shape[1])]
    return np.array([value for value, _ in found]), np.array([error for _, error in found])


def correlation_by_level(variances: np.ndarray, branching: int) -> tuple[np.ndarray, np.ndarray]:
    """C(h)/C(0) of variances (grammars, data, L + 1), and its standard error: (L + 1,) each.

    C(h), the mean covariance of two leaves whose lowest common ancestor is at level h, is
    (V_h - V_(h-1)) / (s^L (s - 1) s^(h-1)), and C(0) = V_0 / s^L. NaN where no leaf ever changes.
    """
    levels = np.arange(variances.shape[-1])
    pairs = np.where(levels == 0, 1.0, (branching - 1) * branching ** (levels - 1.0))  # per leaf

    def relative(units: np.ndarray) -> np.ndarray:
        covariance = np.diff(units.mean(axis=0), prepend=0) / pairs
        return covariance / (covariance[0] or np.nan)

    return jackknife(relative, independent(variances))
