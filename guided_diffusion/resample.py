"""How training chooses the time steps of a batch: uniformly, or more often where the loss is large."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from . import dist_util
from .errors import UserError
from .gaussian_diffusion import GaussianDiffusion


def create_named_schedule_sampler(name: str, diffusion: GaussianDiffusion) -> ScheduleSampler:
    """The sampler of that name for the steps of `diffusion`. Raises UserError for an unknown name."""
    samplers = {"uniform": UniformSampler, "loss-second-moment": LossSecondMomentResampler}
    if name not in samplers:
        raise UserError(f"--schedule_sampler is {name!r}; expected {' or '.join(samplers)}")
    return samplers[name](diffusion)


class ScheduleSampler(ABC):
    """A distribution over the T steps of a diffusion. It may change during training; the expected loss does not."""

    @abstractmethod
    def weights(self) -> np.ndarray:
        """How often each step is drawn, up to a common factor: (T,), float64, positive."""

    def sample(
        self, batch_size: int, device: torch.device | str, generator: np.random.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw steps t with the probabilities p, and the weights 1 / (T p_t) of their losses.

        The mean of the weighted losses has the expectation of the mean loss over all steps, whatever p is. Without a
        `generator`, NumPy's global one draws, which `numpy.random.seed` sets.

        Returns:
            (steps, weights) on `device`: int64 and float32 of shape (batch_size,).
        """
        weights = self.weights()
        p = weights / weights.sum()
        steps = (generator or np.random).choice(len(p), size=batch_size, p=p)
        importance = 1 / (len(p) * p[steps])
        return torch.from_numpy(steps).to(device), torch.from_numpy(importance).to(device, torch.float32)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a run that goes on must know of the losses so far."""
        return {}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:  # noqa: B027, not every sampler learns
        """Go on from a `state_dict`."""


class UniformSampler(ScheduleSampler):
    """Every step is as likely as any other."""

    def __init__(self, diffusion: GaussianDiffusion) -> None:
        self.diffusion = diffusion
        self._weights = np.ones(diffusion.num_timesteps)

    def weights(self) -> np.ndarray:
        return self._weights


class LossAwareSampler(ScheduleSampler):
    """A sampler that learns from the losses, each process from those of all."""

    def update_with_local_losses(self, local_ts: torch.Tensor, local_losses: torch.Tensor) -> None:
        """Tell the losses of this process's part of a batch. All ranks must call this, with as many as they have.

        Args:
            local_ts: the steps, integers of shape (B,).
            local_losses: their losses without the weights, (B,).
        """
        gathered = dist_util.gather_objects((local_ts.tolist(), local_losses.tolist()))
        self.update_with_all_losses(
            [t for ts, _ in gathered for t in ts], [loss for _, losses in gathered for loss in losses]
        )

    @abstractmethod
    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:
        """Learn from the steps and losses of all processes, which come in the same order on each."""


class LossSecondMomentResampler(LossAwareSampler):
    """Draws step t in proportion to sqrt(E[L_t^2]), which makes the variance of the weighted loss least.

    Nichol and Dhariwal, "Improved denoising diffusion probabilistic models", arXiv:2102.09672, section 3.3. The mean is
    over the last losses of each step; until every step has as many as are kept, all are equally likely.

    Args:
        diffusion: of T steps.
        history_per_term: how many losses are kept of each step.
        uniform_prob: the share of draws that are uniform, so that no step is forgotten.
    """

    def __init__(self, diffusion: GaussianDiffusion, history_per_term: int = 10, uniform_prob: float = 0.001) -> None:
        self.diffusion = diffusion
        self.history_per_term = history_per_term
        self.uniform_prob = uniform_prob
        self._losses = np.zeros((diffusion.num_timesteps, history_per_term))  # of each step, the newest last
        self._counts = np.zeros(diffusion.num_timesteps, dtype=np.int64)

    def weights(self) -> np.ndarray:
        num_steps = len(self._counts)
        if self._counts.min() < self.history_per_term:
            return np.ones(num_steps)
        weights = np.sqrt(np.mean(self._losses**2, axis=1))
        return (1 - self.uniform_prob) * weights / weights.sum() + self.uniform_prob / num_steps

    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:
        for t, loss in zip(ts, losses, strict=True):
            if np.isfinite(loss):  # one overflow would spoil the step's weight, and so all
                self._losses[t] = [*self._losses[t, 1:], loss]
                self._counts[t] = min(self._counts[t] + 1, self.history_per_term)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"losses": torch.from_numpy(self._losses.copy()), "counts": torch.from_numpy(self._counts.copy())}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from a `state_dict`. Raises UserError where it is of another number of steps or of losses."""
        saved, own = state["losses"].shape, self._losses.shape
        if saved != own:
            raise UserError(
                f"the checkpoint holds {saved[1]} losses for each of {saved[0]} time steps; expected {own[1]} for each "
                f"of {own[0]} (--diffusion_steps, --timestep_respacing)"
            )
        self._losses = state["losses"].numpy().copy()
        self._counts = state["counts"].numpy().copy()
