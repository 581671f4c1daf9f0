"""Training a classifier to read images as exact inference does, whole ones and spoilt ones."""

from __future__ import annotations

from typing import Any

from guided_diffusion.train_util import Cond, TrainLoop

import torch
import torch.nn.functional as F
from torch import Tensor

from .belief_propagation import read_posterior
from .classifier import enlarge
from .images import TreeImages

MOST_WRONG = 0.5  # the largest fraction of leaves that are replaced
MOST_NOISE = 0.3  # the largest deviation of the noise upon the pixels, which are +1 and -1


class ReadingLoop(TrainLoop):
    """Trains a classifier on images of a grammar of which a part of the leaves, more with t, is replaced at random.

    What a diffusion model samples may lack a derivation, and its class is read all the same, by the posterior of
    `read_posterior`: that is the target of the cross-entropy, a one-hot vector for images of the grammar.

    The log has the means of "loss", the cross-entropy less the entropy of the target, in nats, and of "agrees",
    whether the first class of both is the same; by quartile of t, where q0 has the fewest wrong leaves.

    Args:
        images: how derivations look.
        kwargs: see `TrainLoop`.
    """

    def __init__(self, *, images: TreeImages, **kwargs: Any):
        self.images = images
        super().__init__(**kwargs)

    def compute_losses(self, x: Tensor, t: Tensor, noise: Tensor, cond: Cond) -> dict[str, Tensor]:
        """Terms of the loss, (B,) each, of images x (B, 3, H, W) spoilt as the indices t (B,) say."""
        part = t / (self.diffusion.num_timesteps - 1)
        x = self.spoilt(x, part * MOST_WRONG, noise) + MOST_NOISE * part.view(-1, 1, 1, 1) * noise
        target = read_posterior(self.images, x).root.float()  # (B, v)
        logits = self.ddp_model(enlarge(x)).float()
        loss = F.cross_entropy(logits, target, reduction="none") - torch.special.entr(target).sum(dim=1)
        return {"loss": loss, "agrees": (logits.argmax(dim=1) == target.argmax(dim=1)).float()}

    def spoilt(self, x: Tensor, wrong: Tensor, noise: Tensor) -> Tensor:
        """Images like x with a fraction `wrong` (B,) of their leaves, on average, drawn anew.

        Which ones and what comes instead are read off two of each patch's numbers of the standard normal `noise`.
        """
        z = self.images.patches(noise)  # (B, 4^L, 3 p^2)
        which, other = torch.special.ndtr(z[..., :2]).unbind(dim=2)  # uniform, (B, 4^L)
        symbols = (other * self.images.grammar.num_symbols).long().clamp(max=self.images.grammar.num_symbols - 1)
        return self.images.render(torch.where(which < wrong[:, None], symbols, self.images.read_leaves(x)))
