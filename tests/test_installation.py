"""Scripts where the project, or what it needs, is not installed, or where another package has its name."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY, environment, run_python

SCRIPTS = sorted(
    str(path.relative_to(REPOSITORY)) for folder in (".", "scripts") for path in (REPOSITORY / folder).glob("*.py")
)
SCRIPTS.remove("setup.py")


def start(*words, **variables) -> subprocess.CompletedProcess:
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, env={**own, **variables}, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_uses_the_package_of_its_own_clone(script, tmp_path):
    """Whatever comes first on the path: the original package (Python itself is executed), or nothing of that name."""
    other = tmp_path / "guided_diffusion"
    other.mkdir()
    for module in ("__init__", "dist_util", "logger", "script_util", "unet"):
        (other / f"{module}.py").touch()
    command = REPOSITORY / script, "--help"
    for done in (start(*command, PYTHONPATH=str(tmp_path)), run_python(*command, env=environment(PYTHONPATH=""))):
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("usage: ")


@pytest.mark.parametrize("script", SCRIPTS)
def test_missing_packages_are_told_in_a_line(script):
    done = start("-S", REPOSITORY / script)  # without site-packages
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: {sys.executable} has no numpy, pillow, torch, blobfile, tqdm: activate the environment in which this "
        f"project is installed, or install it: pip install -e {REPOSITORY}\n"
    )


def test_a_program_of_one_s_own_gets_an_exception():
    program = "try:\n import guided_diffusion.errors\nexcept ImportError as error:\n print(error)"
    done = start("-S", "-c", program, PYTHONPATH=str(REPOSITORY))
    assert done.returncode == 0
    assert done.stdout.startswith(f"{sys.executable} has no numpy, ")
