"""Messages between ranks and what happens to them, with a real store; the ranks are threads of this process."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from datetime import timedelta
from typing import Any

from guided_diffusion.errors import LostPeer
from guided_diffusion.system.peers import CHUNK_SIZE, Peers
from guided_diffusion.system.waiting import in_background

import pytest
import torch.distributed as dist
from slurm import until

HOSTS = ["gpu-a", "gpu-a", "gpu-b"]


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=30), wait_for_workers=False)


@pytest.fixture
def ranks(store, monkeypatch) -> Iterator[list[Peers]]:
    """Three ranks, whose heart beats fifteen times per second."""
    monkeypatch.setenv("GUIDED_DIFFUSION_PEER_TIMEOUT", "2")

    def connect() -> dist.Store:
        client = dist.TCPStore("127.0.0.1", store.port, None, False, timedelta(seconds=30), wait_for_workers=False)
        return dist.PrefixStore("run", client)

    def on_stuck(error: LostPeer) -> None:
        raise AssertionError(error)  # the tests' main thread is never stuck for long

    peers = [Peers(rank, HOSTS, connect, on_stuck) for rank in range(3)]
    yield peers
    on_all(peers, lambda peer: peer.leave())


def on_all(ranks: list[Peers], action: Callable[[Peers], Any]) -> list:
    """What the action gives on every rank, all at the same time. Raises TimeoutError if a rank waits for 60 s."""
    with futures.ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(lambda peer: in_background(action, peer, seconds=60), ranks))


@pytest.mark.parametrize("size", [0, 1, CHUNK_SIZE, 3 * CHUNK_SIZE + 1])
def test_messages_of_any_size_arrive_and_leave_nothing_in_the_store(ranks, store, size):
    def exchange(peer: Peers) -> Any:
        return peer.broadcast(bytes([peer.rank]) * size), peer.gather((peer.rank, bytes(size)))

    until(lambda: store.num_keys() == 4, "three heartbeats and the number of endings")
    for _ in range(3):
        for first, both in on_all(ranks, exchange):
            assert first == bytes(size)
            assert both == [(rank, bytes(size)) for rank in range(3)]
    assert store.num_keys() == 4


def test_every_number_goes_to_one_rank_and_rank_0_hears_of_the_work(ranks):
    """Three ranks take numbers at the same time; the next list starts from 0, and so does the work done on it."""

    def take_numbers(peer: Peers) -> list[int]:
        numbers = list(itertools.takewhile(lambda number: number < size, iter(peer.start_counter(), None)))
        peer.gather(None)  # as at the end of a run
        return numbers

    for size, amounts in ((40, (5, 20, 300)), (2, (7, 0, 1000))):
        taken = on_all(ranks, take_numbers)
        assert sorted(itertools.chain(*taken)) == list(range(size))
        assert all(numbers == sorted(numbers) for numbers in taken)
        news = [peer.note_work(amount) for peer, amount in zip(ranks, amounts, strict=True)]
        assert news == [0, 0, 0]
        deadline = time.monotonic() + 60
        while sum(news) < sum(amounts[1:]) and time.monotonic() < deadline:
            news.append(ranks[0].note_work(0))
            time.sleep(0.01)
        assert sum(news) == sum(amounts[1:])


def test_a_rank_that_failed_is_named_with_its_reason(ranks):
    ranks[2].leave("failed", "ended: no space left on device")
    words = "rank 2 on gpu-b ended: no space left on device; see its output"
    with pytest.raises(LostPeer, match=words):
        ranks[0].gather(None)
    with pytest.raises(LostPeer, match=words):
        ranks[1].broadcast(None)
    with pytest.raises(LostPeer, match=words):
        ranks[0].check()
    assert [ranks[0].reporter(), ranks[1].reporter()] == [0, 0]


def test_the_first_failure_is_the_one_that_is_told(ranks):
    ranks[1].leave("failed", "was stopped by SIGTERM")
    ranks[2].leave("followed")
    assert "rank 1 on gpu-a was stopped by SIGTERM" in str(ranks[0].wait_for_lost_peer())


def test_a_rank_that_finished_is_missed_only_by_those_who_wait_for_it(ranks):
    ranks[2].leave()
    lost = ranks[0].wait_for_lost_peer()  # after a collective of torch failed
    assert "rank 2 on gpu-b ended; see its output" in str(lost)
    ranks[0].check()

    def gather(peer: Peers) -> str:
        with pytest.raises(LostPeer) as error:
            peer.gather(None)
        peer.leave("followed", str(error.value))
        return str(error.value)

    first, second = on_all(ranks[:2], gather)
    assert first.startswith("rank 2 on gpu-b ended; see its output")
    assert second == first


def test_rank_0_waits_for_those_that_work(ranks):
    with futures.ThreadPoolExecutor(1) as pool:
        leaving = pool.submit(ranks[0].leave)
        ranks[1].leave()
        try:
            with pytest.raises(futures.TimeoutError):  # another class in Python 3.10
                leaving.result(0.5)
            assert ranks[2].lost_peer() is None  # it would learn of a failure still
        finally:
            ranks[2].leave()  # or else the pool would wait for rank 0 forever
        assert leaving.result(30)
