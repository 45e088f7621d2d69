"""The order of the rooms: no module imports one of a room above its own, and no imports go in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]

# From the bottom to the top: a room imports from itself and from those before it.
ROOMS = (
    *("errors", "types", "targets", "util", "screening", "runtimes", "quant", "exporters", "data", "metrics"),
    *("artifacts", "loading", "measuring", "compression", "judging", "pruning", "doctor", "reports", "commands"),
    *("api", "cli", "__main__"),
)
MOST_FILES = 16  # of product code in a folder
MOST_LOOSE = 8  # modules beside the folders of edgekit/


def modules() -> dict[str, Path]:
    """Every module of the product by its dotted name, the package itself left out: all may import that."""
    found = {}
    for top in ("edgekit", "exporters", "quant", "runtimes"):
        for path in (ROOT / top).rglob("*.py"):
            parts = [*path.relative_to(ROOT).with_suffix("").parts]
            parts = parts if top == "edgekit" else ["edgekit", *parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    del found["edgekit"]
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Yields the product's modules that one imports anywhere in it, for type checkers too."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                target = f"{module}.{alias.name}"
                yield from [target] if target in known else [module] if module in known else []


def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: set(imports(name, path, known)) - {name} for name, path in known.items()}


def test_imports_go_downwards() -> None:
    found = graph()
    above = {name: ROOMS.index(name.split(".")[1]) for name in found}
    upward = [f"{a} → {b}" for a, targets in found.items() for b in targets if above[b] > above[a]]
    assert upward == []


def test_no_circles() -> None:
    left = {
        name: {target for target in targets if not name.startswith(f"{target}.")} for name, targets in graph().items()
    }
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    assert sorted(left) == []


def test_rooms_are_small() -> None:
    folders = {path.parent for path in modules().values()}
    counts = {str(folder.relative_to(ROOT)): len([*folder.glob("*.py")]) for folder in folders}
    assert {folder: count for folder, count in counts.items() if count > MOST_FILES} == {}
    assert len([*(ROOT / "edgekit").glob("*.py")]) <= MOST_LOOSE
