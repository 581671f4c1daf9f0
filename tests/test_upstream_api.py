"""The public interface of guided-diffusion: every name is here, with its parameters and defaults.

upstream_api.json holds the facts: module -> name (function, Class, or Class.method) -> parameters, each [name] or
[name, default], or "class".
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

API = json.loads(Path(__file__).with_name("upstream_api.json").read_text())
NAMES = [(module, name) for module, names in API.items() for name in names]

# What differs on purpose: "module.name" -> why.
EXCEPTIONS: dict[str, str] = {}

NO_DEFAULT = inspect.Parameter.empty
VARIABLE = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def find(module: str, name: str) -> Any:
    """What a client gets by this name. Raises AttributeError."""
    found = importlib.import_module(f"guided_diffusion.{module}")
    for part in name.split("."):
        found = getattr(found, part)
    return found


def default_of(entry: list[str], module: str) -> Any:
    """The default that is written in the file: a literal, or the name of a constant of the module."""
    if len(entry) == 1:
        return NO_DEFAULT
    try:
        return ast.literal_eval(entry[1])
    except ValueError:
        return find(module, entry[1])


def parameters_of(function: Any) -> list[inspect.Parameter]:
    """Its parameters; those that bind themselves, of static and class methods, are not among them."""
    return list(inspect.signature(function).parameters.values())


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_every_name_is_there_with_its_parameters(module, name):
    if f"{module}.{name}" in EXCEPTIONS:
        pytest.skip(EXCEPTIONS[f"{module}.{name}"])
    expected, found = API[module][name], find(module, name)
    if expected == "class":
        assert inspect.isclass(found)
        return
    ours = parameters_of(found)
    named = {VARIABLE.get(p.kind, "") + p.name: p for p in ours}
    for entry in expected:
        assert entry[0] in named, f"no parameter {entry[0]}"
        default = named[entry[0]].default
        assert default is default_of(entry, module) or default == default_of(entry, module), f"default of {entry[0]}"
    # A positional call means the same, and nothing new is required.
    in_order = [VARIABLE.get(p.kind, "") + p.name for p in ours if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    theirs = [entry[0] for entry in expected if entry[0] in in_order]
    plain = [name for name in theirs if not name.startswith("*")]
    assert in_order[: len(plain)] == plain
    new = [p for spelling, p in named.items() if [spelling] not in [entry[:1] for entry in expected]]
    assert all(p.default is not NO_DEFAULT or p.kind in VARIABLE for p in new), f"required besides: {new}"


def test_exceptions_are_of_the_interface_and_still_needed():
    for name, reason in EXCEPTIONS.items():
        module, _, rest = name.partition(".")
        assert rest in API[module] and reason
