"""Imports run one way; this test reads them from the sources."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "soul": set(),
    "workspace": {"soul"},
    "model": {"soul"},
    "datagen": {"soul", "model", "workspace"},
    "training": {"soul", "model", "workspace"},
    "agent": {"soul", "model", "workspace"},
    "evals": {"soul", "model", "workspace", "training", "agent", "datagen"},
}
FRONT = {"soulsmith", "quickstart"}
ENGINE = {"datagen.engine", "datagen.journal", "datagen.teachers", "datagen.generate"}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_rooms_import_only_the_rooms_above_them():
    wrong = []
    for room, allowed in ALLOWED.items():
        for path in (ROOT / room).rglob("*.py"):
            for name in imported(path):
                top = name.split(".")[0]
                if (top in ALLOWED and top not in allowed | {room}) or top in FRONT or (room == "evals" and name in ENGINE):
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def test_workspace_knows_only_tools_errors_and_files_of_soul():
    names = {name for path in (ROOT / "workspace").glob("*.py") for name in imported(path) if name.startswith("soul.")}
    assert {".".join(name.split(".")[:2]) for name in names} <= {"soul.tools", "soul.errors", "soul.files"}


def test_files_stay_small():
    big = {
        str(path.relative_to(ROOT)): n
        for room in [*ALLOWED, "."]
        for path in (ROOT / room).glob("*.py")
        if (n := len(path.read_text().splitlines())) > 400
    }
    assert big == {}


def test_no_unsafe_reading_of_data():
    unsafe = []
    for room in [*ALLOWED, "."]:
        for path in (ROOT / room).rglob("*.py") if room != "." else ROOT.glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
                    unsafe.append(f"{path}:{node.lineno}")
                if isinstance(node, (ast.Import, ast.ImportFrom)) and "pickle" in ast.unparse(node):
                    unsafe.append(f"{path}:{node.lineno}")
                if isinstance(node, ast.Attribute) and ast.unparse(node) in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
                    unsafe.append(f"{path}:{node.lineno}")
    assert unsafe == []
