"""Every module is named by the first lines of a test file, such as `# covers: megalite/mesh.py`.

A line names one path or more. The lines stand above the docstring of the test file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEAD = "# covers:"

MODULES = {
    path.relative_to(ROOT).as_posix()
    for folder in ("megalite", "data_prep", "launcher")
    for path in (ROOT / folder).rglob("*.py")
    if path.name != "__init__.py"
}


def covered_by(path: Path) -> Iterator[str]:
    """Yield the paths in the first lines of a test file."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith(HEAD):
            return
        yield from line.removeprefix(HEAD).split()


def lines_of(path: Path) -> list[str]:
    """Return all lines of a file that name modules, including lines below the first ones."""
    return [x for x in path.read_text(encoding="utf-8").splitlines() if x.startswith(HEAD)]


COVERED = {path: list(covered_by(path)) for path in sorted((ROOT / "tests").rglob("test_*.py"))}
NAMED = {name for names in COVERED.values() for name in names}


def test_modules_are_all_named_by_a_test_file() -> None:
    assert sorted(MODULES - NAMED) == []


def test_modules_named_by_a_test_file_exist() -> None:
    assert sorted(name for name in NAMED if not (ROOT / name).is_file()) == []


def test_lines_that_name_modules_come_first() -> None:
    late = [
        path.name
        for path, names in COVERED.items()
        if path.name != Path(__file__).name
        and sum(len(line.split()[2:]) for line in lines_of(path)) != len({*names})
    ]
    assert late == []


def test_covered_by_reads_up_to_the_first_other_line(tmp_path: Path) -> None:
    path = tmp_path / "test_a.py"
    path.write_text(f'{HEAD} a.py b.py\n{HEAD} c.py\n"""Docstring."""\n{HEAD} d.py\n')
    assert list(covered_by(path)) == ["a.py", "b.py", "c.py"]
