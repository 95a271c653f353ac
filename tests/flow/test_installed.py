# covers: launcher/pretrain.py launcher/plan.py
# covers: megalite/commands/pretrain.py megalite/commands/plan.py
"""The wheel of `pip install .` is complete, and trains without a checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
NESTED = {"launcher": "megalite/launcher", "configs": "megalite/configs"}  # in the wheel


def succeed(*command: str, folder: Path, **environ: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environ}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy, because a build writes files next to the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("megalite", "data_prep", *NESTED):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = ("-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), ".")
    succeed(sys.executable, *build, folder=source)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    target = wheel.parent / "site"
    succeed(*PIP, "install", "--no-deps", "--target", str(target), str(wheel), folder=wheel.parent)
    return target


def test_wheel_contains_all_modules_and_configs(wheel: Path) -> None:
    expected = {
        "/".join((NESTED.get(folder, folder), path.relative_to(ROOT / folder).as_posix()))
        for folder in ("megalite", "data_prep", *NESTED)
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected


def test_wheel_has_the_launchers_as_modules(installed: Path, tmp_path: Path) -> None:
    for path in sorted((ROOT / "launcher").glob("[a-z]*.py")):
        if path.stem != "smoke":
            command = (sys.executable, "-m", f"megalite.launcher.{path.stem}", "--help")
            output = succeed(*command, folder=tmp_path, PYTHONPATH=str(installed))
            assert output.startswith(f"usage: {path.name}")
    smoke = (sys.executable, "-m", "megalite.launcher.smoke")
    environ = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(smoke, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert (done.returncode, "start `make smoke` there" in done.stderr) == (1, True)


def test_wheel_trains_without_a_checkout(
    installed: Path, tmp_path: Path, shards: dict[str, str]
) -> None:
    """The run file extends a shipped one. The command is that of the README."""
    mine: dict[str, Any] = {
        "extends": "smoke.json",
        "name": "mine",
        "model": {"vocab_size": 258, "hidden_size": 16, "intermediate_size": 32},
        "data": {"train": [{"path": shards["train"]}], "valid": [], "sequence_length": 16},
        "training": {
            "steps": 2,
            "global_batch_size": 2,
            "micro_batch_size": 1,
            "precision": "fp32",
        },
    }
    (tmp_path / "mine.json").write_text(json.dumps(mine))
    output = succeed(
        *(sys.executable, "-c", "import megalite, data_prep; print(megalite.__file__)"),
        folder=tmp_path,
        PYTHONPATH=str(installed),
    )
    assert Path(output.strip()) == installed / "megalite/__init__.py"
    launch = (f"{Path(sys.executable).parent}/deepspeed", "--num_gpus", "2", "--module")
    command = (*launch, "megalite.launcher.pretrain", "--config", "mine.json")
    succeed(*command, folder=tmp_path, PYTHONPATH=str(installed))
    assert json.loads((tmp_path / "runs/mine/status.json").read_text())["state"] == "done"
    plan = ("megalite.launcher.plan", "--config", "configs/7b.json", "--gpu", "h100-80gb", "--json")
    output = succeed(sys.executable, "-m", *plan, folder=tmp_path, PYTHONPATH=str(installed))
    assert json.loads(output)["parameters"] == 6_738_415_616


def test_megalite_is_on_the_path_where_no_checkout_is(installed: Path, tmp_path: Path) -> None:
    def megalite(*arguments: str) -> str:
        command = (sys.executable, str(installed / "bin" / "megalite"), *arguments)
        return succeed(*command, folder=tmp_path, PYTHONPATH=str(installed))

    output = megalite("plan", "7b.json", "--gpu", "h100-80gb", "--json")
    assert json.loads(output)["parameters"] == 6_738_415_616
    (tmp_path / "text.txt").write_text("The same run on any layout. " * 50)
    megalite("data", "tokenize", "--input", "text.txt", "--tokenizer", "bytes", "--output", "data")
    (tmp_path / "mine.yaml").write_text(
        "extends: smoke.json\n"
        "name: mine\n"
        "model: {vocab_size: 258, hidden_size: 16, intermediate_size: 32}\n"
        "data:\n"
        "  train: [{path: data}]\n"
        "  valid: []\n"
        "  sequence_length: 16\n"
        "training: {steps: 2, global_batch_size: 2, micro_batch_size: 1, precision: fp32}\n"
    )
    megalite("pretrain", "mine.yaml", "--ranks", "2")
    assert json.loads((tmp_path / "runs/mine/status.json").read_text())["state"] == "done"
    options = ("--prompt", "The", "--max-new-tokens", "4")
    assert megalite("generate", "runs/mine", *options).startswith("The")
