"""Training a classifier of noised images, for guidance (Dhariwal and Nichol 2021, arXiv:2105.05233, section 4)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compute.transfer import upload
from ..train_util import Cond, TrainLoop, step_seed


class ClassifierTrainLoop(TrainLoop):
    """Trains a classifier on images noised to random timesteps, each with its class cond["y"].

    Logs the means of train_loss, train_acc@1 and train_acc@5, overall and by quartile of t, and of the same for
    validation images as val_...

    Args:
        noised: whether to noise the images; if not, the classifier gets t = 0.
        val_data: validation batches, like `data`; None: no validation.
        eval_interval: number of steps between validation batches.
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
        """Take an optimizer step; every `eval_interval` steps, evaluate a validation batch."""
        super().run_step(batch, cond)
        if self.val_data is not None and self.step % self.eval_interval == 0:
            self.evaluate(*next(self.val_data))

    def compute_losses(self, x: Tensor, t: Tensor, noise: Tensor, cond: Cond) -> dict[str, Tensor]:
        """Cross-entropy in nats, "loss", and top-1 and top-5 accuracy, "acc@1" and "acc@5": (B,) each."""
        y = cond["y"]
        if self.noised:
            x = self.diffusion.q_sample(x, t, noise)
        else:
            t = torch.zeros_like(t)
        logits = self.ddp_model(x, self.diffusion.scale_timesteps(t)).float()  # (B, classes)
        hits = logits.detach().topk(5, dim=1).indices == y[:, None]  # (B, 5)
        return {
            "loss": F.cross_entropy(logits, y, reduction="none"),
            "acc@1": hits[:, 0].float(),
            "acc@5": hits.any(dim=1).float(),
        }

    @torch.no_grad()
    def evaluate(self, batch: Tensor, cond: Cond) -> None:
        """Add a validation batch to the log, with noise independent of training's."""
        seed = step_seed(self.seed, "validation")
        t, weights = self.draw_timesteps(seed, len(batch))
        noise = self.draw_noise(batch.shape, seed)
        self.model.eval()
        with self.mp_trainer.autocast():
            losses = self.compute_losses(upload(batch, self.device), t, noise, {"y": upload(cond["y"], self.device)})
        self.model.train()
        terms = {f"val_{name}": value for name, value in self._for_each_image(losses, len(batch)).items()}
        self.meter.add(terms, t, self.diffusion.num_timesteps, weights=weights)
