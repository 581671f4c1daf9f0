"""Interruptible waiting.

Python runs signal handlers in the main thread, between bytecode instructions. While that thread waits inside PyTorch,
SIGTERM and Ctrl-C do nothing. Blocking calls therefore run in another thread.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

from ..errors import UserError


def in_background(
    function: Callable, *args: Any, seconds: float = float("inf"), check: Callable[[], None] | None = None
) -> Any:
    """Call `function(*args)` in a daemon thread; return its result or raise its exception. Signals are handled.

    `check` is called every second and may raise. Raises TimeoutError after `seconds`; the call then continues in its
    thread, which does not keep the process alive.
    """
    future: Future = Future()

    def call() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    deadline = time.monotonic() + seconds
    while not wait([future], 1).done:
        if check is not None:
            check()
        if time.monotonic() > deadline:
            raise TimeoutError(f"no result within {seconds:g} s")
    return future.result()


def seconds_from(variable: str, default: float) -> float:
    """Timeout from an environment variable, or `default` if it is not set. Raises UserError unless it is positive."""
    text = os.environ.get(variable, "").strip()
    try:
        seconds = float(text) if text else default
    except ValueError:
        seconds = 0
    if not 0 < seconds < float("inf"):
        raise UserError(f"{variable}={text} in the environment: expected a positive number of seconds")
    return seconds
