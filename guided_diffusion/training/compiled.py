"""torch.compile for training: forward and backward passes of the batch sizes that recur in every step."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import dist_util, logger
from ..compute.compilation import compile_function, decide_on_compilation, failure_line
from ..errors import UserError, is_out_of_memory

MANY_STEPS = 5_000  # number of steps of a run from which compilation pays off
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
NEW_RUN = "start a new run with --compile False and another --output"


def choose_compilation(choice: bool | str, recorded: bool | None, steps: int | None) -> bool:
    """Whether a training run compiles its network, the same on all ranks: see `decide_on_compilation`.

    Args:
        choice: --compile: True, False or "auto".
        recorded: whether the run on record was compiled; None for a new run.
        steps: number of steps of a new run; None: no limit.
    """
    return decide_on_compilation(choice, recorded, lambda: steps is None or steps >= MANY_STEPS, NEW_RUN)


def batch_sizes(batch_size: int, microbatch: int) -> set[int]:
    """Numbers of images per pass in a step of `batch_size` images."""
    return {min(batch_size, microbatch), batch_size % microbatch} - {0}


class CompiledForTraining(nn.Module):
    """A network whose training passes are compiled, for some batch sizes. Each size takes a minute or more, once.

    `network` shares its weights and remains uncompiled: for saving, sampling and validation. Also uncompiled are passes
    without gradients, of other batch sizes, and all passes while the network has hooks, which the compiler ignores.

    Args:
        network: called as network(x, ...), with x (B, ...).
        sizes: numbers B of images to compile for. Dropout, mixed precision and `use_checkpoint` are supported.
    """

    def __init__(self, network: nn.Module, sizes: Collection[int]):
        super().__init__()
        self.network = network
        self._sizes = frozenset(sizes)
        self._met, self._ready = set(), set()  # sizes seen, on all ranks; sizes compiled, on this rank
        self._hooks = [getattr(module, kind) for module in network.modules() for kind in HOOKS]

        def call(*args: Any, **kwargs: Any) -> Tensor:  # the compiler skips a bound __call__
            return network(*args, **kwargs)

        self._compiled = compile_function(call)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The network's output. All ranks must call this, with the same sizes: one rank of each node compiles first.

        Raises UserError if the network cannot be compiled.
        """
        if not torch.is_grad_enabled() or len(x) not in self._sizes:
            return self.network(x, *args, **kwargs)
        prepare = partial(self._prepare, x, *args, **kwargs)
        if len(x) in self._met:
            use_compiled = prepare()
        else:  # the first pass of this size, on all ranks, even if only some have hooks
            self._met.add(len(x))
            use_compiled = dist_util.first_on_each_node(prepare)
        return (self._compiled if use_compiled else self.network)(x, *args, **kwargs)

    def _prepare(self, x: Tensor, *args: Any, **kwargs: Any) -> bool:
        """Compile for these inputs, if that is still to be done. Returns whether to use the compiled network."""
        if any(self._hooks):
            return False
        if len(x) not in self._ready:
            self._compile_for(x, *args, **kwargs)
        return True

    def _compile_for(self, x: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compile for the shapes of these inputs, by a pass that leaves neither gradients nor used random numbers."""
        logger.info(
            f"compiling the network for batches of {len(x)} (--compile): once per run, it takes a minute or more"
        )
        weights = [weight for weight in self.network.parameters() if weight.requires_grad]
        try:
            with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
                output = self._compiled(x, *args, **kwargs)
                torch.autograd.grad(output.float().square().mean(), weights, allow_unused=True)
        except Exception as error:  # compilers fail in many ways
            if is_out_of_memory(error):
                raise
            raise UserError(
                f"the network cannot be compiled: {failure_line(error)}.\nUse --compile False; if the folder has "
                f"checkpoints, {NEW_RUN}"
            ) from error
        self._ready.add(len(x))
