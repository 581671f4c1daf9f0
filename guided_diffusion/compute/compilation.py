"""A network compiled by torch.compile: normalisation, activation and modulation in one kernel, where it pays."""

from __future__ import annotations

import os
import re
import sysconfig
import tempfile
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import dist_util, logger
from ..errors import UserError, first_line
from ..gaussian_diffusion import GaussianDiffusion
from ..unet import UNetModel
from .memory import enough_memory

# Denoising steps of a whole run, of all its processes, below which nobody shall wait for a compiler.
MANY_STEPS = 10_000


def decide(
    choice: bool | str, num_images: int, batch_size: int, times: Sequence[int], recorded: bool | None = None
) -> bool:
    """Whether a run compiles its network: one answer for all ranks, all of which must call this.

    Args:
        choice: the flag --compile, True, False or "auto".
        num_images: images of the whole run, at each time.
        batch_size: images that are denoised together.
        times: the numbers of steps to take back.
        recorded: what the run on record did; None if this run is new.

    "auto" does as the run on record did: a compiled network rounds differently. A new run is compiled on a GPU if it
    has many steps, all of its processes together, and if every rank can compile; if not, there is a warning. Call this
    before a folder of results is touched: whether every rank can compile is tried here.

    Raises UserError if the network has to be compiled, by the flag or the record, and a rank cannot.
    """
    steps = -(-num_images // batch_size) * sum(times)
    must = recorded if choice == "auto" else choice

    def wanted() -> bool:
        return _on_gpu() and steps >= MANY_STEPS if must is None else must

    if not dist_util.on_main(wanted):
        return False
    problems = dist_util.gather_objects(why_not())
    rank = next((rank for rank, problem in enumerate(problems) if problem), None)
    if rank is None:
        return True
    problem = f"the network cannot be compiled{f' on rank {rank}' if len(problems) > 1 else ''}: {problems[rank]}"
    if must is None:
        logger.warn(f"{problem}.\nThis run continues uncompiled, which is slower (--compile auto)")
        return False

    def stop() -> None:
        if recorded:
            raise UserError(
                f"{problem}.\nThe run on record was compiled and can only be resumed compiled: install what is "
                "missing, or choose another --output"
            )
        raise UserError(f"{problem}.\nInstall what is missing, or use --compile False")

    return dist_util.on_main(stop)


def _on_gpu() -> bool:
    return dist_util.dev().type == "cuda"


def why_not() -> str:
    """Why this process cannot compile for its device; empty if it can.

    It compiles a tiny function, which takes seconds. Kernels that earlier runs left are not used: they would hide
    that the compiler is gone.
    """

    def tiny(x: Tensor) -> Tensor:
        return x * x.mean(dim=1, keepdim=True)

    try:
        from torch._inductor.utils import fresh_inductor_cache  # private, but in all versions from 2.6 on

        if where := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
            os.makedirs(where, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=where, ignore_cleanup_errors=True)
        with temporary as folder, fresh_inductor_cache(dir=folder, delete=False):
            try:
                _compiled(tiny)(torch.ones(8, 64, device=dist_util.dev())).sum().item()
            except Exception as error:  # a compiler fails in many ways
                return _reason(error)
    except Exception as error:  # even its import does, if the folder of its cache cannot be written
        return _reason(error)
    return ""


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # The choice of kernels by measured speed may fall otherwise tomorrow, and with it the order of a sum.
    fixed = {"deterministic": True} if "deterministic" in torch._inductor.list_options() else {}
    return torch.compile(function, fullgraph=True, dynamic=False, options=fixed)


def _reason(error: Exception) -> str:
    """The line of a compiler's message that says what failed."""
    header = os.path.join(sysconfig.get_path("include", "posix_prefix"), "Python.h")  # where Triton looks for it
    if failed := re.search(r"Command '\['([^']+)'.* returned non-zero exit status", str(error)):
        missing = f"{header} is missing (Debian's package python3-dev has it)"
        return f"{failed[1]} failed, its message is above" if os.path.exists(header) else missing
    errors = [line.strip() for line in str(error).splitlines() if re.match(r"\s*[\w.]*(Error|Exception): ", line)]
    if errors:
        return errors[-1][:300]
    # In PyTorch 2.6 the message of a missing compiler (InvalidCxxCompiler: ...) follows this first line.
    return first_line(RuntimeError(re.sub(r"\Abackend='\w+' raised:\s*", "", str(error)) or type(error).__name__))


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
    compiled = _compiled(model)

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
        raise UserError(
            f"the network cannot be compiled: {_reason(error)}.\nUse --compile False and another --output"
        ) from error
    return call


def _filled(x: Tensor, length: int) -> Tensor:
    """x (B, ...), contiguous, its last row repeated until there are `length`."""
    return torch.cat([x, x[-1:].expand(length - len(x), *x.shape[1:])]) if len(x) < length else x.contiguous()
