"""The layout of the package: few modules at its top, and imports that point down."""

import ast
from pathlib import Path

import guided_diffusion

import pytest

PACKAGE = Path(guided_diffusion.__file__).parent

# From the bottom up. A module may import modules of its own layer and of those above it in this list.
LAYERS = [
    {"errors"},
    {"system", "logger"},
    {"nn", "losses", "fp16_util", "unet", "gaussian_diffusion", "respace"},
    {"dist_util"},
    {"compute", "resample"},
    {"command_line"},
    {"script_util"},
    {"images", "checkpoints"},
    {"runs"},
    {"forward_backward", "sample_folders", "sampling"},
    {"classifier", "torch_classifiers", "correlations"},
    {"changes"},
    {"training", "train_util", "image_datasets"},
]


def modules() -> dict[tuple[str, ...], Path]:
    """The modules of the package: their names, split at the dots, and their files."""
    return {path.relative_to(PACKAGE).with_suffix("").parts: path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(name: tuple[str, ...], path: Path) -> set[tuple[str, ...]]:
    """The modules of the package that a module imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*name[: -node.level], *(node.module or "").split(".")) if node.module else name[: -node.level]
            found |= {(*base, alias.name) if (*base, alias.name) in modules() else base for alias in node.names}
    return {module for module in found if module and module in modules()}


def layer_of(name: tuple[str, ...]) -> int:
    (layer,) = (number for number, units in enumerate(LAYERS) if name[0] in units)
    return layer


@pytest.mark.parametrize("name", [name for name in modules() if name[-1] != "__init__"], ids=".".join)
def test_imports_point_down(name):
    for imported in imports_of(name, modules()[name]):
        assert layer_of(imported) <= layer_of(name), f"{'.'.join(name)} imports {'.'.join(imported)}"


def test_no_module_imports_itself_through_others():
    above = {name: imports_of(name, path) for name, path in modules().items()}
    while done := [name for name, needed in above.items() if not needed]:
        for name in done:
            del above[name]
        for needed in above.values():
            needed.difference_update(done)
    assert not above


def test_the_top_of_the_package_can_be_read_at_a_glance():
    assert len([name for name in modules() if len(name) == 1 and name[0] != "__init__"]) <= 22
