"""Which folder of ``embedcache`` may import which, and that no two modules import each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = (
    *(
        "errors",
        "progress",
        "units",
        "device",
        "config",
        "store",
        "base",
        "corpus",
        "cache",
        "data",
    ),
    *("loss", "carryon", "knn", "compose", "evaluation", "extraction", "editing", "training"),
    *("porting", "serving", "info", "inspection"),
)
"""Files and folders of ``embedcache``: each may import itself and those before it."""

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("embedcache", "cli")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def imported(module: str) -> Iterator[str]:
    """Yield the project's modules that a module imports, inside functions too."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in statements(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            parent = ".".join([*above, *filter(None, [node.module])])
            children = [f"{parent}.{alias.name}" for alias in node.names]
            yield from (child if child in MODULES else parent for child in children)


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a syntax tree, without what only a type checker runs."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield child
            yield from statements(child)


IMPORTS = {
    module: {found for found in imported(module) if found in MODULES and found != "embedcache"}
    for module in MODULES
    if module != "embedcache"  # its names are imported when they are asked for
}


def test_a_folder_imports_only_folders_before_it() -> None:
    place = {name: number for number, name in enumerate([*LAYERS, "cli"])}
    wrong = []
    for module, found in IMPORTS.items():
        own = place[module.removeprefix("embedcache.").split(".")[0]]
        for other in sorted(found):
            if place[other.removeprefix("embedcache.").split(".")[0]] > own:
                wrong.append(f"{module} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_through_others() -> None:
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" is imported by ".join(error.args[1]))
