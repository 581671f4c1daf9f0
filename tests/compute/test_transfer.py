"""What is done on the way from a GPU, as far as it can be seen without one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from guided_diffusion.compute.transfer import download

import numpy as np
import pytest
import torch


class OnGPU:
    """A tensor that says it is on GPU 3."""

    device = torch.device("cuda", 3)

    def __init__(self, values):
        self.values = values

    def to(self, device, non_blocking):
        assert (device, non_blocking) == ("cpu", True)
        return torch.tensor(self.values)


@pytest.fixture
def calls(monkeypatch) -> list:
    """What is asked of CUDA, in order."""
    found = []

    class Event:
        def __init__(self, **options):
            found.append(("event", options))

        def record(self, stream):
            found.append(("record", stream))

        def synchronize(self):
            found.append("synchronize")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: found.append(("set_device", device)))
    return found


def test_a_thread_that_waits_for_a_gpu_is_on_that_gpu_and_sleeps(calls):
    wait = download(OnGPU([1, 2]), OnGPU([3]))
    assert calls == [("event", {"blocking": True}), ("record", "stream of cuda:3")]
    calls.clear()
    with ThreadPoolExecutor(1) as pool:
        first, second = pool.submit(wait).result()
    assert calls == [("set_device", torch.device("cuda", 3)), "synchronize"]
    assert first.tolist() == [1, 2] and second.tolist() == [3]


def test_what_is_on_the_cpu_is_there_already(calls):
    (here,) = download(torch.arange(3))()
    np.testing.assert_array_equal(here, [0, 1, 2])
    assert calls == []
