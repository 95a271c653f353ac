# covers: megalite/evaluate/conversation.py data_prep/conversations.py
"""Conversations with a chat model: history, the window, and lines of input."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from data_prep.chat import CHATML, Chat
from data_prep.conversations import Conversation, read_questions, replace_system
from megalite.errors import CommandError, DataError
from megalite.evaluate import Answerer, Sampling, json_lines, read_turns
from megalite.tokenizers.tokenizer import ByteTokenizer
from tests.helpers.rows import write_jsonl

TEMPLATE = CHATML.replace(
    "{% for m", "{% if messages[0].role != 'system' %}DEFAULT{% endif %}{% for m", 1
)


class Echo:
    """A decoder that answers each prompt with the number of its user turns."""

    continues = True
    suffix_ids: Sequence[int] = ()

    def __init__(self) -> None:
        self.read: list[str] = []

    def begin(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Tensor:
        del new_tokens
        texts = [ByteTokenizer().decode(prompt) for prompt in prompts]
        self.read += texts
        self._answers = [str(text.count(">user")).encode() for text in texts]
        self._step = 0
        return self._scores()

    def next(self, tokens: Sequence[int]) -> Tensor:
        del tokens
        self._step += 1
        return self._scores()

    def _scores(self) -> Tensor:
        scores = torch.zeros(len(self._answers), 258)
        for row, answer in zip(scores, self._answers, strict=True):
            row[answer[self._step] if self._step < len(answer) else 257] = 1
        return scores


def answerer(reader: Echo, window: int = 1000) -> Answerer:
    chat = Chat(TEMPLATE, ByteTokenizer())
    options: dict[str, Any] = {"max_new_tokens": 4, "sampling": Sampling(temperature=0)}
    return Answerer(reader, ByteTokenizer(), chat.ask, window=window, **options)


def talk(reader: Echo, turns: list[str], system: str | None = None, **options: Any) -> list[str]:
    answers = answerer(reader, **options).talk(turns, replace_system([], system))
    return ["".join(answer) for _, answer in answers]


def test_talk_reads_the_earlier_turns() -> None:
    reader = Echo()
    assert talk(reader, ["a", "b", "c"]) == ["1", "2", "3"]
    assert reader.read[0].startswith("DEFAULT<|im_start|>user\na<|im_end|>")
    assert reader.read[2].endswith(
        "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    )


def test_system_turn_replaces_the_default_of_the_template() -> None:
    reader = Echo()
    assert talk(reader, ["a", "b"], system="be brief") == ["1", "2"]
    assert all(text.startswith("<|im_start|>system\nbe brief<|im_end|>\n") for text in reader.read)


def test_talk_drops_the_oldest_turns_if_the_window_is_full(
    caplog: pytest.LogCaptureFixture,
) -> None:
    reader = Echo()
    turns = [f"turn {n}" for n in range(6)]
    assert talk(reader, turns, system="S", window=210) == ["1", "2", "2", "2", "2", "2"]
    assert all(text.startswith("<|im_start|>system\nS<|im_end|>") for text in reader.read)
    assert all(len(text) + 4 <= 210 for text in reader.read)
    assert "window of 210 tokens: its 2 oldest turns are no longer read" in caplog.text
    assert talk(Echo(), ["long " * 50], window=210) == ["1"]
    assert "the model reads the last 210" in caplog.text


def test_answers_come_in_the_order_of_many_questions(tmp_path: Any) -> None:
    def turn(role: str, text: str) -> dict[str, str]:
        return {"role": role, "content": text}

    talks = [
        [turn("user", "a"), turn("assistant", "b")] * n + [turn("user", "c")] for n in range(11)
    ]
    path = write_jsonl(str(tmp_path / "talks.jsonl"), [{"messages": talk} for talk in talks])
    questions = read_questions(path, None)
    written = [""] * len(talks)
    for number, piece in answerer(Echo()).answers(questions):
        written[number] += piece
    assert written == [str(n + 1) for n in range(11)]
    systems = read_questions(path, "S")
    assert [question.messages[0]["content"] for question in systems] == ["S"] * 11
    assert systems[0].messages[1:] == talks[0]
    with_system = [turn("system", "T"), turn("user", "a")]
    assert replace_system(with_system, "S") == [turn("system", "S"), turn("user", "a")]
    assert replace_system(with_system, None) == with_system


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "assistant", "content": "a"}]}, "last turn is the assistant's"),
        ({"messages": []}, r"line 1: \[\] is not a list of messages"),
        ({"prompt": "a"}, "line 1: no field 'messages'; it has prompt"),
        ("{", "line 1: not readable JSON"),
        ("", "has no conversation"),
    ],
)
def test_read_questions_refuses_invalid_rows_by_line(row: Any, message: str, tmp_path: Any) -> None:
    with pytest.raises(CommandError, match=message):
        read_questions(write_jsonl(str(tmp_path / "a.jsonl"), [row]), None)
    with pytest.raises(CommandError, match="there is no such file"):
        read_questions(str(tmp_path / "gone.jsonl"), None)


def test_json_lines_are_strict_and_in_order() -> None:
    pieces = [(1, "b\n"), (0, "a"), (1, "\u2028")]
    lines = list(json_lines(pieces, [{"prompt": "x"}, {"prompt": "y"}]))
    assert [json.loads(line) for line in lines] == [
        {"prompt": "x", "text": "a"},
        {"prompt": "y", "text": "b\n\u2028"},
    ]
    assert all(line.count("\n") == 1 for line in lines)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_read_turns_yields_the_lines_of_input() -> None:
    out = io.StringIO()
    turns = read_turns(io.StringIO("a\n\n b \nexit\n"), out, first=True, share=None)
    assert list(turns) == ["a", " b ", "exit"]
    assert out.getvalue() == ""
    assert list(read_turns(Terminal("a\n\nexit\nb\n"), out, first=True, share=None)) == ["a"]
    assert out.getvalue() == "> > > "
    assert list(read_turns(Terminal("a"), out, first=True, share=None)) == ["a"]
    with pytest.raises(DataError, match="standard input is not UTF-8"):
        list(read_turns(io.StringIO("a\udcff\n"), out, first=True, share=None))


def test_read_turns_yields_the_lines_of_rank_0_on_other_ranks() -> None:
    shared: list[Any] = []
    first = read_turns(
        io.StringIO("a\nb\n"), io.StringIO(), first=True, share=lambda x: shared.append(x) or x
    )
    assert list(first) == ["a", "b"]
    assert shared == ["a\n", "b\n", None]
    received = iter(shared)
    other = read_turns(io.StringIO(), io.StringIO(), first=False, share=lambda _: next(received))
    assert list(other) == ["a", "b"]


def test_question_that_the_template_refuses_is_an_error_with_its_line(tmp_path: Any) -> None:
    row = {"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "f"}]}
    questions = read_questions(write_jsonl(str(tmp_path / "a.jsonl"), [row]), None)
    with pytest.raises(DataError, match=r"--messages .*line 1: it has tools, which the chat temp"):
        list(answerer(Echo()).answers(questions))
    with pytest.raises(DataError, match=r"^it has tools"):
        list(answerer(Echo()).answers([Conversation(row["messages"], [{"name": "f"}])]))
