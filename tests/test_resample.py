"""Timestep samplers: frequencies, weights and adaptation, against numbers computed by hand."""

from guided_diffusion import dist_util
from guided_diffusion.errors import UserError
from guided_diffusion.resample import (
    LossSecondMomentResampler,
    ScheduleSampler,
    UniformSampler,
    create_named_schedule_sampler,
)
from guided_diffusion.script_util import create_gaussian_diffusion

import numpy as np
import pytest
import torch


def diffusion_of(num_steps):
    return create_gaussian_diffusion(steps=1000, timestep_respacing=str(num_steps))


class Skewed(ScheduleSampler):
    """Draws its four steps 1 : 2 : 4 : 1."""

    def weights(self):
        return np.array([1.0, 2.0, 4.0, 1.0])


def test_names():
    diffusion = diffusion_of(20)
    assert type(create_named_schedule_sampler("uniform", diffusion)) is UniformSampler
    learning = create_named_schedule_sampler("loss-second-moment", diffusion)
    assert type(learning) is LossSecondMomentResampler
    assert (learning.history_per_term, learning.uniform_prob, len(learning.weights())) == (10, 0.001, 20)
    with pytest.raises(UserError, match=r"^--schedule_sampler unifrom: expected uniform or loss-second-moment$"):
        create_named_schedule_sampler("unifrom", diffusion)


def test_uniform():
    steps, weights = UniformSampler(diffusion_of(20)).sample(40000, "cpu", np.random.default_rng(0))
    assert steps.dtype == torch.int64 and weights.dtype == torch.float32 and steps.shape == weights.shape == (40000,)
    assert (weights == 1).all()
    counts = torch.bincount(steps, minlength=20).double()
    chi_squared = ((counts - 2000) ** 2 / 2000).sum().item()
    assert len(counts) == 20 and 5 < chi_squared < 45  # 19 degrees of freedom: outside with probability 1/1000


def test_importance_weights_compensate_for_the_frequencies():
    steps, weights = Skewed().sample(40000, "cpu", np.random.default_rng(0))
    p = torch.tensor([1.0, 2.0, 4.0, 1.0]) / 8
    counts = torch.bincount(steps, minlength=4)
    # Six standard deviations, since this seed happens to give four.
    assert ((counts / 40000 - p).abs() < 6 * (p * (1 - p) / 40000).sqrt()).all()
    # 1 / (4 p): the expectation of the weighted losses is their plain mean over the steps.
    weight = torch.tensor([2.0, 1.0, 0.5, 2.0])
    np.testing.assert_array_equal(weights, weight[steps])
    losses = torch.tensor([3.0, -1.0, 10.0, 0.5])
    assert (p * weight * losses).sum() == losses.mean()


def test_the_generator_decides_the_draws():
    def draw(seed):
        return Skewed().sample(100, "cpu", None if seed is None else np.random.default_rng(seed))[0]

    # Inverse transform sampling: a uniform number is located in the cumulative distribution.
    sums = np.array([1, 3, 7, 8]) / 8
    np.testing.assert_array_equal(draw(3), np.searchsorted(sums, np.random.default_rng(3).random(100), side="right"))
    assert not torch.equal(draw(3), draw(4)) and not torch.equal(draw(None), draw(None))


def test_second_moment_of_the_last_losses():
    sampler = LossSecondMomentResampler(diffusion_of(3), history_per_term=2, uniform_prob=0.1)
    sampler.update_with_all_losses([0, 0, 0, 1, 1], [100.0, 3.0, 4.0, 5.0, 5.0])
    np.testing.assert_array_equal(sampler.weights(), [1, 1, 1])  # no loss at t = 2 yet
    sampler.update_with_all_losses([2], [1.0])
    np.testing.assert_array_equal(sampler.weights(), [1, 1, 1])  # one loss is not enough
    sampler.update_with_all_losses([2], [-7.0])
    # sqrt((9 + 16) / 2), sqrt((25 + 25) / 2), sqrt((1 + 49) / 2): 1 : sqrt 2 : sqrt 2
    shares = np.array([1, 2**0.5, 2**0.5]) / (1 + 2 * 2**0.5)
    weights = sampler.weights()
    assert weights.dtype == np.float64
    np.testing.assert_allclose(weights, 0.9 * shares + 0.1 / 3, rtol=1e-14)
    sampler.update_with_all_losses([0, 0], [5.0, 5.0])
    np.testing.assert_allclose(sampler.weights(), 1 / 3, rtol=1e-14)


def test_every_draw_of_a_steady_loss_weighs_the_same():
    """If losses depend only on the timestep, the weighted loss has no variance."""
    losses = np.geomspace(1e-3, 10, 20)
    sampler = LossSecondMomentResampler(diffusion_of(20), uniform_prob=0)
    for _ in range(10):
        sampler.update_with_all_losses(range(20), losses)
    steps, weights = sampler.sample(500, "cpu", np.random.default_rng(0))
    np.testing.assert_allclose(weights.numpy() * losses[steps.numpy()], losses.mean(), rtol=1e-6)
    assert len(steps.unique()) > 5


def test_non_finite_losses_are_ignored():
    sampler = LossSecondMomentResampler(diffusion_of(2), history_per_term=1)
    sampler.update_with_all_losses([0, 1, 0, 1], [1.0, float("nan"), float("inf"), 1.0])
    np.testing.assert_allclose(sampler.weights(), 0.5, rtol=1e-14)


def test_losses_of_all_ranks_are_used_in_rank_order(monkeypatch):
    """Of three losses, the last two are kept."""
    monkeypatch.setattr(dist_util, "gather_objects", lambda mine: [([0, 0], [8.0, 1.0]), mine])
    sampler = LossSecondMomentResampler(diffusion_of(2), history_per_term=2, uniform_prob=0)
    sampler.update_with_all_losses([1, 1], [1.0, 1.0])
    sampler.update_with_local_losses(torch.tensor([0]), torch.tensor([7.0]))
    np.testing.assert_allclose(sampler.weights(), np.array([5, 1]) / 6, rtol=1e-14)  # sqrt((1 + 49) / 2) : 1


def test_losses_of_one_process():
    sampler = LossSecondMomentResampler(diffusion_of(2), history_per_term=1, uniform_prob=0)
    sampler.update_with_local_losses(torch.tensor([1, 0]), torch.tensor([3.0, 1.0], dtype=torch.bfloat16))
    np.testing.assert_allclose(sampler.weights(), [0.25, 0.75], rtol=1e-14)


def test_state_is_restored(tmp_path):
    rng = np.random.default_rng(0)
    first, second = (LossSecondMomentResampler(diffusion_of(4), history_per_term=3) for _ in range(2))
    first.update_with_all_losses([0, 1, 2, 3] * 2, rng.random(8))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    held, before = first.state_dict(), torch.load(tmp_path / "state.pt", weights_only=True)
    rest = [2, 1, 0, 3, 3], rng.random(5)
    first.update_with_all_losses(*rest)

    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    np.testing.assert_array_equal(second.weights(), np.ones(4))
    second.update_with_all_losses(*rest)
    assert len(set(second.weights())) == 4
    np.testing.assert_array_equal(first.weights(), second.weights())
    # Later updates do not change a saved state.
    assert held["counts"].tolist() == [2, 2, 2, 2] and torch.equal(held["losses"], before["losses"])

    with pytest.raises(
        UserError, match=r"contains 3 losses for each of 4 timesteps, expected 3 for each of 5 \(--diffusion_steps"
    ):
        LossSecondMomentResampler(diffusion_of(5), history_per_term=3).load_state_dict(held)


def test_the_uniform_sampler_has_an_empty_state():
    sampler = UniformSampler(diffusion_of(2))
    assert sampler.state_dict() == {}
    sampler.load_state_dict({})
