# covers: launcher/report.py
# covers: megalite/commands/report.py
"""launcher/report.py: the page it writes, and the input it refuses."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

LAUNCHER = Path(__file__).resolve().parents[3] / "launcher/report.py"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Return a folder with two runs, and one folder that is not a run."""
    for name in ("one", "two", "none"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    for name in ("one", "two"):
        row = f'{{"kind": "sample", "step": 1, "prompt": "{name}", "text": "\\ud800"}}\n'
        (tmp_path / "runs" / name / "metrics.jsonl").write_text(row)
    return tmp_path / "runs"


def report(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int | str | None:
    """Run the launcher in this process, and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(LAUNCHER), run_name="__main__")
    return ended.value.code


def test_report_writes_one_page(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = runs / "page.html"
    page.write_text("an earlier page")
    assert report(monkeypatch, runs / "one", runs / "two", "--output", page) == 0
    assert capsys.readouterr().out == f"{page}\n"
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert "<title>one, two – MegaLite</title>" in text
    assert sorted(path.name for path in runs.iterdir()) == ["none", "one", "page.html", "two"]


def test_report_refuses_bad_folders_and_writes_nothing(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(runs.rglob("*"))
    for arguments, message in (
        (
            [runs / "none", runs / "gone", runs / "one"],
            "none is not a run folder: it contains no metrics",
        ),
        (
            [runs / "none", runs / "gone"],
            "gone is not a run folder: no such folder; give run folders",
        ),
        ([runs], f"give run folders, such as {runs / 'one'}, {runs / 'two'}"),
        ([], "the following arguments are required: RUN"),
    ):
        assert report(monkeypatch, *arguments, "--output", runs / "page.html") == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
    for output in (runs, runs / "gone" / "page.html", runs / ("x" * 300)):
        assert report(monkeypatch, runs / "one", "--output", output) == 2
        assert f"--output {output}" in capsys.readouterr().err
    assert sorted(runs.rglob("*")) == before


def test_report_accepts_deep_nesting(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for depth in (300, 900, 100_000):
        nested = '{"a": ' * depth + "1" + "}" * depth
        event = f'{{"kind": "event", "step": 1, "name": "end", "a": {nested}}}\n'
        (runs / "one" / "metrics.jsonl").write_text(event)
        (runs / "one" / "config.json").write_text(nested)
        assert report(monkeypatch, runs / "one", "--output", runs / "page.html") == 0
        assert "</html>" in (runs / "page.html").read_text(encoding="utf-8")
