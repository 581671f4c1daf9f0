"""Messages for insufficient memory, and warnings about tensors that are too large for some kernels."""

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

LARGEST = 2**31 - 1  # number of elements that 32-bit indices can address
FREE_THE_GPU = ", or free the GPU if other processes use it"


@contextmanager
def explain_out_of_memory(images: int, more: str = "", flag: str = "--batch_size") -> Iterator[None]:
    """Raise UserError if the memory is too small for a batch of images; suggest lowering `flag`, and `more`."""
    with _memory_for(f"a batch of {images} images: lower {flag}{more}", FREE_THE_GPU):
        yield


@contextmanager
def explain_out_of_memory_for_network(size: int = 0) -> Iterator[None]:
    """Raise UserError if the memory is too small for a network of `size` bytes; 0: unknown."""
    size_text = f" ({size / 2**30:.2f} GiB)" if size else ""
    with _memory_for(f"the network{size_text}", ".\nFree the GPU if other processes use it, or use another one"):
        yield


@contextmanager
def _memory_for(purpose: str, gpu_remedy: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        remedy = gpu_remedy if _is_of_gpu(error) else ""
        raise UserError(f"{_available_memory(error)} is too small for {purpose}{remedy}") from error


def to_device(model: nn.Module, batch_size: int = 0, microbatch: int = -1) -> nn.Module:
    """Move a network to this rank's device. Raises UserError if there is not enough memory.

    Args:
        model: network.
        batch_size: images per batch, for a warning if they are too many; 0: unknown.
        microbatch: images per forward pass (--microbatch); -1: all.
    """
    images, flag = (microbatch, "--microbatch") if 0 < microbatch < batch_size else (batch_size, "--batch_size")
    if images:
        warn_of_large_tensors(model, images, flag)
    with explain_out_of_memory_for_network(sum(w.nbytes for w in [*model.parameters(), *model.buffers()])):
        return model.to(dist_util.dev())


def not_enough_memory(error: BaseException) -> str:
    """Message for an error that `is_out_of_memory`, from an unknown place."""
    return (
        f"{_available_memory(error)} is too small: {first_line(error)}.\nLower --batch_size (in training --microbatch, "
        f"which does not change results){FREE_THE_GPU if _is_of_gpu(error) else ''}"
    )


def _available_memory(error: BaseException) -> str:
    """Which memory is too small, and its size."""
    if not _is_of_gpu(error):
        return "this machine's memory"
    with contextlib.suppress(Exception):  # a GPU that has failed may not answer
        sizes = (*reversed(torch.cuda.mem_get_info(dist_util.dev())), torch.cuda.memory_reserved(dist_util.dev()))
        total, free, mine = (f"{size / 2**30:.1f} GiB" for size in sizes)
        return f"the GPU's memory ({total}: {free} free, {mine} used by this process)"
    return "the GPU's memory"


def _is_of_gpu(error: BaseException) -> bool:
    names_gpu = re.search("cuda|cublas|cudnn|nccl|triton|hip|gpu", str(error), re.IGNORECASE)
    return isinstance(error, torch.OutOfMemoryError) or names_gpu is not None


def warn_of_large_tensors(model: nn.Module, batch_size: int, flag: str) -> None:
    """Warn if a U-Net or noisy-image classifier has tensors of more than `LARGEST` elements.

    `batch_size` is the number of images per forward pass, `flag` the flag that sets it.
    """
    if not isinstance(model, UNetModel | EncoderUNetModel):
        return
    channels = max(max(w.shape[:2]) for w in model.parameters() if w.ndim > 2)
    if batch_size * channels * model.image_size**2 <= LARGEST:  # an upper bound, which usually suffices
        return
    per_image = largest_tensor(model)
    if batch_size * per_image > LARGEST:
        most = LARGEST // per_image
        logger.warn(
            f"{flag} {batch_size}: a tensor of the network has {batch_size * per_image:,} elements, more than the "
            f"{LARGEST:,} that some GPU kernels can address" + (f". Use {flag} {most} or less" if most else "")
        )


def largest_tensor(model: UNetModel | EncoderUNetModel) -> int:
    """Elements per image of the largest input or output of any module. Nothing is computed."""
    return max(x.numel() for _, x in tensors_of(model))


def tensors_of(model: UNetModel | EncoderUNetModel) -> list[tuple[nn.Module, Tensor]]:
    """Inputs and outputs of all modules for one image, with the module, as tensors without data."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # private, but in all versions from 2.6 on

    found: list[tuple[nn.Module, Tensor]] = []

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        found.extend((module, x) for x in (*inputs, output) if isinstance(x, Tensor))

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
    return found
