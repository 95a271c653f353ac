"""Every `bash` block of the pages is run as a reader would, one after the other in one folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INSTALLS = "pip install"  # a block that needs the package registry and minutes


def blocks(page: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def failures(chosen: list[str], folder: Path) -> list[str]:
    binaries = Path(sys.executable).parent
    environ = {
        **os.environ,
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    found = []
    for block in chosen:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=folder,
            env=environ,
            capture_output=True,
            text=True,
            timeout=600,
        )
        if done.returncode:
            found.append(f"{block}\n{done.stdout}{done.stderr}")
    return found


def test_the_blocks_of_the_data_page_run(tmp_path: Path) -> None:
    found = blocks("data.md")
    assert len(found) >= 6
    assert failures([block for block in found if INSTALLS not in block], tmp_path) == []


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("page", "count"), [("trust.md", 6), ("models.md", 5), ("planning.md", 3), ("watching.md", 1)]
)
def test_the_blocks_of_a_page_run(page: str, count: int, tmp_path: Path) -> None:
    for name in ("launcher", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    found = blocks(page)
    assert len(found) == count
    assert failures(found, tmp_path) == []


@pytest.mark.timeout(900)
def test_the_blocks_of_the_tutorial_run(tmp_path: Path) -> None:
    for name in ("launcher", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    found = blocks("tutorial.md")
    assert len(found) == 7
    assert failures(found, tmp_path) == []
    page = (tmp_path / "why.html").read_text(encoding="utf-8")
    assert "ending" in page


@pytest.mark.slow
def test_datatrove_hands_over_as_the_data_page_says(tmp_path: Path) -> None:
    assert failures(blocks("data.md"), tmp_path) == []
