"""Timing of calls, scripts and the network within them; tables of results."""

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
    """Median seconds per call without gradients, over at least `least` seconds, after a warm-up call."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    with torch.no_grad():
        return timer.blocked_autorange(min_run_time=least).median


def interleaved_seconds(calls: Mapping[Key, Callable[[], Any]], rounds: int) -> dict[Key, list[float]]:
    """Seconds per call of each of `calls`, by round; every round measures all of them."""
    seconds: dict[Key, list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            seconds[key].append(seconds_per_call(call))
    return seconds


def time_and_memory(call: Callable[[], Any], device: torch.device, least: float) -> dict[str, float]:
    """Seconds per call, measured for at least `least` seconds, and this process's peak memory in bytes.

    That is GPU memory on a GPU, else its RAM (Linux only).
    """
    result = {"seconds": seconds_per_call(call, least)}
    if device.type == "cuda":
        result["memory"] = torch.cuda.max_memory_allocated()
    elif (status := Path("/proc/self/status")).exists():
        result["memory"] = 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1])
    return result


def ratio(slow: list[float], fast: list[float]) -> list[float]:
    """Speedup of `fast` over `slow`, within rounds: [median, minimum, maximum]."""
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
    """Times a function of a script, and the network within it.

    Attributes:
        total: seconds of the last call of the function.
        in_network: seconds of these spent in the network.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.total = self.in_network = 0.0

    def around(self, function: Callable) -> Callable:
        """`function`, timed. If its first argument is callable, it is the network."""

        def measured(first: Any, *rest: Any) -> Any:
            spans: list[tuple] = []

            def network(*args: Any, **kwargs: Any) -> Any:
                start = self._mark()
                result = first(*args, **kwargs)
                spans.append((start, self._mark()))
                return result

            start = synchronized_seconds()
            result = function(network if callable(first) else first, *rest)
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
class FinishedRun:
    """Measurements of a finished process: seconds of wall-clock time, peak memory in bytes, and the run's record."""

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
    """Run a script of the repository with a launcher. Returns its standard output. Raises UserError if it fails."""
    command = [*launch, sys.executable, str(REPOSITORY / script), *as_flags(flags)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    if done.returncode:
        message = done.stderr[done.stderr.rfind("error: ") :][-1000:].removeprefix("error: ").strip()
        raise UserError(message or f"{' '.join(command)} failed with status {done.returncode}")
    return done.stdout


def run_and_measure(script: str, flags: Mapping[str, Any], launch: Sequence[str] = ()) -> FinishedRun:
    """Run a script that writes one record to its --output, with a launcher. Raises UserError if it fails."""
    start = time.perf_counter()
    # By a small process in between, because a child's peak memory includes that of the parent at the fork.
    memory = run_script(script, flags, [sys.executable, "-c", _MEASURE, *launch])
    seconds = time.perf_counter() - start
    (record,) = Path(flags["output"]).glob("*_run.json")
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return FinishedRun(seconds, int(memory) * unit, json.loads(record.read_text())["runs"][-1])


def run_quietly(script: ModuleType, flags: list[str]) -> None:
    """Run a script in this process and suppress its messages."""
    with contextlib.redirect_stderr(io.StringIO()):
        script.main(flags)
