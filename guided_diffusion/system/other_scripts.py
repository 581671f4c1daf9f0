"""Running one script of the repository from another, in this process or in new ones."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


def as_flags(flags: Mapping[str, Any]) -> list[str]:
    """Flags as command-line arguments: {"num_heads": 4} -> ["--num_heads", "4"]."""
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def load_script(path: str) -> ModuleType:
    """A script as a module, so that its `main` can be called in this process; `path` is relative to the repository."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, REPOSITORY / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_mpiexec() -> str | None:
    """The mpiexec next to this Python, else the first on PATH, else None."""
    beside = Path(sys.executable).with_name("mpiexec")
    return str(beside) if beside.exists() else shutil.which("mpiexec")


def environment(**changes: str) -> dict[str, str]:
    """Environment for child processes: the repository is importable, and root may use mpiexec."""
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), **allowed, **changes}
