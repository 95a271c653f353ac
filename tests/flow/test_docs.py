"""Every `bash` block of the pages is run as a reader would, one after the other in one folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INSTALLS = "pip install"  # a block that needs the package registry and minutes


def blocks(page: str, kind: str = "bash") -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def failures(chosen: list[str], folder: Path, sources: Path = ROOT) -> list[str]:
    binaries = Path(sys.executable).parent
    environ = {
        **os.environ,
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(sources),
        "OMP_NUM_THREADS": "1",  # other tests have the other core
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
    ("page", "count"),
    [
        ("index.md", 5),
        ("trust.md", 6),
        ("models.md", 6),
        ("planning.md", 3),
        ("report.md", 2),
        ("watching.md", 1),
    ],
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
    assert len(found) == 8
    assert failures(found, tmp_path) == []
    [answer] = (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(answer)["prediction"] in ("positive", "negative")
    page = (tmp_path / "why.html").read_text(encoding="utf-8")
    assert "ending" in page


@pytest.mark.timeout(900)
def test_the_patches_of_the_page_on_extending_work(tmp_path: Path) -> None:
    """In a copy of the sources, one on top of the other; the blocks use what they bring."""
    for name in ("configs", "data_prep", "docs", "launcher", "megalite"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    patches, found = blocks("extending.md", "diff"), blocks("extending.md")
    assert (len(patches), len(found)) == (6, 3)
    # norm, optimizer, reader, objective, family, task: one source file each
    assert [re.findall(r"^\+\+\+ b/(\S+)", patch, re.MULTILINE) for patch in patches] == [
        ["megalite/model/norms.py"],
        ["megalite/optim/optimizers.py"],
        ["data_prep/readers.py"],
        ["megalite/model/objectives.py"],
        ["megalite/checkpoint/huggingface/families/starcoder2.py"],
        ["megalite/config/tasks.py"],
    ]
    for number, patch in enumerate(patches):
        file = tmp_path / f"{number}.patch"
        file.write_text(patch, encoding="utf-8")
        outside = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
        command = ["git", "apply", file.name]
        done = subprocess.run(command, cwd=tmp_path, env=outside, capture_output=True, text=True)
        assert done.returncode == 0, f"{patch}\n{done.stderr}"
    assert failures(found, tmp_path, sources=tmp_path) == []


def test_every_page_with_blocks_is_run() -> None:
    run = {"data", "extending", "index", "models", "planning", "report", "trust", "tutorial"}
    run |= {"watching"}
    pages = (path for path in (ROOT / "docs").glob("*.md") if blocks(path.name))
    assert {path.stem for path in pages} == run


@pytest.mark.slow
def test_datatrove_hands_over_as_the_data_page_says(tmp_path: Path) -> None:
    assert failures(blocks("data.md"), tmp_path) == []
