"""Sampling of training timesteps: uniform, or in proportion to the loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from . import dist_util
from .errors import UserError
from .gaussian_diffusion import GaussianDiffusion


def create_named_schedule_sampler(name: str, diffusion: GaussianDiffusion) -> ScheduleSampler:
    """The sampler `name` for the timesteps of `diffusion`. Raises UserError if the name is unknown."""
    samplers = {"uniform": UniformSampler, "loss-second-moment": LossSecondMomentResampler}
    if name not in samplers:
        raise UserError(f"--schedule_sampler {name}: expected {' or '.join(samplers)}")
    return samplers[name](diffusion)


class ScheduleSampler(ABC):
    """A distribution over the N timesteps of a diffusion, which may change during training."""

    @abstractmethod
    def weights(self) -> np.ndarray:
        """Unnormalised probability of each timestep: (N,), float64, positive."""

    def sample(
        self, batch_size: int, device: torch.device | str, generator: np.random.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw timesteps t with probabilities p_t, and the importance weights 1 / (N p_t) of their losses.

        The expected weighted loss does not depend on p. The default generator is NumPy's global one.

        Returns:
            (timesteps, weights) on `device`: int64 and float32, each (batch_size,).
        """
        weights = np.asarray(self.weights(), dtype=np.float64)
        p = weights / weights.sum()
        steps = (generator or np.random).choice(len(p), size=batch_size, p=p)
        importance = 1 / (len(p) * p[steps])
        return torch.from_numpy(steps).to(device), torch.from_numpy(importance).to(device, torch.float32)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """State needed to resume training."""
        return {}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:  # noqa: B027, not every sampler learns
        """Restore a `state_dict`."""


class UniformSampler(ScheduleSampler):
    """The uniform distribution."""

    def __init__(self, diffusion: GaussianDiffusion) -> None:
        self.diffusion = diffusion
        self._weights = np.ones(diffusion.num_timesteps)

    def weights(self) -> np.ndarray:
        return self._weights


class LossAwareSampler(ScheduleSampler):
    """A sampler that adapts to the losses of all processes."""

    def update_with_local_losses(self, local_ts: torch.Tensor, local_losses: torch.Tensor) -> None:
        """Update with the losses of this process's part of a batch. All ranks must call this; B may differ.

        Args:
            local_ts: timesteps, integers (B,).
            local_losses: unweighted losses, (B,).
        """
        gathered = dist_util.gather_objects((local_ts.tolist(), local_losses.tolist()))
        self.update_with_all_losses(
            [t for ts, _ in gathered for t in ts], [loss for _, losses in gathered for loss in losses]
        )

    @abstractmethod
    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:
        """Update with the timesteps and losses of all processes, in the same order on each."""


class LossSecondMomentResampler(LossAwareSampler):
    """Draws timestep t in proportion to sqrt(E[L_t^2]), to minimise the variance of the weighted loss.

    Nichol and Dhariwal 2021, arXiv:2102.09672, section 3.3. The mean is over the latest losses at t. Until every
    timestep has a full history, the distribution is uniform.

    Args:
        diffusion: diffusion of N timesteps.
        history_per_term: number of losses to keep for each timestep.
        uniform_prob: fraction of draws from a uniform distribution, so that every timestep keeps being drawn.
    """

    def __init__(self, diffusion: GaussianDiffusion, history_per_term: int = 10, uniform_prob: float = 0.001) -> None:
        self.diffusion = diffusion
        self.history_per_term = history_per_term
        self.uniform_prob = uniform_prob
        self._loss_history = np.zeros((diffusion.num_timesteps, history_per_term))  # newest last
        self._loss_counts = np.zeros(diffusion.num_timesteps, dtype=np.int64)

    def weights(self) -> np.ndarray:
        num_steps = len(self._loss_counts)
        if not self._warmed_up():
            return np.ones(num_steps)
        weights = np.sqrt(np.mean(self._loss_history**2, axis=1))
        return (1 - self.uniform_prob) * weights / weights.sum() + self.uniform_prob / num_steps

    def _warmed_up(self) -> bool:
        """Whether every timestep has a full history."""
        return bool((self._loss_counts == self.history_per_term).all())

    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:
        for t, loss in zip(ts, losses, strict=True):
            if np.isfinite(loss):  # one overflow would corrupt all probabilities
                self._loss_history[t] = [*self._loss_history[t, 1:], loss]
                self._loss_counts[t] = min(self._loss_counts[t] + 1, self.history_per_term)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {
            "losses": torch.from_numpy(self._loss_history.copy()),
            "counts": torch.from_numpy(self._loss_counts.copy()),
        }

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore a `state_dict`. Raises UserError if its number of timesteps or losses differs."""
        saved, own = state["losses"].shape, self._loss_history.shape
        if saved != own:
            raise UserError(
                f"the checkpoint contains {saved[1]} losses for each of {saved[0]} timesteps, expected {own[1]} for "
                f"each of {own[0]} (--diffusion_steps, --timestep_respacing)"
            )
        self._loss_history = state["losses"].numpy().copy()
        self._loss_counts = state["counts"].numpy().copy()
