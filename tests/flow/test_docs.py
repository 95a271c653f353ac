"""All `bash` blocks of a page run in sequence in one folder."""

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
INSTALLS = "pip install"  # marks blocks that need the package registry, and minutes


def blocks(page: str, kind: str = "bash") -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def failures(chosen: list[str], folder: Path, sources: Path = ROOT) -> list[str]:
    binaries = Path(sys.executable).parent
    environ = {
        **os.environ,
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(sources),
        "OMP_NUM_THREADS": "1",  # other tests use the other core
    }
    faults = []
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
            faults.append(f"{block}\n{done.stdout}{done.stderr}")
    return faults


def test_blocks_of_the_data_page_run(tmp_path: Path) -> None:
    commands = blocks("data.md")
    assert len(commands) >= 6
    assert failures([block for block in commands if INSTALLS not in block], tmp_path) == []


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
def test_blocks_of_a_page_run(page: str, count: int, tmp_path: Path) -> None:
    for name in ("launcher", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    commands = blocks(page)
    assert len(commands) == count
    assert failures(commands, tmp_path) == []


@pytest.mark.timeout(900)
def test_blocks_of_the_tutorial_run(tmp_path: Path) -> None:
    for name in ("launcher", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    commands = blocks("tutorial.md")
    assert len(commands) == 8
    assert failures(commands, tmp_path) == []
    [answer] = (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(answer)["prediction"] in ("positive", "negative")
    page = (tmp_path / "why.html").read_text(encoding="utf-8")
    assert "ending" in page


@pytest.mark.timeout(900)
def test_patches_of_the_page_on_extending_work(tmp_path: Path) -> None:
    """They are applied in sequence to a copy of the sources, and then the blocks run."""
    for name in ("configs", "data_prep", "docs", "launcher", "megalite"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    patches, commands = blocks("extending.md", "diff"), blocks("extending.md")
    assert (len(patches), len(commands)) == (6, 3)
    # norm, optimizer, reader, objective, family and task are one source file each
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
    assert failures(commands, tmp_path, sources=tmp_path) == []


def test_pages_with_blocks_all_have_a_test() -> None:
    run = {"data", "extending", "index", "models", "planning", "report", "trust", "tutorial"}
    run |= {"watching"}
    pages = (path for path in (ROOT / "docs").glob("*.md") if blocks(path.name))
    assert {path.stem for path in pages} == run


@pytest.mark.slow
def test_datatrove_output_is_read_as_the_data_page_says(tmp_path: Path) -> None:
    assert failures(blocks("data.md"), tmp_path) == []
