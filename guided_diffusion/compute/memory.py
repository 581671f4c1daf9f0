"""Memory: what to say where it is short, and tensors that are too large for some kernels."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import dist_util, logger
from ..errors import UserError, first_line, is_out_of_memory
from ..unet import EncoderUNetModel, UNetModel

LARGEST = 2**31 - 1  # elements of a tensor that kernels with 32-bit indices can address


@contextmanager
def enough_memory(images: int, more: str = "", flag: str = "--batch_size") -> Iterator[None]:
    """Raise UserError if the memory does not suffice for so many images at once.

    Args:
        images: how many.
        more: what else to do then.
        flag: the flag to lower.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        free = ", or free the GPU if other processes use it" if _of_gpu(error) else ""
        raise UserError(f"{_memory(error)} does not hold {images} images at once: lower {flag}{more}{free}") from error


@contextmanager
def enough_memory_for_network(size: int = 0) -> Iterator[None]:
    """Raise UserError if the memory does not suffice for a network of `size` bytes; 0: not known."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        needed = f", {size / 2**30:.2f} GiB" if size else ""
        free = ".\nFree the GPU if other processes use it, or use another one" if _of_gpu(error) else ""
        raise UserError(f"{_memory(error)} does not hold the network{needed}{free}") from error


def to_device(model: nn.Module, batch_size: int = 0, microbatch: int = -1) -> nn.Module:
    """Move a network to this rank's device. Raises UserError if there is not enough memory.

    Args:
        model: the network.
        batch_size: the images that it will be called with, for a warning if they are too many; 0: not known.
        microbatch: the flag --microbatch, if there is one: as many images at a time; -1: all.
    """
    if 0 < microbatch < batch_size:
        warn_of_large_tensors(model, microbatch, "--microbatch")
    elif batch_size:
        warn_of_large_tensors(model, batch_size, "--batch_size")
    with enough_memory_for_network(sum(w.nbytes for w in [*model.parameters(), *model.buffers()])):
        return model.to(dist_util.dev())


def not_enough_memory(error: BaseException) -> str:
    """What to say of an error that `is_out_of_memory` if nothing is known of where it came from."""
    free = ", or free the GPU if other processes use it" if _of_gpu(error) else ""
    return (
        f"{_memory(error)} does not suffice: {first_line(error)}.\n"
        f"Lower --batch_size (in training --microbatch, which changes no result){free}"
    )


def _memory(error: BaseException) -> str:
    """Which memory is short, and how much of it there is."""
    if not _of_gpu(error):
        return "this machine's memory"
    with contextlib.suppress(Exception):  # a GPU that has failed may not answer
        free, total = torch.cuda.mem_get_info(dist_util.dev())
        mine = torch.cuda.memory_reserved(dist_util.dev())
        of_all, taken, left = (f"{size / 2**30:.1f} GiB" for size in (total, mine, free))
        return f"the GPU's memory ({of_all}: this process has taken {taken}, {left} are free)"
    return "the GPU's memory"


def _of_gpu(error: BaseException) -> bool:
    named = re.search("cuda|cublas|cudnn|nccl|triton|hip|gpu", str(error), re.IGNORECASE)
    return isinstance(error, torch.OutOfMemoryError) or named is not None


def warn_of_large_tensors(model: nn.Module, batch_size: int, flag: str) -> None:
    """Warn if a U-Net or a classifier of noisy images has tensors of more than `LARGEST` elements.

    Args:
        model: the network; of others nothing is known.
        batch_size: images per forward pass.
        flag: the flag that says how many.
    """
    if not isinstance(model, UNetModel | EncoderUNetModel):
        return
    channels = max(max(w.shape[:2]) for w in model.parameters() if w.ndim > 2)
    if batch_size * channels * model.image_size**2 <= LARGEST:  # a bound, to answer at once in most cases
        return
    per_image = largest_tensor(model)
    if batch_size * per_image > LARGEST:
        most = LARGEST // per_image
        logger.warn(
            f"{flag} {batch_size}: a tensor of the network has {batch_size * per_image:,} elements, more than the "
            f"{LARGEST:,} that some GPU kernels can address" + (f". Use {flag} {most} or less" if most else "")
        )


def largest_tensor(model: UNetModel | EncoderUNetModel) -> int:
    """Elements per image of the largest tensor that a module of the network takes or returns. Nothing is computed."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # tensors without data

    largest = 0

    def note(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal largest
        largest = max(largest, *(x.numel() for x in (*inputs, output) if isinstance(x, Tensor)))

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            device = next(model.parameters()).device
            x = torch.empty(1, 3, model.image_size, model.image_size, device=device)
            one = torch.zeros(1, dtype=torch.long, device=device)
            conditions = {"y": one} if model.num_classes else {}
            conditions |= {"low_res": x} if model.in_channels == 6 else {}
            model(x, one, **conditions)
    finally:
        for hook in hooks:
            hook.remove()
    return largest
