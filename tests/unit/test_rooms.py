"""Arrows between rooms point down only, as ARCHITECTURE.md draws them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "schema": {"settings"},
    "workers": {"schema", "settings"},
    "submit_tasks": {"workers", "schema", "settings", "celeryconfig"},
    "api": {"submit_tasks", "workers", "schema", "settings"},
    "cli": {"api", "submit_tasks", "workers", "schema", "settings", "celeryconfig", "devstack", "bulk_submit_client"},
    "devstack": {"submit_tasks", "workers", "schema", "settings", "bulk_submit_client"},
    "client/bulk_submit_client": {"bulk_submit_client"},
}
ROOMS = {room.rpartition("/")[2] for room in MAY_IMPORT} | {"settings", "celeryconfig", "tests"}


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_room_imports_no_room_above_it(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    allowed = MAY_IMPORT[room] | {room.rpartition("/")[2]}
    found = {f"{path.name}: {name}" for path in files for name in (_imports(path) & ROOMS) - allowed}
    assert not found


def test_only_the_commands_that_need_it_import_devstack() -> None:
    at_start = {
        path.name
        for path in (ROOT / "cli").glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("devstack")
    }
    assert at_start == {"demo.py"}
