"""Training a classifier of noised images, for guidance (Dhariwal and Nichol 2021, arXiv:2105.05233, section 4)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..train_util import Cond, TrainLoop, step_seed


class ClassifierTrainLoop(TrainLoop):
    """Trains a classifier on images noised to random times, each with its class cond["y"].

    The log has the means of train_loss, train_acc@1 and train_acc@5, over all images and by quartile of t, and the same
    of the validation images as val_...

    Args:
        noised: whether the images are noised; if not, the classifier is told t = 0.
        val_data: validation images, as `data`; None: no validation.
        eval_interval: number of steps between two batches of validation images.
        kwargs: see `TrainLoop`.
    """

    prefix = "train_"

    def __init__(
        self,
        *,
        noised: bool = True,
        val_data: Iterable[tuple[Tensor, Cond]] | None = None,
        eval_interval: int = 5,
        **kwargs: Any,
    ):
        self.noised = noised
        self.eval_interval = eval_interval
        self.val_data = None if val_data is None else iter(val_data)
        super().__init__(**{"ema_rate": "", **kwargs})
        if hasattr(self.val_data, "seek"):
            self.val_data.seek(self.step // eval_interval * self.global_batch)

    def run_step(self, batch: Tensor, cond: Cond) -> None:
        """One step of the optimiser, and after every `eval_interval` of them a batch of validation images."""
        super().run_step(batch, cond)
        if self.val_data is not None and self.step % self.eval_interval == 0:
            self.evaluate(*next(self.val_data))

    def compute_losses(self, x: Tensor, t: Tensor, noise: Tensor, cond: Cond) -> dict[str, Tensor]:
        """Cross-entropy in nats, "loss", and whether the class is the first ("acc@1") or among five: each (B,)."""
        return self._terms(self.ddp_model, x, t, noise, cond["y"])

    @torch.no_grad()
    def evaluate(self, batch: Tensor, cond: Cond) -> None:
        """Count a batch of validation images into the log, noised by other noise than that of training."""
        seed = step_seed(self.seed, "validation")
        t, weights = self.time_steps(seed, len(batch))
        noise = self.noise(batch.shape, seed)
        self.model.eval()
        with self.mp_trainer.autocast():
            terms = self._terms(self.model, batch.to(self.device), t, noise, cond["y"].to(self.device))
        self.model.train()
        weighted = {f"val_{name}": value * weights for name, value in terms.items()}
        self.meter.add(weighted, t, self.diffusion.num_timesteps)

    def _terms(self, model: nn.Module, x: Tensor, t: Tensor, noise: Tensor, y: Tensor) -> dict[str, Tensor]:
        t = t if self.noised else torch.zeros_like(t)
        x = self.diffusion.q_sample(x, t, noise) if self.noised else x
        logits = model(x, self.diffusion.scale_timesteps(t)).float()  # (B, classes)
        best = logits.detach().topk(5, dim=1).indices == y[:, None]  # (B, 5)
        return {
            "loss": F.cross_entropy(logits, y, reduction="none"),
            "acc@1": best[:, 0].float(),
            "acc@5": best.any(dim=1).float(),
        }
