"""Timing: contenders that take turns, scripts and the parts of them, and tables of what was found."""

from __future__ import annotations

import contextlib
import io
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .errors import UserError
from .other_scripts import REPOSITORY, environment, words

if TYPE_CHECKING:
    import torch

Row = dict[str, Any]


@dataclass(eq=False)
class Contender:
    """Something to be timed, again and again: `call()`, which is work for `images` images."""

    name: str
    call: Callable[[], Any]
    precision: str = ""
    images: float = 0
    seconds: list[float] = field(default_factory=list)


def take_turns(contenders: Iterable[Contender], repeats: int, device: torch.device) -> None:
    """Time all contenders, one after the other, `repeats` times, after one round to warm up."""
    import torch

    contenders = list(contenders)
    for turn in range(repeats + 1):
        for contender in contenders:
            wait_for(device)
            start = time.perf_counter()
            with torch.inference_mode():
                contender.call()
            wait_for(device)
            if turn:
                contender.seconds.append(time.perf_counter() - start)


def wait_for(device: torch.device) -> None:
    """Return when a GPU has done all that it was told."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize()


def ratio(slow: list[float], fast: list[float]) -> list[float]:
    """How many times as long the first took, round by round: [median, least, most]."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return [statistics.median(ratios), min(ratios), max(ratios)]


def table(rows: list[Row]) -> str:
    """Rows as a table in Markdown."""
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
    """Measures a call, and within it those of a network.

    Attributes:
        total, in_network: seconds of the last call.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.total = self.in_network = 0.0

    def around(self, work: Callable) -> Callable:
        """`work` to be called in its place; where its first argument can be called, that is the network."""
        spans: list[tuple] = []

        def timed(network: Callable) -> Callable:
            def call(*args: Any, **kwargs: Any) -> Any:
                begin = self._mark()
                result = network(*args, **kwargs)
                spans.append((begin, self._mark()))
                return result

            return call

        def measured(first: Any, *rest: Any) -> Any:
            spans.clear()
            start = time.perf_counter()
            result = work(timed(first) if callable(first) else first, *rest)
            wait_for(self.device)
            self.total = time.perf_counter() - start
            self.in_network = sum(self._between(*span) for span in spans)
            return result

        return measured

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - begin


def time_alone(call: Callable[[], Any], device: torch.device, least: float = 2.0) -> dict[str, float]:
    """Seconds per call, over at least `least` seconds, after one to warm up, and this process's peak memory in bytes.

    The memory is the GPU's, or the process's on a CPU (where Linux tells it).
    """
    import torch

    with torch.inference_mode():
        call()
        wait_for(device)
        calls, start = 0, time.perf_counter()
        while not calls or time.perf_counter() - start < least:
            call()
            wait_for(device)
            calls += 1
        passed = time.perf_counter() - start
    found = {"seconds": passed / calls}
    if device.type == "cuda":
        found["memory"] = torch.cuda.max_memory_allocated()
    elif (status := Path("/proc/self/status")).exists():
        found["memory"] = 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1])
    return found


@dataclass
class Finished:
    """A process that has ended."""

    seconds: float
    memory: int  # at its peak, bytes
    record: dict[str, Any]


_MEASURE = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


def run_script(script: str, flags: dict[str, Any], launch: Sequence[str] = ()) -> str:
    """Run a script of the repository, behind the words `launch`; returns what it writes to standard output.

    Raises UserError, with the end of what it has said, where it fails.
    """
    command = [*launch, sys.executable, str(REPOSITORY / script), *words(flags)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    if done.returncode:
        said = done.stderr[done.stderr.rfind("error: ") :][-1000:].removeprefix("error: ").strip()
        raise UserError(said or f"{' '.join(command)} ended with status {done.returncode}")
    return done.stdout


def launched(launch: list[str], script: str, flags: dict[str, Any]) -> Finished:
    """Run a script that leaves one record in its --output, behind the words `launch`. Raises UserError if it fails."""
    start = time.perf_counter()
    # Of a process that was started by this one, the system would count this one's memory too.
    memory = run_script(script, flags, [sys.executable, "-c", _MEASURE, *launch])
    seconds = time.perf_counter() - start
    (record,) = Path(flags["output"]).glob("*_run.json")
    return Finished(
        seconds, int(memory) * (1 if sys.platform == "darwin" else 1024), json.loads(record.read_text())["runs"][-1]
    )


def quietly(script: ModuleType, flags: list[str]) -> None:
    """Run a script in this process, without its messages."""
    with contextlib.redirect_stderr(io.StringIO()):
        script.main(flags)
