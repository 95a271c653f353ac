"""The files around the code: notes for agents, the list of pages, templates, the workflow."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")


def test_llms_txt_lists_every_page_and_no_other() -> None:
    text = (ROOT / "docs/llms.txt").read_text(encoding="utf-8")
    listed = re.findall(r"^- \[.+?\]\((\w+\.md)\)", text, re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_notes_for_agents_name_targets_and_paths_that_exist() -> None:
    text = (ROOT / "AGENTS.md").read_text(encoding="utf-8")
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"\bmake (\w+)", text)) <= set(targets)
    paths = re.findall(r"`((?:megalite|data_prep|tests|docs)[\w/.]*)`", text)
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_workflow_runs_the_script_of_the_project() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = workflow["jobs"]["ci"]["steps"]
    assert ".ci/run" in [step.get("run") for step in steps]
    oldest = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert oldest is not None
    assert workflow["jobs"]["ci"]["strategy"]["matrix"]["python"][0] == oldest[1]


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_form_has_labelled_fields(name: str) -> None:
    form = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text())
    assert {"name", "description", "body"} <= form.keys()
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)
    assert all(field["attributes"]["label"] for field in form["body"])


def test_code_owners_name_folders_that_exist() -> None:
    lines = (ROOT / ".github/CODEOWNERS").read_text().splitlines()
    paths = [line.split()[0] for line in lines if line and not line.startswith(("#", "*"))]
    assert paths
    assert [path for path in paths if not (ROOT / path.strip("/")).exists()] == []
