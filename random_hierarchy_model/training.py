"""Training a network on images of a grammar towards the optimal prediction, which is known exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from guided_diffusion.dist_util import get_rank, get_world_size
from guided_diffusion.errors import UserError
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, ModelMeanType, ModelVarType
from guided_diffusion.nn import mean_flat
from guided_diffusion.train_util import Cond, TrainLoop

import torch
from torch import Tensor

from .denoiser import optimal_eps, posterior_mean
from .grammar import Grammar
from .images import TreeImages


def images_from_flags(flags: Mapping[str, Any]) -> TreeImages:
    """Renderer described by flags such as `demo.GRAMMAR_FLAGS`. Raises UserError if they are out of range."""
    grammar = Grammar(flags["num_symbols"], 4, flags["depth"], flags["num_synonyms"], flags["grammar_seed"])
    return TreeImages(grammar, flags["patch_size"])


class ImageStream:
    """Endless batches of images of a grammar: (images, {}), with images float32 (batch_size, 3, H, W), +1 or -1.

    Each image depends only on the seed and its position. Processes take the positions in turn, a batch each.

    Attributes:
        position: number of images taken by all processes.
        digest: identity of the images.

    Args:
        images: rendering of the derivations.
        batch_size: images per batch of each process.
        seed: seed of the derivations.
    """

    def __init__(self, images: TreeImages, batch_size: int, seed: int):
        self.position = 0
        self.digest = repr((images, "derivations of seed", seed))
        self._images, self._batch_size, self._seed = images, batch_size, seed

    def seek(self, position: int) -> None:
        """Start the next batch at `position`."""
        self.position = position

    def __iter__(self) -> ImageStream:
        return self

    def __next__(self) -> tuple[Tensor, Cond]:
        start = self.position + get_rank() * self._batch_size
        self.position += get_world_size() * self._batch_size
        return self._images.render(self._images.grammar.sample(self._batch_size, self._seed, start)[0]), {}


class ExactTargetLoop(TrainLoop):
    """Trains a model on images of a grammar, with target E[x_0 | x_t] instead of x_0, or E[eps | x_t] instead of eps.

    The difference x_0 - E[x_0 | x_t] has mean 0 given x_t, so in expectation

        |model(x_t) - x_0|^2 = |model(x_t) - E[x_0 | x_t]|^2 + a constant.

    Both losses have the same expected gradient and the same minimum, but the second has less noisy gradients (none for
    the optimal model), and its minimum is 0. The same applies to eps. A learned variance depends on the images
    themselves: its loss is the usual one, "vb".

    Args:
        images: rendering of the derivations.
        kwargs: see `TrainLoop`.

    Raises UserError if the model predicts something else.
    """

    def __init__(self, *, images: TreeImages, diffusion: GaussianDiffusion, **kwargs: Any):
        if diffusion.model_mean_type is ModelMeanType.PREVIOUS_X or diffusion.loss_type.is_vb():
            raise UserError("--use_kl True: expected a squared error of the image or of the noise as the loss")
        self.images = images
        super().__init__(diffusion=diffusion, **kwargs)
        self._signal = torch.from_numpy(diffusion.alphas_cumprod).to(self.device)

    def compute_losses(self, x: Tensor, t: Tensor, noise: Tensor, cond: Cond) -> dict[str, Tensor]:
        """Losses of images x (B, 3, H, W) at timesteps t (B,), each (B,).

        "loss" is the mean squared error; if the variance is learned, it is the sum of "mse" and the rescaled "vb".
        """
        x_t = self.diffusion.q_sample(x, t, noise)
        optimum = posterior_mean if self.diffusion.model_mean_type is ModelMeanType.START_X else optimal_eps
        target = optimum(self.images, x_t, self._signal[t]).to(x.dtype)
        output = self.ddp_model(x_t, self.diffusion.scale_timesteps(t), **cond)
        mse = mean_flat((output[:, : x.shape[1]] - target) ** 2)
        if self.diffusion.model_var_type not in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE):
            return {"loss": mse}
        usual = self.diffusion.training_losses(lambda *_: output, x, t, noise=noise)
        return {"loss": mse + (usual["loss"] - usual["mse"]), "mse": mse, "vb": usual["vb"]}
