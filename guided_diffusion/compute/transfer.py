"""Asynchronous copies between CPU and GPU."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def upload(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to `device`. The copy from the CPU to a GPU runs in the background."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()  # the copy of pageable memory would make the CPU wait
    return x.to(device, non_blocking=device.type == "cuda")


def download(*tensors: Tensor) -> Callable[[], list[np.ndarray]]:
    """Start copying tensors of one device to the CPU. Returns a function that waits for them, for any thread."""
    copies = [x.to("cpu", non_blocking=True) for x in tensors]  # from a GPU, into pinned memory
    device, copied = tensors[0].device, None
    if device.type == "cuda":
        copied = torch.cuda.Event(blocking=True)  # blocking: does not spin on a core
        copied.record(torch.cuda.current_stream(device))

    def wait() -> list[np.ndarray]:
        if copied is not None:
            torch.cuda.set_device(device)  # a new thread would allocate memory on GPU 0
            copied.synchronize()
        return [x.numpy() for x in copies]

    return wait
