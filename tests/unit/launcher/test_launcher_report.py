# covers: launcher/report.py
"""launcher/report.py: what it writes, and what it refuses."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

LAUNCHER = Path(__file__).resolve().parents[3] / "launcher/report.py"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder with two runs, and a folder that is none."""
    for name in ("one", "two", "none"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    for name in ("one", "two"):
        row = f'{{"kind": "sample", "step": 1, "prompt": "{name}", "text": "\\ud800"}}\n'
        (tmp_path / "runs" / name / "metrics.jsonl").write_text(row)
    return tmp_path / "runs"


def say(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(LAUNCHER), run_name="__main__")
    return ended.value.code


def test_it_writes_one_page(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = runs / "page.html"
    page.write_text("of before")
    assert say(monkeypatch, runs / "one", runs / "two", "--output", page) == 0
    assert capsys.readouterr().out == f"{page}\n"
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert "<title>one, two – MegaLite</title>" in text
    assert sorted(path.name for path in runs.iterdir()) == ["none", "one", "page.html", "two"]


def test_what_it_refuses_is_named_and_nothing_is_written(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(runs.rglob("*"))
    for arguments, told in (
        ([runs / "none", runs / "gone", runs / "one"], "none is no run: neither metrics.jsonl nor"),
        ([runs / "none", runs / "gone"], "gone is no run: no such folder; give runs, such as"),
        ([runs], f"give runs, such as {runs / 'one'}, {runs / 'two'}"),
        ([], "the following arguments are required: RUN"),
    ):
        assert say(monkeypatch, *arguments, "--output", runs / "page.html") == 2
        error = capsys.readouterr().err
        assert told in error
        assert "Traceback" not in error
    for output in (runs, runs / "gone" / "page.html", runs / ("x" * 300)):
        assert say(monkeypatch, runs / "one", "--output", output) == 2
        assert f"--output {output}" in capsys.readouterr().err
    assert sorted(runs.rglob("*")) == before


def test_nesting_beyond_measure_is_no_fault_of_the_program(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for depth in (300, 900, 100_000):
        nested = '{"a": ' * depth + "1" + "}" * depth
        event = f'{{"kind": "event", "step": 1, "name": "end", "a": {nested}}}\n'
        (runs / "one" / "metrics.jsonl").write_text(event)
        (runs / "one" / "config.json").write_text(nested)
        assert say(monkeypatch, runs / "one", "--output", runs / "page.html") == 0
        assert "</html>" in (runs / "page.html").read_text(encoding="utf-8")
