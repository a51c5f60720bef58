"""The house: module-level imports run one way, from the main job down to the errors, and names never collide."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import fluidsched as fs

PACKAGE = Path(fs.__file__).parent

# Lower rooms first: a room may import, at module level, only rooms before it and itself.
ORDER = (
    "errors",
    "_checks",
    "_display",
    "_files",
    "_processors",
    "_toml",
    "workload",
    "server",
    "queues",
    "fluid",
    "policy",
    "integrations",
    "simulation",
    "bounds",
    "examples",
    "comparison",
    "measured",
    "plots",
    "sweeps",
    "tuning",
    "recommendation",
    "overload",
    "reporting",
    "fleets",
    "planning",
    "cli",
    "__main__",
)

# What a room must not know even though it stands below: the simulator reads tables, never solutions.
FORBIDDEN = {
    ("simulation", "fluid"),
    ("simulation", "queues"),
    ("server", "workload"),
    ("queues", "workload"),
}


def module_imports(tree: ast.Module) -> Iterator[str]:
    """Modules imported when the file is: not inside functions, not under TYPE_CHECKING."""
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            pending.extend(node.orelse)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, "imports are absolute"
            if node.module == "fluidsched":
                yield from (f"fluidsched.{alias.name}" for alias in node.names)
            else:
                yield node.module
        else:
            pending.extend(ast.iter_child_nodes(node))


def rooms() -> dict[str, set[str]]:
    """Room -> rooms it imports at module level."""
    imports: dict[str, set[str]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        if parts == ("__init__",):
            continue  # the public face: loads nothing until asked
        targets = imports.setdefault(parts[0], set())
        for name in module_imports(ast.parse(file.read_text())):
            head = name.split(".")
            if head[0] == "fluidsched" and len(head) > 1 and head[1] != "__version__":
                targets.add(head[1])
    return imports


def test_every_room_has_its_place_in_the_order() -> None:
    assert set(rooms()) == set(ORDER)


def test_the_design_names_every_room() -> None:
    """DESIGN.md says of each what it does."""
    design = (Path(__file__).parents[1] / "DESIGN.md").read_text(encoding="utf-8")
    for room in set(ORDER) - {"__main__"}:
        assert f"`{room}/`" in design or f"`{room}.py`" in design, room


def test_imports_run_one_way() -> None:
    """Nothing later in the pipeline is imported by anything earlier."""
    place = {room: number for number, room in enumerate(ORDER)}
    wrong = [
        f"{room} imports {target}"
        for room, targets in rooms().items()
        for target in targets
        if place[target] > place[room] or (room, target) in FORBIDDEN
    ]
    assert not wrong


def test_nothing_meets_in_one_module() -> None:
    """No module knows more than twenty others, imports inside functions included."""
    for file in PACKAGE.rglob("*.py"):
        known = {
            node.module
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fluidsched")
        }
        assert len(known) <= 20, f"{file.relative_to(PACKAGE)} imports from {len(known)} modules"


def test_no_module_shares_its_name_with_a_public_function() -> None:
    """A lazily loaded function named like a module would be shadowed by it once that is imported."""
    modules = {file.stem for file in PACKAGE.glob("*.py")} | {
        file.parent.name for file in PACKAGE.glob("*/__init__.py")
    }
    public_functions = {name for name in fs.__all__ if type(getattr(fs, name)).__name__ == "function"}
    assert not modules & public_functions


def test_no_two_test_files_share_a_name() -> None:
    """They are imported plainly, without packages: pytest would collect neither."""
    names = Counter(path.name for path in Path(__file__).parent.rglob("*.py"))
    assert {name: count for name, count in names.items() if count > 1 and name != "conftest.py"} == {}
