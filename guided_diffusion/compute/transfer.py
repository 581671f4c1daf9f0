"""Asynchronous copies between CPU and GPU."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def upload(x: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to `device`."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


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
