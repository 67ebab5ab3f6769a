"""The folders of the benchmarks are layers: imports go down, and never in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BELOW_METHODS = {"comparison", "data", "models", "support"}
MAY_IMPORT = {
    "support": set(),
    "data": {"support"},
    "models": {"support"},
    "comparison": {"data", "models", "support"},
    "measurements": BELOW_METHODS,
    "methods": BELOW_METHODS,
    "runs": {"methods", *BELOW_METHODS},
    "reports": {"methods", "runs", "support"},
    "commands": {"measurements", "methods", "reports", "runs", *BELOW_METHODS},
}


def imported_modules(path):
    """The modules of the benchmarks that a file imports, such as ``data.tasks``."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base = (*base, *(node.module or "").split(".")) if node.module else base
            for alias in node.names if base[0] == "benchmarks" else ():
                is_module = ROOT.joinpath(*base, f"{alias.name}.py").is_file()
                yield ".".join((*base, alias.name)[1:] if is_module else base[1:])


MODULES = {
    ".".join(path.with_suffix("").relative_to(ROOT / "benchmarks").parts): set(
        imported_modules(path)
    )
    for path in ROOT.glob("benchmarks/*/*.py")
}


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_a_layer_imports_those_below_it_alone(layer):
    own = {name: found for name, found in MODULES.items() if name.startswith(f"{layer}.")}
    assert own
    imported = {name.partition(".")[0] for found in own.values() for name in found} - {layer}
    assert imported <= MAY_IMPORT[layer]


def test_no_import_goes_in_a_circle():
    assert len(list(TopologicalSorter(MODULES).static_order())) >= len(MODULES) > 40
    list(TopologicalSorter(MAY_IMPORT).static_order())


def test_every_folder_is_a_layer_that_says_what_it_is_for():
    folders = {path.parent.name for path in ROOT.glob("benchmarks/*/*.py")}
    assert folders == set(MAY_IMPORT)
    described = ast.get_docstring(ast.parse((ROOT / "benchmarks" / "__init__.py").read_text()))
    for folder in folders:
        assert f"\n    {folder} " in described
        text = (ROOT / "benchmarks" / folder / "__init__.py").read_text()
        assert ast.get_docstring(ast.parse(text))


def test_the_library_does_not_know_the_benchmarks():
    for path in ROOT.glob("fastforward_optim/**/*.py"):
        assert "benchmarks" not in path.read_text(), path
