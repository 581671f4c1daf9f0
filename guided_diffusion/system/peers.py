"""Messages between ranks through a key-value store, and monitoring of the ranks.

Everything is polled, so that a rank can wait for another for hours, signals are handled, and dead ranks are noticed.
Every rank increments a key of its own, its heartbeat. Rank 0 watches all heartbeats, the others watch rank 0's. When a
rank exits, all others learn why. A heartbeat also says how much of its work a rank has done.

Ranks divide a list of work by a counter in the store: each takes the next number when it is ready for more.
"""

from __future__ import annotations

import json
import pickle
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist

from ..errors import LostPeer
from .waiting import in_background, seconds_from

CHUNK_SIZE = 4 * 2**20  # bytes per value: the store's server refuses more than 8 MiB
BEATS = 30  # missed heartbeats after which a rank counts as dead
LINGER = 10  # seconds for the others to read why a rank failed
GONE = "died or cannot be reached"


class Ending(NamedTuple):
    """How a rank ended.

    Attributes:
        rank: the rank.
        kind: "finished", "failed", or "followed" if it ended because of others or together with all.
        reason: for "failed", the predicate of the sentence "rank 1 on HOST ..."; for "followed", a whole message.
    """

    rank: int
    kind: str
    reason: str = ""


class Peers:
    """The other ranks, from the time they met until `leave`.

    Args:
        rank: rank of this process.
        hosts: host name of every rank.
        connect: function that makes a new connection to the store.
        on_stuck: called in another thread if a rank is lost while the main thread waits inside PyTorch.

    A rank is lost if its heartbeat stops for 60 seconds (GUIDED_DIFFUSION_PEER_TIMEOUT). The watching rank counts its
    own heartbeats instead of reading the clock, so suspending a whole job does no harm.
    """

    def __init__(
        self, rank: int, hosts: Sequence[str], connect: Callable[[], dist.Store], on_stuck: Callable[[LostPeer], None]
    ):
        self.rank, self.hosts, self.size = rank, hosts, len(hosts)
        self.patience = seconds_from("GUIDED_DIFFUSION_PEER_TIMEOUT", 60)
        self._store, self._beat_store = in_background(lambda: (connect(), connect()))
        self._on_stuck = on_stuck
        self._sent = 0  # number of messages, the same on all ranks
        self._endings: list[Ending] = []  # of all ranks, in order
        self._leaving, self._left = threading.Event(), threading.Event()
        self._answered = 0  # number of heartbeats that reached the store
        self._work = ""  # key of the latest counter
        self._done = 0  # work done since then
        self._done_by: dict[int, tuple[str, int]] = {}  # on rank 0: `_work` and `_done` of the others, a beat ago
        self._told = 0  # sum of their work that `note_work` has returned
        for work in (self._beat, self._watch):
            threading.Thread(target=work, daemon=True, name=work.__name__).start()

    # Messages

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        key = self._next_key()
        if self.rank == 0:
            in_background(self._put, key, pickle.dumps(value))
            return value
        return pickle.loads(in_background(self._take, key, 0, self.size - 1))

    def gather(self, value: Any, meanwhile: Callable[[], None] | None = None) -> list:
        """The `value` of every rank, on every rank. Rank 0 calls `meanwhile` every second while it waits."""
        key, mine = self._next_key(), pickle.dumps(value)
        if self.rank == 0:
            pieces = in_background(self._collect, key, mine, check=meanwhile)
        else:
            in_background(self._put, f"{key}/{self.rank}", mine)
            pieces = pickle.loads(in_background(self._take, key, 0, self.size - 1))
        return [pickle.loads(piece) for piece in pieces]

    def _next_key(self) -> str:
        self._sent += 1
        return f"message/{self._sent}"

    def _collect(self, key: str, mine: bytes) -> list[bytes]:
        pieces = [mine, *(self._take(f"{key}/{rank}", rank, 1) for rank in range(1, self.size))]
        self._put(key, pickle.dumps(pieces))
        return pieces

    def _put(self, key: str, data: bytes) -> None:
        count = -(-len(data) // CHUNK_SIZE)
        try:
            for i in range(count):
                self._store.set(f"{key}/chunk{i}", data[i * CHUNK_SIZE : (i + 1) * CHUNK_SIZE])
            self._store.set(key, str(count))
        except RuntimeError as error:
            raise self._store_lost() from error

    def _take(self, key: str, sender: int, readers: int) -> bytes:
        """Wait for a message. The last of its readers removes it from the store."""
        pause = 0.0005
        try:
            while True:
                lost = self.lost_peer(awaited=sender)
                if self._store.check([key]):
                    break
                if lost:
                    raise lost
                time.sleep(pause)
                pause = min(1.5 * pause, 0.25)
            names = [f"{key}/chunk{i}" for i in range(int(self._store.get(key)))]
            data = b"".join(self._store.get(name) for name in names)
            if readers == 1 or self._store.add(f"{key}/read", 1) == readers:
                for name in [*names, key, *([f"{key}/read"] if readers > 1 else [])]:
                    self._store.delete_key(name)
        except LostPeer:
            raise
        except RuntimeError as error:
            raise self._store_lost() from error
        return data

    def _store_lost(self) -> LostPeer:
        """Error for a store that does not answer: rank 0 is gone, or torchrun, which ends with it."""
        return self.lost_peer() or self._as_error(Ending(0, "failed", GONE))

    # Work

    def start_counter(self) -> Callable[[], int]:
        """A function that returns 0, 1, 2, ..., each number to one rank. All ranks must call this.

        The function raises LostPeer if the store does not answer. `note_work` starts from 0 again.
        """
        key = self._next_key()
        self._done, self._told, self._work = 0, 0, key  # the heartbeat reads them in the other order
        return lambda: in_background(self._count, key, check=self.check)

    def _count(self, key: str) -> int:
        try:
            return self._store.add(key, 1) - 1
        except RuntimeError as error:
            raise self._store_lost() from error

    def note_work(self, amount: int) -> int:
        """Note work of this rank. On rank 0, returns how much more the others have noted, as far as it knows."""
        self._done += amount
        others = sum(done for work, done in list(self._done_by.values()) if work == self._work)
        news, self._told = others - self._told, others
        return news

    # Monitoring

    def check(self) -> None:
        """Raise LostPeer if a rank is lost. Does not communicate: the heartbeat thread knows."""
        if error := self.lost_peer():
            raise error

    def lost_peer(self, awaited: int | None = None) -> LostPeer | None:
        """The error that `check` raises, if any; also if rank `awaited` has ended, even in good order."""
        endings = list(self._endings)
        failed = [ending for ending in endings if ending.kind == "failed"]  # the first one caused the others
        followed = [ending for ending in endings if ending.kind == "followed" and ending.reason]
        missed = [ending for ending in endings if ending.rank == awaited]
        return next((self._as_error(ending) for ending in failed + followed + missed), None)

    def wait_for_lost_peer(self) -> LostPeer | None:
        """The lost rank that explains a failed communication; None if all ranks prove to be alive."""
        deadline = time.monotonic() + 1.5 * self.patience
        while time.monotonic() < deadline:
            ended = next((ending.rank for ending in list(self._endings) if ending.rank != self.rank), None)
            if error := self.lost_peer(awaited=ended):
                return error
            time.sleep(0.1)
        return None

    def reporter(self) -> int:
        """The rank that prints the error for all ranks that lost the same peer."""
        out = {ending.rank for ending in list(self._endings) if ending.kind != "followed"}
        return min(set(range(self.size)) - out, default=self.rank)

    def _as_error(self, ending: Ending) -> LostPeer:
        here, name = (f"rank {rank} on {self.hosts[rank]}" for rank in (self.rank, ending.rank))
        if ending.rank == self.rank or ending.reason.startswith(here):
            other = "the other ranks" if ending.rank == self.rank else name
            return LostPeer(f"{other} stopped because this one, {here}, did not respond: check the network")
        if ending.kind == "followed" and ending.reason:
            return LostPeer(ending.reason)
        return LostPeer(f"{name} {ending.reason or 'ended'}; see its output. Rerun the same command to resume")

    def _beat(self) -> None:
        """Increment this rank's heartbeat, check those of others, and learn which ranks have ended."""
        watched = range(1, self.size) if self.rank == 0 else [0]
        seen = {rank: (b"", 0) for rank in watched}  # last value, and own heartbeats since it changed
        fresh: list[Ending] = []
        beat = version = 0
        while not self._left.wait(self.patience / BEATS if beat else 0):
            beat += 1
            try:
                self._beat_store.set(f"beat/{self.rank}", f"{beat} {self._work} {self._done}")
                # Endings count one beat late, so that a signal sent to all ranks has reached this one too.
                self._endings += fresh
                fresh, version = self._new_endings(version)
                for rank in set(watched) - {ending.rank for ending in self._endings + fresh}:
                    key = f"beat/{rank}"
                    value = self._beat_store.get(key) if self._beat_store.check([key]) else b""
                    if self.rank == 0 and value:
                        _, work, done = value.decode().split(" ")
                        self._done_by[rank] = work, int(done)
                    seen[rank] = (value, 0 if value != seen[rank][0] else seen[rank][1] + 1)
                    if seen[rank][1] == BEATS:
                        self._announce(self._beat_store, Ending(rank, "failed", GONE))
            except RuntimeError:
                self._endings.append(Ending(0, "failed", GONE))
                return
            self._answered = beat

    @staticmethod
    def _announce(store: dist.Store, ending: Ending) -> None:
        store.set(f"ending/{ending.rank}", json.dumps(ending))
        store.add("endings", 1)  # last, so that readers of the count find the ending

    def _new_endings(self, version: int) -> tuple[list[Ending], int]:
        """Endings not known yet, if the count differs from `version`; and the count."""
        if (now := self._beat_store.add("endings", 0)) == version:
            return [], now
        keys = [f"ending/{rank}" for rank in set(range(self.size)) - {ending.rank for ending in self._endings}]
        return [Ending(*json.loads(self._beat_store.get(key))) for key in keys if self._beat_store.check([key])], now

    def _watch(self) -> None:
        """Notice if the heartbeat thread waits for an unreachable store, or the main thread for a lost rank."""
        answered, silent, position, stuck = 0, 0, None, 0
        while not self._leaving.wait(self.patience / BEATS):
            silent = 0 if self._answered != answered else silent + 1
            answered = self._answered
            if silent == BEATS:
                self._endings.append(Ending(0, "failed", GONE))
            if error := self.lost_peer():
                frame = sys._current_frames().get(threading.main_thread().ident)
                before, position = position, frame and (id(frame), frame.f_lasti)
                stuck = stuck + 1 if position == before else 0
                if stuck == BEATS:
                    self._on_stuck(error)
                    return

    # Leaving

    def leave(self, kind: str = "finished", reason: str = "", reporter: int | None = None) -> bool:
        """Tell the others how this rank ends, see `Ending`. Returns whether the awaited ranks have ended.

        Rank 0 waits for all others, since its process serves the store: until they end if it finished, else for at most
        `LINGER` seconds. The other ranks wait for the `reporter`, if there is one.
        """
        if self._leaving.is_set():
            return True
        self._leaving.set()
        seconds = 2 * LINGER if self.rank or kind != "finished" else float("inf")
        try:
            return in_background(self._leave, Ending(self.rank, kind, reason), reporter, seconds=seconds)
        except (RuntimeError, TimeoutError):
            return False  # the store is gone, and rank 0 with it
        finally:
            self._left.set()

    def _leave(self, ending: Ending, reporter: int | None) -> bool:
        self._announce(self._store, ending)
        limit = time.monotonic() + LINGER if ending.kind != "finished" else float("inf")
        awaited = set(range(self.size)) if self.rank == 0 else {self.rank if reporter is None else reporter}
        awaited.discard(self.rank)
        pause = 0.001
        while awaited and time.monotonic() < limit:
            try:
                awaited = {rank for rank in awaited if not self._store.check([f"ending/{rank}"])}
            except RuntimeError:
                return reporter in (None, 0)  # rank 0 has read this ending, and exited
            time.sleep(pause if awaited else 0)
            pause = min(1.5 * pause, 0.25)
        return not awaited
