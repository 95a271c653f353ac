"""All programs and the notebook of examples/ run."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.api_page import ABOUT, EXAMPLES, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # other tests use the other core


def run_example(name: str, folder: Path) -> str:
    """Run an example in a folder. Return its output."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        cwd=folder,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "step " in done.stderr  # progress
    return done.stdout


def states(folder: Path) -> dict[str, str]:
    return {
        path.parent.name: json.loads(path.read_text())["state"]
        for path in (folder / "runs").glob("*/status.json")
    }


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return a folder in which examples/pretrain.py has run, and its output."""
    folder = tmp_path_factory.mktemp("examples")
    return folder, run_example("pretrain.py", folder)


def test_example_of_pretraining_trains_a_model(first: tuple[Path, str]) -> None:
    folder, printed = first
    assert printed.startswith("done runs/first/checkpoints/step_00000040")
    assert states(folder)["first"] == "done"
    source = (EXAMPLES / "pretrain.py").read_text()
    assert len(source.strip().splitlines()) <= 15


def test_block_of_the_front_page_runs(first: tuple[Path, str]) -> None:
    folder, _ = first
    config = json.loads((EXAMPLES / "tiny.json").read_text()) | {"name": "mine"}
    (folder / "mine.json").write_text(json.dumps(config))
    [block] = re.findall(r"^    import megalite\n(?:    .*\n|\n(?=    ))+", README, re.MULTILINE)
    (folder / "front.py").write_text(textwrap.dedent(block))
    assert run_example(str(folder / "front.py"), folder).startswith("done ")


def test_example_of_a_custom_dataset_trains(tmp_path: Path) -> None:
    printed = run_example("own_dataset.py", tmp_path)
    assert "documents; the last one begins with tensor(" in printed
    assert "'bits_per_byte': " in printed


def test_example_of_a_custom_objective_trains(first: tuple[Path, str]) -> None:
    losses = ast.literal_eval(run_example("own_objective.py", first[0]))
    assert [step for step, _ in losses] == [10, 20, 30, 40]
    assert losses[-1][1] < losses[0][1]


def test_example_of_lora_answers_conversations(first: tuple[Path, str]) -> None:
    printed = run_example("lora_chat.py", first[0])
    assert "'perplexity': " in printed
    assert states(first[0])["chat"] == "done"


@pytest.mark.timeout(600)
def test_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ipykernel", reason="the extra dev is not installed")
    nbclient = pytest.importorskip("nbclient", reason="the extra dev is not installed")
    nbformat = pytest.importorskip("nbformat")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    cells: list[Any] = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = ["".join(output.get("text", "") for output in cell.outputs) for cell in cells]
    results = [
        output["data"]["text/plain"]
        for cell in cells
        for output in cell.outputs
        if output.output_type == "execute_result"
    ]
    assert any("step 40/40  loss" in text for text in shown)
    assert any("the run is in a thread" in text for text in shown)
    assert results[-1].startswith("('stopped', (60, ")
    assert states(tmp_path) == {"notebook": "stopped"}


def test_notebook_is_stored_without_outputs() -> None:
    cells = json.loads((EXAMPLES / "notebook.ipynb").read_text())["cells"]
    assert [cell["outputs"] for cell in cells if cell["cell_type"] == "code"] == [[]] * sum(
        cell["cell_type"] == "code" for cell in cells
    )


def test_page_of_examples_names_every_example() -> None:
    assert sorted(ABOUT) == sorted(
        path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")
    )
