"""The public interface of guided-diffusion: all names exist, with their parameters and defaults.

upstream_api.json holds the facts: module -> name (function, Class, or Class.method) -> parameters, each [name] or
[name, default], or "class".
"""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

API = json.loads(Path(__file__).with_name("upstream_api.json").read_text())
NAMES = [(module, name) for module, names in API.items() for name in names]

# Intended differences: "module.name" -> reason.
EXCEPTIONS: dict[str, str] = {}

# Keyword-only in the original.
BY_KEYWORD = {
    "fp16_util.MixedPrecisionTrainer.__init__",
    "gaussian_diffusion.GaussianDiffusion.__init__",
    "image_datasets.load_data",
    "losses.discretized_gaussian_log_likelihood",
    "script_util.create_gaussian_diffusion",
    "train_util.TrainLoop.__init__",
}

NO_DEFAULT = inspect.Parameter.empty
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
VARIABLE = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def find(module: str, name: str) -> Any:
    """The object with this name. Raises AttributeError."""
    found = importlib.import_module(f"guided_diffusion.{module}")
    for part in name.split("."):
        found = getattr(found, part)
    return found


def default_of(text: str, module: str) -> Any:
    """A default in the file: a literal, or the name of a constant of the module."""
    try:
        return ast.literal_eval(text)
    except ValueError:
        return find(module, text)


def check(module: str, name: str) -> None:
    """Raise AssertionError or AttributeError unless the name exists and calls of it mean the same."""
    expected, found = API[module][name], find(module, name)
    if expected == "class":
        assert inspect.isclass(found)
        return
    ours = list(inspect.signature(found).parameters.values())
    named = {VARIABLE.get(p.kind, "") + p.name: p for p in ours}
    for entry in expected:
        assert entry[0] in named, f"no parameter {entry[0]}"
        if len(entry) == 2:  # a required parameter may have a default here
            assert named[entry[0]].default == default_of(entry[1], module), f"default of {entry[0]}"
    # Positional parameters are in the same order, and there are no new required ones.
    known = [entry[0] for entry in expected]
    if f"{module}.{name}" not in BY_KEYWORD:
        positional = list(itertools.takewhile(lambda name: not name.startswith("*"), known))
        in_order = [p.name for p in ours if p.kind in POSITIONAL]
        assert in_order[: len(positional)] == positional
    new = [p for spelling, p in named.items() if spelling not in known]
    assert all(p.default is not NO_DEFAULT or p.kind in VARIABLE for p in new), f"required besides: {new}"


@pytest.mark.parametrize(("module", "name"), [name for name in NAMES if ".".join(name) not in EXCEPTIONS])
def test_every_name_is_there_with_its_parameters(module, name):
    check(module, name)


def test_every_exception_has_a_reason_and_is_still_one():
    for name, reason in EXCEPTIONS.items():
        assert reason
        with pytest.raises((AssertionError, AttributeError)):
            check(*name.split(".", 1))
