"""Scripts where the project, or what it needs, is not installed, or where another package has its name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MAIN_SCRIPT, REPOSITORY, environment, run_python

SCRIPTS = sorted(
    str(path.relative_to(REPOSITORY)) for folder in (".", "scripts") for path in (REPOSITORY / folder).glob("*.py")
)
SCRIPTS.remove("setup.py")
PACKAGES = ("guided_diffusion", "random_hierarchy_model")


def shadow_package(folder: Path) -> None:
    """Another package of this name."""
    other = folder / "guided_diffusion"
    other.mkdir()
    for module in ("__init__", "dist_util", "logger", "script_util", "unet"):
        (other / f"{module}.py").touch()


def start(*words, **variables) -> subprocess.CompletedProcess:
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, env={**own, **variables}, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_uses_the_package_of_its_own_clone(script, tmp_path):
    """Whatever comes first on the path: the original package, or nothing of that name."""
    shadow_package(tmp_path)
    command = REPOSITORY / script, "--help"
    for path in (str(tmp_path), ""):
        done = run_python(*command, env=environment(PYTHONPATH=path))
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("usage: ")


@pytest.mark.parametrize("script", [MAIN_SCRIPT, "scripts/image_train.py"])
def test_a_script_uses_the_package_of_its_own_clone_if_python_itself_is_executed(script, tmp_path):
    shadow_package(tmp_path)
    done = start(REPOSITORY / script, "--help", PYTHONPATH=str(tmp_path))
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


def test_an_installed_wheel_has_every_module_and_the_demo_s_weights(tmp_path):
    """An editable install, which all other tests use, would not notice a folder that is not packaged."""
    source = tmp_path / "source"
    for package in PACKAGES:
        shutil.copytree(REPOSITORY / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source]
    subprocess.run([*pip, *build], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel], check=True, capture_output=True
    )
    names = [path.relative_to(source) for package in PACKAGES for path in (source / package).rglob("*")]
    names = [name for name in names if name.suffix in (".py", ".pt")]
    assert len(names) > 60 and all((tmp_path / "site" / name).exists() for name in names)
    modules = [".".join(name.with_suffix("").parts).removesuffix(".__init__") for name in names if name.suffix == ".py"]
    program = (
        f"import importlib\nfor module in {modules}: print(importlib.import_module(module).__file__)\n"
        "from random_hierarchy_model import demo\nassert demo.UNET_FILE.exists() and demo.CLASSIFIER_FILE.exists()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(tmp_path / "site")),
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(done.stdout.splitlines()) == len(modules)
    assert all(line.startswith(str(tmp_path / "site")) for line in done.stdout.splitlines())
