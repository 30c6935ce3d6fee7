"""What the documents say about files, settings and commands is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cli.main import app
from settings import Settings

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "client" / "README.md", *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text())]
    local = [link for link in links if link and "://" not in link]
    assert not [link for link in local if not (document.parent / link).exists()]


def test_every_setting_is_described() -> None:
    described = re.findall(
        r"^\| `BULK_SUBMIT_(\w+)` \|", (ROOT / "docs" / "configuration.md").read_text(), re.MULTILINE
    )
    assert sorted(described) == sorted(name.upper() for name in Settings.model_fields)


def test_defaults_are_as_described() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    for name, default in re.findall(r"^\| `BULK_SUBMIT_(\w+)` \| `([0-9.e+]+)` \|", text, re.MULTILINE):
        assert float(default) == pytest.approx(Settings.model_fields[name.lower()].default, rel=1e-5), name


def test_commands_in_the_readme_exist() -> None:
    named = set(re.findall(r"bulk-submit ([a-z]+)", (ROOT / "README.md").read_text()))
    known = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert named - {"submitter"} <= known
    assert "demo" in known


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 150
