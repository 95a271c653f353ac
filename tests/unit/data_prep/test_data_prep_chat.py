# covers: data_prep/chat.py data_prep/template.py data_prep/sentinels.py
from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data_prep.chat import CHATML, TEMPLATE, Chat, ask, check_messages, find_template
from data_prep.records import Unusable
from data_prep.train import train_sentencepiece
from megalite.errors import DataError
from megalite.evaluate import Sampling, stream_texts
from megalite.tokenizers.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

CONTROLS = ["<|im_start|>", "<|im_end|>", "<s>", "</s>"]
WORDS = ["hello", "world", " 12", "中文", "😀", "naïve", "\n", "\n\n", "  ", "<b>", "it's"]
MARKED = """\
{{ bos_token }}{% for m in messages %}
    {% if loop.index0 > 40 %}{% break %}{% endif %}
    {% if m.role == 'assistant' %}
[{{ m.role }}]
{% generation %}
{{ m.content | trim }}{{ eos_token }}
{% endgeneration %}
    {% else %}
[{{ m.role }}] {{ m.content | tojson }}{{ strftime_now('%Y') }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}[assistant]
{% endif %}"""
PLAIN = """\
{%- for m in messages -%}
<|im_start|>{{ m['role'] }}
{{ m['content'] }}{% if m.reasoning_content %}({{ m.thinking }}){% endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture(scope="module", params=["bytes of BPE", "words"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    backend: Any
    trainer: Any
    if request.param == "words":
        backend = tokenizers.Tokenizer(models.WordLevel(unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(special_tokens=["[UNK]", *CONTROLS])
    else:
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=330, special_tokens=CONTROLS, initial_alphabet=alphabet
        )
    backend.train_from_iterator(["assistant user \n\nhello world 12"] * 9, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def conversations() -> list[list[dict[str, Any]]]:
    draw, drawn = random.Random(3), []
    for _ in range(20):
        turns: list[dict[str, Any]] = [{"role": "system", "content": "be brief", "name": None}]
        for _ in range(draw.randint(1, 4)):
            for role in ("user", "assistant"):
                text = "".join(draw.choices(WORDS, k=draw.randint(0, 6))) + role[0]
                turns.append({"role": role, "content": text})
        turns[-1]["thinking"] = "why"
        drawn.append(turns[draw.randint(0, 1) :])
    return drawn


@pytest.mark.parametrize("template", [MARKED, CHATML])
def test_chat_gives_the_ids_and_mask_of_transformers(template: str, folder: Path) -> None:
    chat = Chat(template, load_tokenizer(folder))
    oracle = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    for turns in conversations():
        ids, learned = chat.encode(check_messages(turns))
        expected = oracle.apply_chat_template(turns, chat_template=template, **options)
        assert ids == expected["input_ids"]
        assert learned == list(map(bool, expected["assistant_masks"]))
        assert 0 < sum(learned) < len(learned)


def test_chat_gives_the_ids_of_transformers_without_generation_tags(folder: Path) -> None:
    chat = Chat(PLAIN, load_tokenizer(folder))
    oracle = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    for turns in conversations():
        ids, learned = chat.encode(check_messages(turns))
        expected = oracle.apply_chat_template(
            turns, chat_template=PLAIN, tokenize=True, return_dict=True
        )
        assert ids == expected["input_ids"]
        assert sum(learned) >= sum(turn["role"] == "assistant" for turn in turns)


TURNS = [
    {"role": "user", "content": "a<b"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
    {"role": "assistant", "content": "é"},
]


def test_chatml_makes_the_end_of_a_turn_a_target() -> None:
    text, spans = Chat(CHATML, ByteTokenizer()).render(TURNS)
    assert text == (
        "<|im_start|>user\na<b<|im_end|>\n<|im_start|>assistant\nc<|im_end|>\n"
        "<|im_start|>user\nd<|im_end|>\n<|im_start|>assistant\né<|im_end|>\n"
    )
    assert [text[a:b] for a, b in spans] == ["c<|im_end|>", "é<|im_end|>"]


def test_turns_without_generation_tags_are_located_by_prefixes() -> None:
    text, spans = Chat(PLAIN, ByteTokenizer()).render(TURNS)
    assert [text[a:b] for a, b in spans] == ["c<|im_end|>\n", "é<|im_end|>\n"]
    drops = PLAIN.replace("messages -%}", "messages if m.role == 'user' or m == messages[-1] -%}")
    with pytest.raises(DataError, match=r"put \{% generation %\}"):
        Chat(drops, ByteTokenizer()).render(TURNS)


def test_template_that_refuses_or_is_invalid_is_reported() -> None:
    refusing = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(Unusable, match="refuses it: roles must alternate"):
        Chat(refusing, ByteTokenizer()).encode(TURNS)
    with pytest.raises(Unusable, match="unsafe"):
        Chat("{{ messages.append(1) }}", ByteTokenizer()).encode(TURNS)
    with pytest.raises(DataError, match="no Jinja that can be read"):
        Chat("{% for %}", ByteTokenizer())


def test_find_template_searches_in_the_documented_order(tmp_path: Path) -> None:
    file = tmp_path / "own"
    file.write_text("own")
    assert find_template(None, None, None) == find_template(None, None, tmp_path) == CHATML
    config = tmp_path / "tokenizer_config.json"
    config.write_text("{}")
    assert find_template(None, None, tmp_path) == CHATML
    config.write_text('{"chat_template": [{"name": "default", "template": "listed"}]}')
    assert find_template(None, None, tmp_path) == "listed"
    config.write_text('{"chat_template": "configured"}')
    assert find_template(None, None, tmp_path / "tokenizer.json") == "configured"
    (tmp_path / TEMPLATE).write_text("beside")
    assert find_template(None, None, str(tmp_path)) == "beside"
    assert find_template(None, None, "bytes") == CHATML
    assert find_template(None, "given", tmp_path) == "given"
    assert find_template(str(file), "given", tmp_path) == "own"
    with pytest.raises(DataError, match="cannot read gone"):
        find_template("gone", None, None)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "not a list"),
        ([], "not a list"),
        (["x"], "message 0 is 'x', not an object"),
        ([{"from": "narrator", "value": "x"}], "from 'narrator', not one of human, user"),
        (
            [{"role": "user", "content": "x"}],
            "no turn has the role 'assistant'; its",
        ),
        ([{"role": "user"}, TURNS[1]], "content of message 0 is None"),
        ([{"role": "assistant", "content": " \n"}], "content of message 0 is empty"),
        ([{"role": "user", "content": "a\0"}, TURNS[1]], "NUL at character 1"),
    ],
)
def test_check_messages_refuses_malformed_conversations(value: Any, message: str) -> None:
    with pytest.raises(Unusable, match=message):
        check_messages(value)


def test_tool_call_needs_no_content() -> None:
    turn = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    assert check_messages([turn]) == [{"role": "assistant", "tool_calls": [{"name": "f"}]}]


TEXT = "<s>hello 中文😀</s> wörld<|im_end|>\n"


def learned() -> Tokenizer:
    return train_sentencepiece(["hello world, hello there"] * 20, 290)


@pytest.mark.parametrize("make", [learned, ByteTokenizer])
def test_offsets_cover_the_text(make: Any) -> None:
    tokenizer: Tokenizer = make()
    ids, places = tokenizer.encode_with_offsets(TEXT)
    assert sorted({n for start, stop in places for n in range(start, stop)}) == list(
        range(len(TEXT))
    )
    assert sum(TEXT[slice(*place)] == "😀" for place in places) == 4
    assert places == sorted(places)
    for text in ("中文😀 é", "hello  12"):
        assert tokenizer.encode_with_offsets(text)[0] == tokenizer.encode(text)
    controls = [id for id in ids if id in (tokenizer.bos_id, tokenizer.eos_id)]
    assert len(controls) == (0 if make is ByteTokenizer else 2)
    assert tokenizer.encode(TEXT).count(1) == 0 or make is ByteTokenizer


def test_offsets_of_a_hugging_face_tokenizer_name_control_tokens(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    ids, places = tokenizer.encode_with_offsets(TEXT)
    names = [tokenizer.pieces()[id] for id in ids]
    for name in ("<s>", "</s>", "<|im_end|>"):
        start, stop = places[names.index(name)]
        assert TEXT[start:stop] == name
    assert tokenizer.bos_id not in tokenizer.encode(TEXT)


def test_ask_returns_the_prompt_and_the_end_of_an_answer() -> None:
    prompt, end = Chat(CHATML, ByteTokenizer()).ask("What?\n")
    assert (
        ByteTokenizer().decode(prompt)
        == "<|im_start|>user\nWhat?\n<|im_end|>\n<|im_start|>assistant\n"
    )
    assert end == "<|im_end|>"
    with pytest.raises(DataError, match="the chat template refuses it: two turns"):
        Chat("{{ raise_exception('two turns') }}", ByteTokenizer()).ask("What?")


def test_ask_uses_control_tokens_of_the_template(folder: Path) -> None:
    """Names in the template become tokens, as in training, and their ids end the answer."""
    tokenizer = load_tokenizer(folder)
    prompt, end = ask(folder, tokenizer, "hello")
    assert end == "<|im_end|>"
    answer = tokenizer.encode_with_offsets("world<|im_end|>\n<|im_start|>user")[0]
    read: list[list[int]] = []

    def logits(ids: torch.Tensor) -> torch.Tensor:
        read.append(ids[0].tolist())
        scores = torch.zeros(1, tokenizer.vocab_size)
        scores[0, answer[len(read) - 1]] = 1
        return scores

    pieces = stream_texts(
        logits,
        tokenizer,
        [prompt],
        max_new_tokens=len(answer),
        sampling=Sampling(temperature=0),
        stop=[end],
        controls=True,
    )
    assert "".join(piece for _, piece in pieces).strip() == "world"
    turn = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
    learned, marks = Chat(CHATML, tokenizer).encode(turn)
    assert read[0] == learned[: marks.index(True)]
