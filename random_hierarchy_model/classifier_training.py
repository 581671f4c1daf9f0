"""Training a classifier to read images, intact and corrupted, as exact inference does."""

from __future__ import annotations

from typing import Any

from guided_diffusion.train_util import Cond, TrainLoop

import torch
import torch.nn.functional as F
from torch import Tensor

from .belief_propagation import read_posterior
from .classifier import enlarge
from .images import TreeImages

MAX_REPLACED = 0.5  # largest fraction of leaves replaced
MAX_NOISE = 0.3  # largest standard deviation of the noise on pixels of +1 and -1


class ReadingLoop(TrainLoop):
    """Trains a classifier on images of a grammar with some leaves replaced at random, more for larger t.

    Samples of a diffusion model may lack a derivation, yet their class is read by `read_posterior`: this posterior is
    the target of the cross-entropy, a one-hot vector for images of the grammar.

    Logs the means of "loss", the cross-entropy minus the entropy of the target, in nats, and of "agrees", whether
    network and target have the same top class; by quartile of t, where q0 has the fewest replaced leaves.

    Args:
        images: rendering of the derivations.
        kwargs: see `TrainLoop`.
    """

    def __init__(self, *, images: TreeImages, **kwargs: Any):
        self.images = images
        super().__init__(**kwargs)

    def compute_losses(self, x: Tensor, t: Tensor, noise: Tensor, cond: Cond) -> dict[str, Tensor]:
        """Loss terms, (B,) each, of images x (B, 3, H, W), corrupted in proportion to t (B,)."""
        severity = t / (self.diffusion.num_timesteps - 1)
        x = self.replace_leaves(x, severity * MAX_REPLACED, noise) + MAX_NOISE * severity.view(-1, 1, 1, 1) * noise
        target = read_posterior(self.images, x).root.float()  # (B, v)
        logits = self.ddp_model(enlarge(x)).float()
        loss = F.cross_entropy(logits, target, reduction="none") - torch.special.entr(target).sum(dim=1)
        return {"loss": loss, "agrees": (logits.argmax(dim=1) == target.argmax(dim=1)).float()}

    def replace_leaves(self, x: Tensor, fraction: Tensor, noise: Tensor) -> Tensor:
        """Images x with a `fraction` (B,) of their leaves, on average, replaced by random ones.

        Two of each patch's numbers in the standard normal `noise` determine whether it is replaced, and by what.
        """
        z = self.images.patches(noise)  # (B, 4^L, 3 p^2)
        u, choice = torch.special.ndtr(z[..., :2]).unbind(dim=2)  # uniform, (B, 4^L)
        symbols = (choice * self.images.grammar.num_symbols).long().clamp(max=self.images.grammar.num_symbols - 1)
        return self.images.render(torch.where(u < fraction[:, None], symbols, self.images.read_leaves(x)))
