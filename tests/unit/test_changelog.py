"""CHANGELOG.md lists changed defaults, and its lines restore the old values."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megalite import __version__
from megalite.config import load_config
from tests.helpers.runs import BASE, merge_sections

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (`.+?) \| (.+?) \| (.+?) \| `(\{.+\})` \|$", TEXT, re.MULTILINE)


def leaves(
    section: dict[str, Any], path: tuple[str, ...] = ()
) -> list[tuple[tuple[str, ...], Any]]:
    """Return the keys and values of nested sections."""
    pairs = []
    for key, value in section.items():
        inner = isinstance(value, dict)
        pairs += leaves(value, (*path, key)) if inner else [((*path, key), value)]
    return pairs


def value_at(config: Any, path: tuple[str, ...]) -> Any:
    """Return the value of a key of a loaded configuration."""
    for key in path:
        config = config[key] if isinstance(config, dict) else getattr(config, key)
    return config


def run_file() -> dict[str, Any]:
    """Return a small run file without a precision."""
    raw = merge_sections(BASE, {})
    del raw["training"]["precision"]
    return raw


@pytest.mark.parametrize(("key", "before", "now", "line"), ROWS, ids=[row[0] for row in ROWS])
def test_changelog_line_restores_the_old_default(
    tmp_path: Path, key: str, before: str, now: str, line: str
) -> None:
    """The line is added to a small run file, or to a file that extends the changed shipped file."""
    shipped = re.match(r"`configs/(.+?)`", key)
    sections = json.loads(line)
    base = {"extends": str(ROOT / "configs" / shipped[1])} if shipped else run_file()
    for name, extra in (("now", {}), ("restored", sections)):
        (tmp_path / f"{name}.json").write_text(json.dumps(merge_sections(base, extra)))
    restored = load_config(tmp_path / "restored.json")
    present = load_config(tmp_path / "now.json")
    changed = False
    for path, value in leaves(sections):
        read = value_at(restored, path)
        assert (list(read) if isinstance(read, tuple) else read) == value, path
        try:
            changed |= value_at(present, path) != read
        except AttributeError:  # the section is off unless the file has it
            changed = True
    assert changed, f"{key}: the line restores the present default"


def test_changelog_table_is_parsed_completely() -> None:
    table = TEXT.split("### Changed defaults")[1].split("###")[0]
    assert len(ROWS) == table.count("\n| ") - 2  # without the header
    assert len(ROWS) >= 12


def test_changelog_has_an_entry_for_the_version() -> None:
    assert f"## [{__version__}]" in TEXT
    assert "## [Unreleased]" in TEXT
