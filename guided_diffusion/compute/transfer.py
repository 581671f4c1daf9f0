"""Tensors on their way to the GPU and back, for which nobody waits before they are needed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def upload(x: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor, on `device`."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def download(*tensors: Tensor) -> Callable[[], list[np.ndarray]]:
    """Begin to copy tensors of one device to the CPU. The call that is returned waits for them and gives them.

    Any thread may make that call.
    """
    here = [x.to("cpu", non_blocking=True) for x in tensors]  # from a GPU, into pinned memory
    device, arrived = tensors[0].device, None
    if device.type == "cuda":
        arrived = torch.cuda.Event(blocking=True)  # else the waiting thread keeps a core busy
        arrived.record(torch.cuda.current_stream(device))

    def wait() -> list[np.ndarray]:
        if arrived is not None:
            torch.cuda.set_device(device)  # a new thread is on GPU 0, and would allocate memory there
            arrived.synchronize()
        return [x.numpy() for x in here]

    return wait
