"""What a script owes its user: short answers to mistakes, and a tidy end."""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import Any

from .errors import UserError, is_out_of_memory
from .presets import preset_words


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser that answers a mistake in one line, and proposes the flag that was meant.

    Args:
        computes: the script runs networks: it has the flag --device.
    """

    def __init__(self, computes: bool = True, **kwargs):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)
        if computes:
            self.add_argument(
                "--device",
                default="auto",
                choices=["auto", "cpu", "cuda"],
                help="where to compute; auto: on the GPU if the machine has one (default: %(default)s)",
            )

    def parse_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        # Looked for first: a misspelt flag is the reason where a required one is missing.
        for word in words:
            if word.split("=")[0] in ("--local-rank", "--local_rank"):
                self._answer_old_launcher()
            if word.startswith("--") and self._has_several(word):
                self.error(
                    f"several words came as one, {word[:40]!r}...: zsh does that with $MODEL_FLAGS and the like. Write "
                    "${=MODEL_FLAGS}; in bash, leave out the quotes"
                )
            if word.startswith("--") and word.split("=")[0] not in self._option_string_actions:
                self.error(self._explain(word))
        if "--preset" in self._option_string_actions:
            words = [*preset_words(words), *words]  # the last value of a flag counts
        return super().parse_args(words, namespace)

    def _answer_old_launcher(self):
        """`python -m torch.distributed.launch` gives a flag to every process: one answers, the others wait for it."""
        if os.environ.get("RANK", "0") != "0":
            time.sleep(2)  # the launcher ends all processes as soon as one ends
            self.exit(2)
        self.exit(
            2,
            "error: python -m torch.distributed.launch adds the flag --local-rank, which the scripts do not take. Use "
            "torchrun instead, with the same flags: torchrun --nproc_per_node N SCRIPT ...\n",
        )

    def error(self, message):
        self.exit(2, f"error: {message}{'' if message.endswith('?') else '.'} See --help.\n")

    def _has_several(self, word: str) -> bool:
        """Whether a word holds flags with their values, or a flag and its value, between spaces."""
        first, *others = word.split()
        flags = {part.split("=")[0] for part in others}.intersection(self._option_string_actions)
        return bool(flags or (others and first in self._option_string_actions))

    def _explain(self, word: str) -> str:
        flag = word.split("=")[0]
        close = difflib.get_close_matches(flag, self._option_string_actions, n=1)
        return f"there is no flag {flag}" + (f": did you mean {close[0]}?" if close else "")


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """The type of a flag that is a whole number in a range."""

    def read(text: str) -> int:
        expected = f"a whole number from {low}" + (" on" if high is None else f" to {high}")
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {expected}, not {text!r}") from None
        if number < low or (high is not None and number > high):
            raise argparse.ArgumentTypeError(f"expected {expected}, not {number}")
        return number

    return read


def time_list(text: str) -> list[int]:
    """The type of a flag that is one time or several, separated by commas; see `Flattened`."""
    times = [whole_number(0)(word) for word in text.replace(",", " ").split()]
    if not times:
        raise argparse.ArgumentTypeError(f"expected times such as 25 50 125, not {text!r}")
    return times


class Flattened(argparse.Action):
    """Joins the lists that the words of a flag are into one."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, [item for items in values for item in items])


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
        lost = dist_util().explain(error) if dist_util() else None
        if lost is not None:
            status, words, reason = lost.status, f"error: {lost}", lost
        elif is_out_of_memory(error):
            from .memory import not_enough_memory

            status, words, reason = 2, f"error: {not_enough_memory(error)}", error
        else:
            if dist_util():
                dist_util().leave_alone(error)
            raise
    _handle_stop_signals(leave)
    if reason is None:
        sys.exit(status)
    sys.stdout.flush()
    if dist_util():
        dist_util().end(reason, words)
    else:
        say(words)
    os._exit(status)


def _handle_stop_signals(handler: Callable[[int, Any], None]) -> None:
    for signum in STOP_SIGNALS:
        signal.signal(signum, handler)


def _state_of_the_output() -> str:
    with suppress(OSError, UserError):
        if _when_stopped:
            return _when_stopped()
    if not dist_util():
        return "nothing had begun. Run the same command again"
    return "every file written so far is complete. Run the same command again to resume"


def dist_util() -> ModuleType | None:
    """The module of that name, if it is loaded: it imports torch, for which not every script waits."""
    return sys.modules.get("guided_diffusion.dist_util")


def say(words: str) -> None:
    """Print words to stderr, on a line of their own even if a progress bar is there."""
    sys.stderr.write(f"\n{words}\n" if sys.stderr.isatty() else f"{words}\n")
    sys.stderr.flush()
