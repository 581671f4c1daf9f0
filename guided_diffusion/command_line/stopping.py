"""How a script ends: its exit status, errors in a line, and signals that ask it to stop."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from .. import dist_util
from ..compute.memory import not_enough_memory
from ..errors import UserError, is_out_of_memory

# What asks a process to end. Open MPI's mpiexec kills its processes half a second after a SIGTERM or Ctrl-C, which may
# be too early for a checkpoint; a SIGUSR1 it only passes on.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
INSISTENCE = 1.0  # seconds after a Ctrl-C from which on another one interrupts what the first one left time for


class Stopped(BaseException):
    """Raised in the main thread when the process is asked to end by one of `STOP_SIGNALS`."""

    on_all_ranks = True  # a launcher that is stopped hands the signal to every rank

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


class _Asked:
    """The signals that have come so far.

    Slurm sends SIGTERM twice within milliseconds at a time limit, and launchers pass on what the process has already
    received itself. So only Ctrl-C, pressed again after a second, means that the user cannot wait.
    """

    def __init__(self) -> None:
        self.signum = 0  # the first one
        self._first_interrupt: float | None = None

    def note(self, signum: int) -> bool:
        """Take note of a signal. Returns whether it is a Ctrl-C that insists."""
        self.signum = self.signum or signum
        if signum != signal.SIGINT:
            return False
        now = time.monotonic()
        if self._first_interrupt is None:
            self._first_interrupt = now
            return False
        return now - self._first_interrupt >= INSISTENCE


_asked = _Asked()
_when_stopped: Callable[[], str] | None = None


class StopRequest:
    """Lets a loop end where it likes: within the `with` block, `STOP_SIGNALS` are only noted.

    The exception is a second Ctrl-C, at least a second after the first: it raises `Stopped` at once.

    Attributes:
        signum: the first signal that came, 0 before.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # others may not ask for signals
            for signum in STOP_SIGNALS:
                self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: Any) -> None:
        self.signum = self.signum or signum
        if _asked.note(signum):
            raise Stopped(signum)


def when_stopped(describe: Callable[[], str]) -> None:
    """Have `run` print what `describe` returns if a signal stops the script: what was saved, and how to resume."""
    global _when_stopped
    _when_stopped = describe


def run(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and end the process with its status.

    A UserError is printed without a traceback and ends with its status, a lack of memory with status 2; an error of the
    operating system (disk full, no permission) with status 1; another rank that is gone with status 3; a signal
    (SIGTERM, Ctrl-C, SIGUSR1) with 128 and its number. Further signals do not disturb that end, except for a Ctrl-C at
    least a second after the first one. What all ranks meet is said once. A rank that fails alone tells the others.
    """
    global _asked
    _asked = _Asked()

    def stop(signum, frame):
        ending = _asked.signum
        if _asked.note(signum) or not ending:
            raise Stopped(signum)

    def leave(signum, frame):
        if _asked.note(signum):
            os._exit(128 + signum)

    _handle_stop_signals(stop)
    reason = None
    try:
        status = main() or 0
    except UserError as error:
        status, words, reason = error.status, f"error: {error}", error
    except OSError as error:
        status, words, reason = 1, f"error: {error}", error
    except Stopped as stopped:
        status, reason = 128 + stopped.signum, stopped
        words = f"stopped by {signal.Signals(stopped.signum).name}: {_state_of_the_output()}"
    except Exception as error:
        lost = dist_util.lost_peer_behind(error)
        if lost is not None:
            status, words, reason = lost.status, f"error: {lost}", lost
        elif is_out_of_memory(error):
            status, words, reason = 2, f"error: {not_enough_memory(error)}", error
        else:
            dist_util.leave_after_bug(error)
            raise
    _handle_stop_signals(leave)
    if reason is None:
        sys.exit(status)
    sys.stdout.flush()
    dist_util.report_and_leave(reason, words)
    os._exit(status)


def _handle_stop_signals(handler: Callable[[int, Any], None]) -> None:
    for signum in STOP_SIGNALS:
        signal.signal(signum, handler)


def _state_of_the_output() -> str:
    with suppress(OSError, UserError):
        if _when_stopped:
            return _when_stopped()
    return "every file written so far is complete. Run the same command again to resume"
