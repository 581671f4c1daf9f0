"""Timing of calls, of scripts and of the network within them; tables of the results."""

from __future__ import annotations

import contextlib
import io
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from guided_diffusion.errors import UserError
from guided_diffusion.system.other_scripts import REPOSITORY, as_flags, environment

import torch
from torch.utils.benchmark import Timer
from torch.utils.benchmark import timer as synchronized_seconds

Row = dict[str, Any]  # value by column
Key = TypeVar("Key", bound=Hashable)


def seconds_per_call(call: Callable[[], Any], least: float = 0.2) -> float:
    """Median seconds per call, over at least `least` seconds, after a call to warm up."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    with torch.inference_mode():
        return timer.blocked_autorange(min_run_time=least).median


def take_turns(calls: Mapping[Key, Callable[[], Any]], rounds: int) -> dict[Key, list[float]]:
    """Seconds per call of each of `calls`, by round; all take their turn in every round."""
    seconds: dict[Key, list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            seconds[key].append(seconds_per_call(call))
    return seconds


def time_and_memory(call: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Seconds per call, and this process's peak memory in bytes: GPU memory on a GPU, else its RAM (Linux only)."""
    found = {"seconds": seconds_per_call(call, least=2.0)}
    if device.type == "cuda":
        found["memory"] = torch.cuda.max_memory_allocated()
    elif (status := Path("/proc/self/status")).exists():
        found["memory"] = 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1])
    return found


def ratio(slow: list[float], fast: list[float]) -> list[float]:
    """How many times as long the first took, round by round: [median, minimum, maximum]."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return [statistics.median(ratios), min(ratios), max(ratios)]


def table(rows: list[Row]) -> str:
    """Rows as a Markdown table."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([_cell(name, row.get(name, "")) for name in names] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(name: str, value: Any) -> str:
    if isinstance(value, list):
        return "{:.2f} ({:.2f}..{:.2f})".format(*value)
    if isinstance(value, float):
        if name.startswith("share"):
            return f"{value:.1%}"
        if "error" in name:
            return f"{value:.1e}"
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


# Scripts


class Clock:
    """Measures a function of a script, and the network's share of its time.

    Attributes:
        total: seconds that the last call of the function took.
        in_network: seconds of these spent in the network.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.total = self.in_network = 0.0

    def around(self, function: Callable) -> Callable:
        """A replacement for `function` that measures it. If its first argument is callable, that is the network."""
        spans: list[tuple] = []

        def timed(network: Callable) -> Callable:
            def call(*args: Any, **kwargs: Any) -> Any:
                start = self._mark()
                result = network(*args, **kwargs)
                spans.append((start, self._mark()))
                return result

            return call

        def measured(first: Any, *rest: Any) -> Any:
            spans.clear()
            start = synchronized_seconds()
            result = function(timed(first) if callable(first) else first, *rest)
            self.total = synchronized_seconds() - start
            self.in_network = sum(self._between(*span) for span in spans)
            return result

        return measured

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - start


@dataclass
class Finished:
    """A process that has ended.

    Attributes:
        seconds: wall-clock time.
        memory: peak memory in bytes.
        record: the run's record.
    """

    seconds: float
    memory: int
    record: dict[str, Any]


_MEASURE = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


def run_script(script: str, flags: Mapping[str, Any], launch: Sequence[str] = ()) -> str:
    """Run a script of the repository, after the words of a launcher. Returns its standard output.

    Raises UserError, with the end of its error message, if it fails.
    """
    command = [*launch, sys.executable, str(REPOSITORY / script), *as_flags(flags)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    if done.returncode:
        message = done.stderr[done.stderr.rfind("error: ") :][-1000:].removeprefix("error: ").strip()
        raise UserError(message or f"{' '.join(command)} failed with status {done.returncode}")
    return done.stdout


def run_and_measure(script: str, flags: Mapping[str, Any], launch: Sequence[str] = ()) -> Finished:
    """Run a script that leaves one record in its --output, after the words of a launcher. Raises UserError."""
    start = time.perf_counter()
    # A small process in between: the memory of this one would count for a process that it starts itself.
    memory = run_script(script, flags, [sys.executable, "-c", _MEASURE, *launch])
    seconds = time.perf_counter() - start
    (record,) = Path(flags["output"]).glob("*_run.json")
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return Finished(seconds, int(memory) * unit, json.loads(record.read_text())["runs"][-1])


def run_quietly(script: ModuleType, flags: list[str]) -> None:
    """Run a script in this process, without its messages."""
    with contextlib.redirect_stderr(io.StringIO()):
        script.main(flags)
