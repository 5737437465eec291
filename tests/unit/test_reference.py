"""The pages made from the code are those on disk."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from difyops import reference, settings

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", ["settings.md", "cli.md", "doctor.md"])
def test_fresh(name: str) -> None:
    made = reference.pages().get(name)
    kept = DOCS / name
    assert made == (kept.read_text(encoding="utf-8") if kept.exists() else None), "run: make docs"


@pytest.mark.parametrize("name", ["settings.md", "cli.md", "doctor.md"])
def test_a_row_has_as_many_cells_as_its_table(name: str) -> None:
    text = reference.pages()[name]
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert tables
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table


def test_every_setting_is_described() -> None:
    page = reference.settings_markdown()
    for name, field in settings.Settings.model_fields.items():
        section = reference._section(field.annotation)
        for key, inner in section.model_fields.items() if section else [("", field)]:
            assert f"`{name}.{key}`".replace(".`", "`") in page
            assert inner.description, f"{name}.{key}"
