"""Scripts of the repository as others of them use them: named by their path in it, run here or in processes."""

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


def words(flags: Mapping[str, Any]) -> list[str]:
    """Flags as on a command line: {"num_heads": 4} -> ["--num_heads", "4"]."""
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def load_script(path: str) -> ModuleType:
    """A script as a module: its `main` can be called in this process."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, REPOSITORY / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_mpiexec() -> str | None:
    """The mpiexec beside this Python, else the first on the path, if there is one."""
    beside = Path(sys.executable).with_name("mpiexec")
    return str(beside) if beside.exists() else shutil.which("mpiexec")


def environment(**changes: str) -> dict[str, str]:
    """The environment of a process that is started: the repository importable, and root may use mpiexec."""
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), **allowed, **changes}
