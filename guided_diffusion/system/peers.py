"""What the ranks tell each other through a key-value store, and whether they are alive.

Everything is polled: a rank may wait for hours for another one that works, signals are handled meanwhile, and a rank
that died is noticed. Every rank counts up a key of its own, its heartbeat. Rank 0 watches all of them, the others watch
rank 0. When a rank ends, all others learn the reason.
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
BEATS = 30  # that a rank may miss before it counts as dead
LINGER = 10  # seconds in which a rank that failed waits for the others to learn why
GONE = "ended or cannot be reached"


class Ending(NamedTuple):
    """How a rank ended.

    Attributes:
        rank: which one.
        kind: "finished", "failed", or "followed" if it ended because of others, or together with all.
        words: of a rank that failed, what completes the sentence "rank 1 on HOST ..."; of one that followed, why.
    """

    rank: int
    kind: str
    words: str = ""


class Peers:
    """The other ranks, from the meeting to `leave`.

    Args:
        rank: of this process.
        hosts: host name of every rank.
        connect: makes a new connection to the store.
        on_stuck: called, in another thread, if a rank is lost and the main thread does not notice, since it waits
            inside PyTorch for something that may never come.

    A rank whose heartbeat stops for 60 seconds (GUIDED_DIFFUSION_PEER_TIMEOUT) is lost. The time is counted in the
    watching rank's own heartbeats: if a whole job is suspended, no time passes.
    """

    def __init__(
        self, rank: int, hosts: Sequence[str], connect: Callable[[], dist.Store], on_stuck: Callable[[LostPeer], None]
    ):
        self.rank, self.hosts, self.size = rank, hosts, len(hosts)
        self.patience = seconds_from("GUIDED_DIFFUSION_PEER_TIMEOUT", 60)
        self._store, self._beats = in_background(lambda: (connect(), connect()))
        self._on_stuck = on_stuck
        self._sent = 0  # messages so far, the same on all ranks
        self._endings: list[Ending] = []  # of all ranks, in order
        self._leaving, self._left = threading.Event(), threading.Event()
        self._answered = 0  # heartbeats of this rank that reached the store
        for work in (self._beat, self._watch):
            threading.Thread(target=work, daemon=True, name=work.__name__).start()

    # Messages

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        self._sent += 1
        key = f"message/{self._sent}"
        if self.rank == 0:
            in_background(self._put, key, pickle.dumps(value))
            return value
        return pickle.loads(in_background(self._take, key, 0, self.size - 1))

    def gather(self, value: Any) -> list:
        """The `value` of every rank, on every rank."""
        self._sent += 1
        key = f"message/{self._sent}"
        mine = pickle.dumps(value)
        if self.rank == 0:
            pieces = in_background(self._collect, key, mine)
        else:
            in_background(self._put, f"{key}/{self.rank}", mine)
            pieces = pickle.loads(in_background(self._take, key, 0, self.size - 1))
        return [pickle.loads(piece) for piece in pieces]

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
            raise self._cut_off() from error

    def _take(self, key: str, sender: int, readers: int) -> bytes:
        """Wait for a message. The last of its readers removes it from the store."""
        pause = 0.0005
        try:
            while True:
                lost = self.lost(awaited=sender)
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
            raise self._cut_off() from error
        return data

    def _cut_off(self) -> LostPeer:
        """The store does not answer: its server is gone, which is rank 0 (or torchrun, which ends with it)."""
        return self.lost() or self._describe(Ending(0, "failed", GONE))

    # Who is alive

    def check(self) -> None:
        """Raise LostPeer if a rank is lost. Nothing is sent: the heartbeat knows."""
        if error := self.lost():
            raise error

    def lost(self, awaited: int | None = None) -> LostPeer | None:
        """What `check` raises, if anything; also if rank `awaited` has ended, from which a message is still to come."""
        endings = list(self._endings)
        failed = [ending for ending in endings if ending.kind == "failed"]  # the first is the others' cause
        followed = [ending for ending in endings if ending.kind == "followed" and ending.words]
        missed = [ending for ending in endings if ending.rank == awaited]
        return next((self._describe(ending) for ending in failed + followed + missed), None)

    def explain(self) -> LostPeer | None:
        """The lost rank that explains why communication between ranks failed; None if all are alive.

        Waits until that is known.
        """
        deadline = time.monotonic() + 1.5 * self.patience
        while time.monotonic() < deadline:
            over = next((ending.rank for ending in list(self._endings) if ending.rank != self.rank), None)
            if found := self.lost(awaited=over):
                return found
            time.sleep(0.1)
        return None

    def reporter(self) -> int:
        """The rank that speaks for all who lost the same peer."""
        out = {ending.rank for ending in list(self._endings) if ending.kind != "followed"}
        return min(set(range(self.size)) - out, default=self.rank)

    def _describe(self, ending: Ending) -> LostPeer:
        here, name = (f"rank {rank} on {self.hosts[rank]}" for rank in (self.rank, ending.rank))
        if ending.rank == self.rank or ending.words.startswith(here):
            other = "the other ranks" if ending.rank == self.rank else name
            return LostPeer(f"{other} ended, for want of a sign of life from this one, {here}: is the network sound?")
        if ending.kind == "followed" and ending.words:
            return LostPeer(ending.words)
        return LostPeer(f"{name} {ending.words or 'ended'}; see its output. Start the same command again to resume")

    def _beat(self) -> None:
        """Count up this rank's heartbeat, judge those of others, and see who has ended."""
        watched = range(1, self.size) if self.rank == 0 else [0]
        seen = {rank: ("", 0) for rank in watched}  # last value, and for how many beats of our own it has not changed
        fresh: list[Ending] = []
        beat = version = 0
        while not self._left.wait(self.patience / BEATS if beat else 0):
            beat += 1
            try:
                self._beats.set(f"beat/{self.rank}", str(beat))
                # What was read last time counts now: a signal for all ranks has meanwhile reached this one too.
                self._endings += fresh
                fresh, version = self._new_endings(version)
                for rank in set(watched) - {ending.rank for ending in self._endings + fresh}:
                    value = self._beats.get(f"beat/{rank}") if self._beats.check([f"beat/{rank}"]) else ""
                    seen[rank] = (value, 0 if value != seen[rank][0] else seen[rank][1] + 1)
                    if seen[rank][1] == BEATS:
                        self._tell(self._beats, Ending(rank, "failed", GONE))
            except RuntimeError:
                self._endings.append(Ending(0, "failed", GONE))
                return
            self._answered = beat

    @staticmethod
    def _tell(store: dist.Store, ending: Ending) -> None:
        store.set(f"ending/{ending.rank}", json.dumps(ending))
        store.add("endings", 1)  # last: who sees it finds the other

    def _new_endings(self, version: int) -> tuple[list[Ending], int]:
        """The endings that are not known yet, if there are more than `version`; and their number."""
        if (now := self._beats.add("endings", 0)) == version:
            return [], now
        keys = [f"ending/{rank}" for rank in set(range(self.size)) - {ending.rank for ending in self._endings}]
        return [Ending(*json.loads(self._beats.get(key))) for key in keys if self._beats.check([key])], now

    def _watch(self) -> None:
        """See that the heartbeat does not wait for a store out of reach, nor the main thread for a lost rank."""
        answered, silent, where, stuck = 0, 0, None, 0
        while not self._leaving.wait(self.patience / BEATS):
            silent = 0 if self._answered != answered else silent + 1
            answered = self._answered
            if silent == BEATS:
                self._endings.append(Ending(0, "failed", GONE))
            if error := self.lost():
                frame = sys._current_frames().get(threading.main_thread().ident)
                here = frame and (id(frame), frame.f_lasti)
                stuck = stuck + 1 if here == where else 0
                where = here
                if stuck == BEATS:
                    self._on_stuck(error)
                    return

    # The end

    def leave(self, kind: str = "finished", words: str = "", reporter: int | None = None) -> bool:
        """Tell the others how this rank ends, see `Ending`.

        Rank 0 then waits for the others, since its process has the store: as long as they work if it finished, else
        for `LINGER` seconds at most. Another rank waits as long for the rank that reports, if there is one.

        Returns whether the others that were waited for have ended.
        """
        if self._leaving.is_set():
            return True
        self._leaving.set()
        seconds = 2 * LINGER if self.rank or kind != "finished" else float("inf")
        try:
            return in_background(self._leave, Ending(self.rank, kind, words), reporter, seconds=seconds)
        except (RuntimeError, TimeoutError):
            return False  # the store is gone, and rank 0 with it
        finally:
            self._left.set()

    def _leave(self, ending: Ending, reporter: int | None) -> bool:
        self._tell(self._store, ending)
        limit = time.monotonic() + LINGER if ending.kind != "finished" else float("inf")
        awaited = set(range(self.size)) if self.rank == 0 else {self.rank if reporter is None else reporter}
        awaited.discard(self.rank)
        pause = 0.001
        while awaited and time.monotonic() < limit:
            try:
                awaited = {rank for rank in awaited if not self._store.check([f"ending/{rank}"])}
            except RuntimeError:
                return reporter in (None, 0)  # rank 0 has seen our ending, and ended
            time.sleep(pause if awaited else 0)
            pause = min(1.5 * pause, 0.25)
        return not awaited
