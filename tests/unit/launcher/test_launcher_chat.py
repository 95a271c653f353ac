"""launcher/generate.py --chat: prompts, conversations of a file, and turns of standard input."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.rows import write_jsonl
from tests.unit.launcher.test_launcher_generate import checkpoint, generate

__all__ = ["checkpoint"]  # fixtures

GREEDY = ("--temperature", "0", "--max-new-tokens", "5")


def question(text: str, *before: str) -> dict[str, Any]:
    """Return a conversation that ends with a user turn, after earlier turns."""
    roles = ("user", "assistant") * (len(before) + 1)
    turns = [{"role": r, "content": t} for r, t in zip(roles, (*before, text), strict=False)]
    return {"messages": turns}


def test_file_of_conversations_gets_the_answers_of_prompts(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_jsonl(str(tmp_path / "a.jsonl"), [question("ab"), question("cd", "x", "y")])
    arguments = ["--checkpoint", str(checkpoint), "--chat", *GREEDY]
    assert generate(monkeypatch, *arguments, "--messages", path, "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["messages"] for row in rows] == [
        question("ab")["messages"],
        question("cd", "x", "y")["messages"],
    ]
    assert generate(monkeypatch, *arguments, "--messages", path) == 0
    assert capsys.readouterr().out == "".join(f"{row['text']}\n" for row in rows)
    assert generate(monkeypatch, *arguments, "--prompt", "ab", "--json", "--system", "S") == 0
    row = json.loads(capsys.readouterr().out)
    assert [turn["role"] for turn in row["messages"]] == ["system", "user"]
    assert row["text"] == rows[0]["text"]  # the model reads only the last 8 tokens


def test_lines_of_standard_input_are_user_turns(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", str(checkpoint), "--chat", *GREEDY]
    monkeypatch.setattr(sys, "stdin", io.StringIO("ab\ncd\n"))
    assert generate(monkeypatch, *arguments, "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["ab", "cd"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("ab\ncd\n"))
    assert generate(monkeypatch, *arguments) == 0
    ended = capsys.readouterr()
    assert ended.out == "".join(f"{row['text']}\n" for row in rows)
    assert "2 oldest turns are no longer read" in ended.err
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert generate(monkeypatch, *arguments) == 0


def test_prompts_are_written_as_json(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", str(checkpoint), *GREEDY, "--prompt", "ab", "cd"]
    assert generate(monkeypatch, *arguments) == 0
    texts = capsys.readouterr().out.splitlines()
    assert generate(monkeypatch, *arguments, "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] + row["text"] for row in rows] == texts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--prompt is missing"),
        (["--prompt", "a", "--system", "b"], "only apply to a chat; add --chat"),
        (["--messages", "a.jsonl"], "only apply to a chat; add --chat"),
        (["--chat", "--prompt", "a", "--messages", "b"], "both given; remove one"),
        (["--chat", "--messages", "gone"], "--messages gone: there is no such file"),
    ],
)
def test_contradicting_options_are_refused(
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert generate(monkeypatch, "--checkpoint", str(checkpoint), *arguments) == 2
    assert message in capsys.readouterr().err
