# covers: data_prep/messages.py data_prep/turns.py
"""Forms of conversations in data sets: text parts, ShareGPT, weights, tool calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.chat import CHATML, Chat
from data_prep.messages import check_messages, check_tools
from data_prep.records import Unusable
from megalite.errors import DataError
from megalite.tokenizers.tokenizer import ByteTokenizer
from tests.helpers.rows import decode_texts, make_examples, open_examples, write_jsonl
from tests.unit.data_prep.test_data_prep_chat import MARKED, PLAIN

USER, ANSWER = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}
CALL = {"type": "function", "function": {"name": "rain", "arguments": '{"city": "Lima"}'}}
# Each refuses some conversations, or beginnings of them, as real templates do.
FIRST_IS_READ = (
    "{% if messages[0]['role'] == 'system' %}[{{ messages[0]['content'] }}]{% endif %}"
    "{% for m in messages %}{% if m.role != 'system' %}<{{ m.role }}>{{ m.content }}"
    "</{{ m.role }}>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
WANTS_USER = (
    "{% if not messages | selectattr('role', 'equalto', 'user') | list %}"
    "{{ raise_exception('No user query found') }}{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{{ m.content | trim }}</{{ m.role }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SEPARATED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if not loop.last %}|{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}|assistant: {% endif %}"
)


# Omits the reasoning of earlier turns and writes an empty one for the last, as reasoning models do.
THINKS = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>\n{% if m.role == 'assistant' %}"
    "{% set parts = (m.content or '').split('</think>') %}"
    "{% if loop.last %}<think>{{ parts[0] if parts | length > 1 }}</think>{% endif %}"
    "{{ parts[-1] | trim }}{% for c in m.tool_calls %}call {{ c.function.name }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}</{{ m.role }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


def turns(*pairs: str) -> list[dict[str, Any]]:
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[text[0]], "content": text[1:]} for text in pairs]


def learned(template: str, messages: list[dict[str, Any]]) -> list[str]:
    text, spans = Chat(template, ByteTokenizer()).render(messages)
    return [text[start:stop] for start, stop in spans]


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (FIRST_IS_READ, "</assistant>"),
        (WANTS_USER, "</assistant>\n"),
        (SEPARATED, ""),
        (PLAIN, "<|im_end|>\n"),
        (CHATML, "<|im_end|>"),
    ],
)
@pytest.mark.parametrize(
    "messages", [turns("ahow?", "uq", "aans"), turns("sbe", "ahow?", "uq", "aans", "aans")]
)
def test_opening_of_an_assistant_is_a_target(
    template: str, end: str, messages: list[dict[str, Any]]
) -> None:
    answers = [m["content"] + end for m in messages if m["role"] == "assistant"]
    assert learned(template, messages) == answers


def test_opening_that_the_template_refuses_is_reported() -> None:
    with pytest.raises(Unusable, match="refuses it: No user query found"):
        learned(WANTS_USER, turns("ssys", "aopening"))


def test_opening_with_spaces_is_rendered_by_the_template() -> None:
    assert learned(WANTS_USER, turns("a  how? ", "uq")) == ["how?</assistant>\n"]
    assert learned(FIRST_IS_READ, turns("a  how? ", "uq")) == ["  how? </assistant>"]


def test_turns_that_change_when_others_follow_are_located() -> None:
    messages = turns(
        "uq", "ar1</think> one</assistant>?", "u</assistant>\n<assistant>\n", "ar2</think>two"
    )
    assert learned(THINKS, messages) == [
        "one</assistant>?</assistant>\n",
        "<think>r2</think>two</assistant>\n",
    ]
    call = {"role": "assistant", "tool_calls": [CALL]}
    messages = [USER, call, {"role": "tool", "content": "5"}, ANSWER]
    assert learned(THINKS, check_messages(messages)) == [
        "call rain</assistant>\n",
        "<think></think>hi</assistant>\n",
    ]
    bare = THINKS.replace("<assistant>\n{% endif %}", "{% endif %}")
    with pytest.raises(DataError, match=r"put \{% generation %\}"):
        learned(bare, turns("uq", "ar1</think>one", "uq", "ar2</think>two"))


@pytest.mark.parametrize("key", ["weight", "train", "training", "trainable", "loss", "learn"])
@pytest.mark.parametrize("template", [CHATML, FIRST_IS_READ])
def test_turns_of_weight_zero_are_no_targets(key: str, template: str) -> None:
    messages = turns("uq", "abad", "uagain", "agood", "uq", "abad")
    for number, value in ((1, 0), (3, 1), (5, False)):
        messages[number][key] = value
    assert [text[:4] for text in learned(template, check_messages(messages))] == ["good"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": 0.5}, "message 1 has weight 0.5: a turn is learned or not; write 1 or 0"),
        ({"loss": "no"}, "loss 'no'"),
        ({"weight": 1, "train": False}, "both to be learned and not"),
        ({"weight": 0}, "every assistant's turn has weight 0"),
        ({"role": "user", "train": True}, "its role is 'user'; only an assistant's turns"),
        ({"content": [{"type": "image_url", "image_url": "x"}]}, "part 0 .* type 'image_url'"),
        ({"content": [{"type": "text", "text": None}]}, "part 0 of the content of message 1"),
        ({"content": []}, "content of message 1 is empty"),
        ({"tool_calls": "f()"}, "tool_calls of message 1 are 'f\\(\\)', not a list"),
        ({"tool_calls": ["f"]}, "a call .* is 'f', not an object"),
    ],
)
def test_turns_that_cannot_be_targets_are_reported(change: dict[str, Any], message: str) -> None:
    with pytest.raises(Unusable, match=message):
        check_messages([USER, ANSWER | change])


def test_messages_may_have_text_parts_or_the_form_of_sharegpt() -> None:
    parts = [{"type": "text", "text": "a "}, "b", {"type": "input_text", "text": "c"}]
    assert check_messages([USER | {"content": parts}, ANSWER])[0]["content"] == "a bc"
    messages = check_messages(
        [
            {"from": "system", "value": "be"},
            {"from": "human", "value": "hello"},
            {"from": "gpt", "value": "hi", "weight": 0},
            {"from": "observation", "value": "x"},
            {"from": "GPT", "value": "hi"},
        ]
    )
    roles = ["system", "user", "assistant", "tool", "assistant"]
    assert [message["role"] for message in messages] == roles
    assert [message["content"] for message in messages] == ["be", "hello", "hi", "x", "hi"]
    assert [message.get("weight", 1) for message in messages] == [1, 1, 0, 1, 1]
    assert check_messages(json.dumps([USER, ANSWER])) == [USER, ANSWER]
    with pytest.raises(Unusable, match="text that is not JSON"):
        check_messages("[{")


def test_tool_calls_without_content_are_targets() -> None:
    calls = [CALL, {"name": "sun", "arguments": {}}]
    messages = check_messages(
        [USER, {"role": "assistant", "content": None, "tool_calls": calls}, USER]
    )
    assert learned(CHATML, messages) == [
        '<tool_call>\n{"name": "rain", "arguments": {"city": "Lima"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "sun", "arguments": {}}\n</tool_call><|im_end|>'
    ]
    with pytest.raises(
        Unusable, match="message 1 has tool_calls, which the chat template does not"
    ):
        learned(PLAIN, messages)
    content = "{{ m.content + '' if m.content is not none else m.tool_calls | tojson }}"
    needs_null = f"{{% for m in messages %}}{content}{{% endfor %}}"
    assert "rain" in Chat(needs_null, ByteTokenizer()).render(messages)[0]
    needs_text = "{% for m in messages %}{{ m.content + '' }}{{ m.tool_calls }}{% endfor %}"
    assert "rain" in Chat(needs_text, ByteTokenizer()).render(messages)[0]


def test_tools_of_a_row_reach_the_template(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    tools = [{"name": "rain", "description": "é"}]
    template = tmp_path / "t.jinja"
    template.write_text("{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML)
    rendered = []
    for number, value in enumerate((tools, json.dumps(tools))):
        write_jsonl(f"{number}.jsonl", [{"messages": [USER, ANSWER], "tools": value}])
        split = open_examples(
            make_examples(
                f"{number}.jsonl", "sft", chat_template=template.read_text(), max_length=256
            )
        )[1]
        rendered.append(decode_texts(split["train"])[0])
    assert rendered[0] == rendered[1]
    assert rendered[0].startswith('[{"name": "rain", "description": "é"}]<|im_start|>')
    pq.write_table(
        pa.table({"messages": [json.dumps([USER, ANSWER])], "tools": [None]}), "a.parquet"
    )
    assert decode_texts(open_examples(make_examples("a.parquet", "sft"))[1]["train"])[0].startswith(
        "<|im_start|>user"
    )
    with pytest.raises(DataError, match="it has tools, which the chat template does not write"):
        make_examples("0.jsonl", "sft")
    with pytest.raises(Unusable, match="field 'tools' is 5, not a list"):
        check_tools(5)


def test_keys_that_the_template_does_not_read_are_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    row = {"messages": [USER | {"name": "eve"}, ANSWER | {"score": 3}]}
    write_jsonl("a.jsonl", [row, row])
    make_examples("a.jsonl", "sft")
    for key in ("name", "score"):
        line = f"train: the chat template does not read '{key}' of messages (rows: 2)"
        assert line in caplog.text
    reads = MARKED.replace("{{ m.role }}]", "{{ m.role }}{{ m.name }}]")
    caplog.clear()
    make_examples("a.jsonl", "sft", chat_template=reads)
    assert "'name'" not in caplog.text


def test_row_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    row = {"messages": json.dumps([USER, ANSWER]), "weight": 1.0}
    pq.write_table(pa.Table.from_pylist([row, row]), "a.parquet")
    assert len(open_examples(make_examples("a.parquet", "sft"))[1]["train"]) == 2
    pq.write_table(pa.Table.from_pylist([row, row | {"weight": 0.5}]), "b.parquet")
    with pytest.raises(DataError, match=r"field 'weight' is 0.5, and rows are not weighted"):
        make_examples("b.parquet", "sft")


def test_system_field_of_a_row_is_its_first_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    row = {
        "messages": json.dumps([USER, ANSWER]),
        "system": "be brief",
        "prompt": "q",
        "response": "a",
    }
    pq.write_table(pa.Table.from_pylist([row, row | {"system": None}]), "a.parquet")
    for columns in ({}, {"prompt_column": "prompt", "response_column": "response"}):
        first, second = decode_texts(
            open_examples(make_examples("a.parquet", "sft", max_length=256, **columns))[1]["train"]
        )
        assert (
            first
            == "<|im_start|>system\nbe brief<|im_end|>\n" + first[first.index("<|im_start|>u") :]
        )
        assert second.startswith("<|im_start|>user")
    messages = [{"role": "system", "content": "x"}, USER, ANSWER]
    write_jsonl("a.jsonl", [{"messages": messages, "system": "y"}])
    with pytest.raises(DataError, match="the field 'system' and begins with a system turn; remove"):
        make_examples("a.jsonl", "sft")


def test_sharegpt_row_is_reported_with_the_column_to_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    row = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    write_jsonl("a.jsonl", [row])
    pq.write_table(pa.Table.from_pylist([row]), "a.parquet")
    for path in ("a.jsonl", "a.parquet"):
        with pytest.raises(DataError, match=r"name it by finetune\.data\.messages_column"):
            make_examples(path, "sft")
        split = open_examples(make_examples(path, "sft", messages_column="conversations"))[1][
            "train"
        ]
        assert decode_texts(split)[0].endswith("<|im_start|>assistant\na<|im_end|>\n")
