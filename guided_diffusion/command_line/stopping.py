"""The end of a script: exit status, one-line errors, and signals that ask it to stop."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import blobfile as bf

from .. import dist_util, logger
from ..compute.memory import not_enough_memory
from ..errors import UserError, is_out_of_memory

# Signals that ask a process to stop. Open MPI's mpiexec kills its processes half a second after SIGTERM or Ctrl-C,
# perhaps too early for a checkpoint, but merely forwards SIGUSR1.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
INSISTENCE = 1.0  # seconds after which a second Ctrl-C stops the process immediately


class Stopped(BaseException):
    """Raised in the main thread when one of `STOP_SIGNALS` arrives."""

    on_all_ranks = True  # a launcher forwards the signal to every rank

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


class _Received:
    """The signals received so far.

    Slurm sends SIGTERM twice within milliseconds at a time limit, and launchers forward signals that the process has
    already received. So only a second Ctrl-C after `INSISTENCE` seconds means that the user will not wait.
    """

    def __init__(self) -> None:
        self.signum = 0  # the first one
        self._first_interrupt: float | None = None

    def add(self, signum: int) -> bool:
        """Add a signal. Returns whether it is a second Ctrl-C of a user who will not wait."""
        self.signum = self.signum or signum
        if signum != signal.SIGINT:
            return False
        now = time.monotonic()
        if self._first_interrupt is None:
            self._first_interrupt = now
            return False
        return now - self._first_interrupt >= INSISTENCE


_received = _Received()
_in_run = False  # whether `run` has called the script
_when_stopped: Callable[[], str] | None = None


class StopRequest:
    """Defers `STOP_SIGNALS` within a `with` block, whose code checks `signum` when it can stop.

    Only a second Ctrl-C, at least a second after the first, raises `Stopped` immediately.

    Attributes:
        signum: first signal received; 0 if none.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        global _received
        if not _in_run:  # a program that handled an earlier signal and continued
            _received = _Received()
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            for signum in STOP_SIGNALS:
                if signal.getsignal(signum) != signal.SIG_IGN:
                    self._before[signum] = signal.signal(signum, self._defer)
        return self

    def __exit__(self, *_) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _defer(self, signum: int, frame: Any) -> None:
        self.signum = self.signum or signum
        if _received.add(signum):
            raise Stopped(signum)


def hand_over(stopped: Stopped) -> None:
    """Stop in the way of the program: under `run`, raise `stopped`; else send it the signal that a block deferred.

    The program's own handler then does what it likes. By default, Ctrl-C raises KeyboardInterrupt, and other signals
    end the process. If the handler returns, so does this function.
    """
    if _in_run:
        raise stopped
    logger.info(f"{signal.Signals(stopped.signum).name}: {_saved_state()}")
    signal.raise_signal(stopped.signum)


def when_stopped(describe: Callable[[], str]) -> None:
    """Have `run` print the text of `describe` (what is saved, how to resume) if a signal stops the script."""
    global _when_stopped
    _when_stopped = describe


def run(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit with its status.

    Expected errors are printed without a traceback. Exit statuses: `status` of a UserError; 1 for an error of the
    system or the storage (disk full, no permission); 2 if memory is insufficient; 3 if another rank is gone;
    128 + number for a signal. Signals during the exit are ignored, except for a Ctrl-C at least a second after the
    first one. An error on all ranks is printed once; a rank that fails alone informs the others.
    """
    global _received, _in_run
    _received, _in_run = _Received(), True
    gc.freeze()  # the garbage collector need not visit imported modules, which live until the end, even at exit

    def stop(signum, frame):
        stopping = _received.signum
        if _received.add(signum) or not stopping:
            raise Stopped(signum)

    def leave(signum, frame):
        if _received.add(signum):
            os._exit(128 + signum)

    _handle_stop_signals(stop)
    reason = None
    try:
        try:
            status = main() or 0
        except Exception as error:
            expected = _expected_ending(error)
            if expected is None:
                _handle_stop_signals(leave)
                dist_util.leave_after_bug(error)
                raise
            status, words, reason = expected
    except Stopped as stopped:
        # If a rank dies, the launcher sends SIGTERM to the others, perhaps while they wait to learn which rank is lost.
        _handle_stop_signals(leave)
        status, reason = 128 + stopped.signum, stopped
        words = f"stopped by {signal.Signals(stopped.signum).name}: {_saved_state()}"
    _handle_stop_signals(leave)
    if reason is None:
        sys.exit(status)
    with suppress(OSError, ValueError, AttributeError):  # stdout may be closed
        sys.stdout.flush()
    dist_util.report_and_leave(reason, words)
    os._exit(status)


def _expected_ending(error: Exception) -> tuple[int, str, Exception] | None:
    """Exit status, message and reason of an expected error; None for a bug. May wait until a lost rank is known."""
    if isinstance(error, UserError):
        return error.status, f"error: {error}", error
    if isinstance(error, (OSError, bf.Error)):
        return 1, f"error: {error}", error
    if lost := dist_util.lost_peer_behind(error):
        return lost.status, f"error: {lost}", lost
    if is_out_of_memory(error):
        return 2, f"error: {not_enough_memory(error)}", error
    return None


def _handle_stop_signals(handler: Callable[[int, Any], None]) -> None:
    for signum in STOP_SIGNALS:
        signal.signal(signum, handler)


def _saved_state() -> str:
    with suppress(OSError, UserError):
        if _when_stopped:
            return _when_stopped()
    return "all files written so far are complete. Rerun the same command to resume"
