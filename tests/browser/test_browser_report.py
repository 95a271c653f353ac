"""Test of the page of launcher/report.py in a browser."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.ranks import run_ranks
from tests.helpers.runs import rows, run_file, train

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = ("summary", "curves", "differences", "events", "forecast", "samples")


def test_page_of_two_runs_renders_without_errors(
    browser: Any, shards: dict[str, str], tmp_path: Path, save_screenshot: Callable[[str], None]
) -> None:
    runs = []
    for name, rate in (("first", 3e-3), ("second", 1e-2)):
        raw = run_file(shards, tmp_path, name=name, optimizer={"lr": rate})
        raw["logging"]["samples"] = {"prompts": ["import os"], "max_new_tokens": 8}
        run_ranks(train, 1, raw)
        runs.append(raw)
    page = tmp_path / "page.html"
    folders = [str(tmp_path / raw["name"]) for raw in runs]
    done = subprocess.run(
        [sys.executable, "launcher/report.py", *folders, "--output", str(page)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    browser.get(page.as_uri())
    save_screenshot("report")
    texts = {name: browser.find_element("id", name).text for name in SECTIONS}
    assert all("first" in texts[name] for name in ("summary", "samples")), texts
    assert "second" in texts["summary"]
    assert "optimizer.lr" in texts["differences"]
    assert "import os" in texts["samples"]
    assert f"{rows(runs[0], 'valid')[-1]['loss']:.2f}" in texts["summary"]
    curves = browser.find_elements("css selector", "#curves svg path")
    lengths = [browser.execute_script("return arguments[0].getTotalLength()", c) for c in curves]
    assert sum(length > 50 for length in lengths) >= 4  # at least two charts with a curve per run
    requests = browser.execute_script("return performance.getEntriesByType('resource').length")
    assert requests == 0  # the page loads no other file
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert errors == []
