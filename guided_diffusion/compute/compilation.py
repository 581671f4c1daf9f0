"""torch.compile for networks: fuses normalisation, activation and modulation into one kernel."""

from __future__ import annotations

import os
import re
import sysconfig
import tempfile
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .. import dist_util, logger
from ..errors import UserError, first_line
from ..gaussian_diffusion import GaussianDiffusion
from ..nn import GroupNorm32
from ..unet import UNetModel
from .memory import explain_out_of_memory, tensors_of

# Measured for the published network (101 normalisations) in batches of 32, with PyTorch 2.11 on an NVIDIA H200 and 16
# CPU cores: compilation takes 60 s, and saves 120 ms per step, most of them in normalisation and activation.
SECONDS_PER_NORMALIZATION = 60 / 101
SECONDS_SAVED_PER_ELEMENT = 0.120 / (32 * 800e6)  # in or out of a normalisation


def should_compile(
    choice: bool | str, model: UNetModel, batch_size: int, steps: int, recorded: bool | None = None
) -> bool:
    """Whether a sampling run compiles its network, the same on all ranks: see `decide_on_compilation`.

    Args:
        choice: --compile: True, False or "auto".
        model: network.
        batch_size: images per batch.
        steps: denoising steps of all processes.
        recorded: whether the run on record was compiled; None for a new run.

    "auto" compiles a new run if this saves more time than it takes. Call this before touching the output folder.
    """

    def pays() -> bool:
        return steps / dist_util.get_world_size() >= break_even_steps(model, batch_size)

    return decide_on_compilation(choice, recorded, pays, "choose another --output")


def decide_on_compilation(
    choice: bool | str, recorded: bool | None, pays: Callable[[], bool], start_again: str
) -> bool:
    """Whether a run compiles its network, the same on all ranks. All ranks must call this.

    Args:
        choice: --compile: True, False or "auto".
        recorded: whether the run on record was compiled; None for a new run.
        pays: whether compiling a new run on a GPU pays, asked on rank 0.
        start_again: how to start another run, for the message.

    "auto" follows the record, since a compiled network rounds differently. It compiles a new run on a GPU if this pays
    and every rank can compile; if one cannot, it warns.

    Raises UserError if the flag or the record requires compilation and a rank cannot compile.
    """
    required = recorded if choice == "auto" else choice
    if not dist_util.on_main(lambda: on_gpu() and pays() if required is None else required):
        return False
    problems = dist_util.gather_objects(compilation_problem())
    rank = next((rank for rank, problem in enumerate(problems) if problem), None)
    if rank is None:
        return True
    problem = f"the network cannot be compiled{f' on rank {rank}' if len(problems) > 1 else ''}: {problems[rank]}"
    if required is None:
        logger.warn(f"{problem}.\nThis run continues uncompiled, which is slower (--compile auto)")
        return False
    on_record = f"The run on record was compiled: fix this, or {start_again}"
    dist_util.raise_together(UserError(f"{problem}.\n{on_record if recorded else 'Fix this, or use --compile False'}"))


def break_even_steps(model: UNetModel, batch_size: int) -> float:
    """Estimated number of steps of a process from which compilation pays, for batches of `batch_size` images."""
    normalizations = sum(isinstance(module, GroupNorm32) for module in model.modules())
    elements = sum(x.numel() for module, x in tensors_of(model) if isinstance(module, GroupNorm32))
    return SECONDS_PER_NORMALIZATION * normalizations / (SECONDS_SAVED_PER_ELEMENT * elements * batch_size)


def on_gpu() -> bool:
    """Whether this rank computes on a GPU."""
    return dist_util.dev().type == "cuda"


def compilation_problem() -> str:
    """Why this process cannot compile for its device; "" if it can.

    Compiles a tiny function, which takes seconds, without cached kernels, which would hide a missing compiler.
    """

    def tiny(x: Tensor) -> Tensor:
        return x * x.mean(dim=1, keepdim=True)

    try:
        from torch._inductor.utils import fresh_inductor_cache  # private, but in all versions from 2.6 on

        if cache := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
            os.makedirs(cache, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True)
        with temporary as folder, fresh_inductor_cache(dir=folder, delete=False):
            try:
                compile_function(tiny)(torch.ones(8, 64, device=dist_util.dev())).sum().item()
            except Exception as error:  # compilers fail in many ways; caught here, since the cache would warn about it
                return failure_line(error)
    except Exception as error:  # the import fails if its cache cannot be written
        return failure_line(error)
    return ""


def compile_function(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.compile` with static shapes, without graph breaks, and with the same kernels in every run."""
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # advice to compute less precisely
    # Autotuning may choose other kernels in the next run, which sum in another order.
    fixed = {"deterministic": True} if "deterministic" in torch._inductor.list_options() else {}
    return torch.compile(function, fullgraph=True, dynamic=False, options=fixed)


def failure_line(error: Exception) -> str:
    """The line of a compiler's message that names the failure."""
    header = os.path.join(sysconfig.get_path("include", "posix_prefix"), "Python.h")  # where Triton looks for it
    if failed := re.search(r"Command '\['([^']+)'.* returned non-zero exit status", str(error)):
        missing = f"{header} is missing (Debian's package python3-dev has it)"
        return f"{failed[1]} failed, its message is above" if os.path.exists(header) else missing
    errors = [line.strip() for line in str(error).splitlines() if re.match(r"\s*[\w.]*(Error|Exception): ", line)]
    if errors:
        return errors[-1][:300].rstrip(".")
    # In PyTorch 2.6, the message for a missing compiler (InvalidCxxCompiler: ...) follows this first line.
    return first_line(RuntimeError(re.sub(r"\Abackend='\w+' raised:\s*", "", str(error)) or type(error).__name__))


def compile_network(
    model: UNetModel, diffusion: GaussianDiffusion, batch_size: int, image_size: int
) -> Callable[..., Tensor]:
    """Compile a network by running one batch, which takes a minute or more.

    Args:
        model: network, after `inference.prepare_network`.
        diffusion: diffusion process, which scales the timesteps.
        batch_size: images per batch. A smaller last batch is padded, to avoid recompilation.
        image_size: height and width, in pixels.

    Returns a function with the network's arguments. Raises UserError if the network cannot be compiled, or
    the GPU's memory is too small for the batch.
    """
    logger.info("compiling the network (--compile): once per run, it takes a minute or more")
    compiled = compile_function(model)

    def call(x: Tensor, timesteps: Tensor, **conditions: Tensor) -> Tensor:
        padded = {name: _padded(values, batch_size) for name, values in conditions.items()}
        return compiled(_padded(x, batch_size), _padded(timesteps, batch_size), **padded)[: len(x)]

    device = dist_util.dev()
    zeros = torch.zeros(batch_size, dtype=torch.long, device=device)
    labels = {} if model.num_classes is None else {"y": zeros}
    try:
        with torch.no_grad(), explain_out_of_memory(batch_size):
            x = torch.zeros(batch_size, 3, image_size, image_size, device=device)
            call(x, diffusion.scale_timesteps(zeros), **labels)
    except UserError:
        raise
    except Exception as error:  # compilers fail in many ways
        raise UserError(
            f"the network cannot be compiled: {failure_line(error)}.\nUse --compile False and another --output"
        ) from error
    return call


def _padded(x: Tensor, length: int) -> Tensor:
    """x (B, ...) as a contiguous (length, ...), padded with its last row."""
    return torch.cat([x, x[-1:].expand(length - len(x), *x.shape[1:])]) if len(x) < length else x.contiguous()
