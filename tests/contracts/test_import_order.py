"""Imports point one way: a folder may use what stands before it in ORDER, never what stands behind it; and no module
needs itself."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Folders and modules of the package, what others stand on first. `schedules` is a folder of the top level.
ORDER = (
    "base",
    "ir",
    "hardware",
    "records",
    "models",
    "data",
    "sparsity",
    "frontend",
    "operators",
    "options",
    "lowering",
    "planning",
    "kernels",
    "schedules",
    "backends",
    "runtime",
    "devices",
    "budgeting",
    "checking",
    "assembling",
    "deciding",
    "compiling",
    "choosing",
    "opening",
    "exporting",
    "measuring",
    "tuning",
    "training",
    "sweeping",
    "finetuning",
    "ondevice",
    "cli",
    "__main__",
)
ALLOWED: set[tuple[str, str]] = set()  # breaches (module, what it imports) that are still to go


def modules() -> dict[str, ast.Module]:
    """{dotted name without "mest_compile.": its syntax tree}."""
    found = {}
    for top, prefix in ((ROOT / "mest_compile", ()), (ROOT / "schedules", ("schedules",))):
        for path in top.rglob("*.py"):
            parts = (*prefix, *path.relative_to(top).with_suffix("").parts)
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join(parts)] = ast.parse(path.read_text())
    return found


MODULES = modules()


def imports(tree: ast.Module, among: dict[str, ast.Module]) -> Iterator[str]:
    """Modules of the package that a module imports, anywhere, for types only too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mest_compile":
            source = node.module.removeprefix("mest_compile").removeprefix(".")
            for alias in node.names:
                full = f"{source}.{alias.name}".removeprefix(".")
                yield full if full in among else source
        elif isinstance(node, ast.Import):
            yield from (
                alias.name.removeprefix("mest_compile.")
                for alias in node.names
                if alias.name.startswith("mest_compile.")
            )


def breaches(among: dict[str, ast.Module]) -> set[tuple[str, str]]:
    found = set()
    for name, tree in among.items():
        for source in imports(tree, among):
            mine, its = name.split(".")[0], source.split(".")[0]
            if mine and its and mine != its and ORDER.index(its) > ORDER.index(mine):
                found.add((name, source))
    return found


def circle(among: dict[str, ast.Module]) -> list[str]:
    """Modules that import each other in a circle; empty when there are none."""
    edges = {
        name: [source for source in imports(tree, among) if source in among and source]
        for name, tree in among.items()
        if name
    }
    done: set[str] = set()

    def walk(name: str, above: list[str]) -> list[str]:
        if name in above:
            return above[above.index(name) :]
        if name in done:
            return []
        for source in edges.get(name, ()):
            if found := walk(source, [*above, name]):
                return found
        done.add(name)
        return []

    return next((found for name in edges if (found := walk(name, []))), [])


def test_every_folder_has_its_place_in_the_order():
    assert {name.split(".")[0] for name in MODULES if name} <= set(ORDER) | {"autotune_logs", "targets"}


def test_imports_point_one_way():
    assert breaches(MODULES) == ALLOWED


def test_no_circle():
    assert not circle(MODULES)


@pytest.mark.parametrize(
    "line",
    [
        "from mest_compile.runtime.step import TrainStep",
        "import mest_compile.runtime.step",
        "def f():\n    from mest_compile.runtime import step",
        "if TYPE_CHECKING:\n    from mest_compile.runtime.step import TrainStep",
    ],
)
def test_an_import_against_the_order_is_noticed_wherever_it_stands(line):
    among = {"operators.added": ast.parse(line), "runtime.step": ast.parse("")}
    assert breaches(among) == {("operators.added", "runtime.step")}


def test_a_circle_is_noticed():
    among = {
        "runtime.a": ast.parse("from mest_compile.runtime.b import B"),
        "runtime.b": ast.parse("from mest_compile.runtime import a"),
    }
    assert circle(among)
