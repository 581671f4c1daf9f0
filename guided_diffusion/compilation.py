"""A network compiled by torch.compile: normalisation, activation and modulation in one kernel, where it pays."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import dist_util, logger
from .errors import UserError, first_line
from .inference import enough_memory

if TYPE_CHECKING:
    from .gaussian_diffusion import GaussianDiffusion
    from .unet import UNetModel

# Denoising steps of a whole run, of all its processes, below which nobody shall wait for a compiler.
MANY_STEPS = 10_000


def decide(choice: bool | str, num_images: int, batch_size: int, times: Sequence[int]) -> bool:
    """Whether a run is to compile its network: `choice` is that of the flag --compile, True, False or "auto".

    "auto" says so on a GPU, for a run of many steps. It looks at the whole run, not at what is left of it or at the
    number of processes: a compiled network rounds otherwise, and a run that goes on must write what it would have.
    """
    if choice != "auto":
        return choice
    steps = -(-num_images // batch_size) * sum(times)
    return dist_util.dev().type == "cuda" and steps >= MANY_STEPS and importlib.util.find_spec("triton") is not None


def compile_network(
    model: UNetModel, diffusion: GaussianDiffusion, batch_size: int, image_size: int
) -> Callable[..., Tensor]:
    """Compile a network, which takes a minute or more, and show it one batch.

    Args:
        model: the network, prepared by `inference.prepare`.
        diffusion: decides the times that the network is told.
        batch_size: of every batch but the last, which is filled up, so that nothing is compiled for it again.
        image_size: height and width, in pixels.

    Returns:
        what is called as the network is.

    Raises UserError where it cannot be compiled, or the GPU's memory does not hold the batch.
    """
    logger.info("compiling the network (--compile): once per run, it takes a minute or more")
    # The choice of kernels by measured speed may fall otherwise tomorrow, and with it the order of a sum.
    fixed = {"deterministic": True} if "deterministic" in torch._inductor.list_options() else {}
    compiled = torch.compile(model, fullgraph=True, dynamic=False, options=fixed)

    def call(x: Tensor, timesteps: Tensor, **conditions: Tensor) -> Tensor:
        filled = {name: _filled(values, batch_size) for name, values in conditions.items()}
        return compiled(_filled(x, batch_size), _filled(timesteps, batch_size), **filled)[: len(x)]

    device = dist_util.dev()
    first = torch.zeros(batch_size, dtype=torch.long, device=device)
    labels = {} if model.num_classes is None else {"y": first}
    try:
        with torch.no_grad(), enough_memory(batch_size):
            x = torch.zeros(batch_size, 3, image_size, image_size, device=device)
            call(x, diffusion.scale_timesteps(first), **labels)
    except UserError:
        raise
    except Exception as error:  # a compiler fails in many ways
        raise UserError(f"the network cannot be compiled: {first_line(error)}.\nUse --compile False") from error
    return call


def _filled(x: Tensor, length: int) -> Tensor:
    """x (B, ...), contiguous, its last row repeated until there are `length`."""
    return torch.cat([x, x[-1:].expand(length - len(x), *x.shape[1:])]) if len(x) < length else x.contiguous()
