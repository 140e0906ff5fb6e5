"""The rooms of besa_exp/ and the order of imports between them: every import points down, and there is no circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "besa_exp"
FLOORS = (
    "cli",
    "runs",
    "dry_run",
    "report",
    "run_folder",
    "display",
    "evaluation",
    "recovery",
    "methods",
    "checkpoints",
)
FLOORS += ("checkpoints", "blocks", "tensors", "texts", "hub", "machine")
CELLAR = {"errors", "rules", "settings", "presets"}  # files that every room may import
MODULES = {
    ".".join(["besa_exp", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imported(module: str) -> set[str]:
    """The modules of the package that `module` imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return (found & MODULES.keys()) - {"besa_exp", module}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "besa_exp"


def test_every_import_between_rooms_points_down() -> None:
    floors = {name: number for number, name in enumerate(FLOORS)} | dict.fromkeys(CELLAR, len(FLOORS))
    up = [
        f"{module} imports {other}"
        for module in MODULES
        if room(module) in floors
        for other in imported(module)
        if room(module) != room(other) and floors.get(room(other), -1) <= floors[room(module)]
        if not {room(module), room(other)} <= CELLAR
    ]
    assert not up, "\n".join(up)


def test_no_circle_is_left_within_a_room() -> None:
    packages = {module for module, path in MODULES.items() if path.name == "__init__.py"}
    TopologicalSorter({module: imported(module) - packages for module in MODULES}).prepare()


def test_every_file_lies_in_a_room() -> None:
    flat = {path.stem for path in PACKAGE.glob("*.py")}
    assert flat == CELLAR | {"__init__", "__main__"}
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__", "conf"} <= {*FLOORS}
