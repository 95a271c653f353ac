# covers: data_prep/cache.py data_prep/eval_examples.py
"""A run's copy of its tokenizer finds the examples that were made with the original."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_prep import examples
from data_prep.eval_examples import prepare_again
from megalite.errors import DataError
from megalite.tokenizers.tokenizer import copy_generation_config, tokenizer_files
from tests.helpers.models import run_config
from tests.helpers.rows import ROWS, decode_texts, make_examples, open_examples, write_jsonl
from tests.helpers.tokenizers import NAMES, json_folder

TEMPLATE = (
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\r\n{% endfor %}"
)
GENERATION: dict[str, Any] = {"temperature": 0.7, "eos_token_id": [259, 257], "top_k": 3}
TURN = {"messages": [{"role": "assistant", "content": "x"}]}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def start_folder(name: str = "start", **generation: Any) -> Path:
    return json_folder(
        Path(name),
        {
            "config.json": {"model_type": "llama", "eos_token_id": 258, "pad_token_id": 0},
            "tokenizer_config.json": NAMES | {"chat_template": TEMPLATE},
            "generation_config.json": GENERATION | generation,
        },
    )


def run_copy(examples_folder: Path, start: Path) -> Path:
    """Write a run's tokenizer/: a copy of the examples' one, with the start's end ids."""
    folder = Path("run") / "tokenizer"
    folder.mkdir(parents=True)
    for path in tokenizer_files(examples_folder / "tokenizer"):
        shutil.copyfile(path, folder / path.name)
    copy_generation_config(folder, start)
    return folder


@pytest.mark.parametrize(("task", "row"), [("sft", TURN), ("language_modeling", {"text": "x"})])
def test_cache_is_used_by_a_resume(
    task: str, row: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl("a.jsonl", [row])
    first = make_examples("a.jsonl", task, tokenizer=start_folder())
    copy = run_copy(first, Path("start"))
    (copy / "generation_config.json").write_text(
        json.dumps(json.loads((copy / "generation_config.json").read_text()), sort_keys=True)
    )
    monkeypatch.setattr(examples, "ExampleMaker", None)  # must not be called again
    assert make_examples("a.jsonl", task, tokenizer=copy) == first


def test_cache_is_used_by_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl("a.jsonl", [TURN])
    Path("own.jinja").write_text("{% generation %}{{ messages[0].content }}{% endgeneration %}")
    given = {"tokenizer": str(start_folder()), "chat_template": "own.jinja"}
    section = {"path": "a.jsonl", "max_length": 64} | given
    config = run_config(finetune={"task": "sft", "data": section})
    first = examples.prepare(config, tokenizer=None)
    copy = run_copy(first, Path("start"))
    monkeypatch.setattr(examples, "ExampleMaker", None)
    assert prepare_again(config, copy, None, True, lambda value: [value])[0] == first


@pytest.mark.parametrize(
    ("name", "content", "advice"),
    [
        ("b.csv", "prompt,answer\na,b\n", "rename one: the columns are those"),
        ("b.jsonl", json.dumps({"conversation": TURN["messages"]}), "meant, rename it"),
    ],
)
def test_evaluation_on_other_columns_gives_advice(name: str, content: str, advice: str) -> None:
    write_jsonl("a.jsonl", [TURN])
    Path(name).write_text(content)
    section = {"path": "a.jsonl", "max_length": 64, "tokenizer": str(start_folder())}
    config = run_config(finetune={"task": "sft", "data": section})
    with pytest.raises(DataError) as caught:
        prepare_again(config, Path("start"), name, True, lambda value: [value])
    assert advice in str(caught.value)
    assert "finetune." not in str(caught.value)


def test_cache_is_found_by_a_trained_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl("a.jsonl", [{"text": f"hello world {n}", "label": n % 2} for n in range(30)])
    model = {"vocab_size": 285}
    first = make_examples("a.jsonl", tokenizer=None, model=model)
    copy = run_copy(first, Path("none"))
    with monkeypatch.context() as patch:
        patch.setattr(examples, "ExampleMaker", None)
        assert make_examples("a.jsonl", tokenizer=copy, model=model) == first
        assert make_examples("a.jsonl", tokenizer=None, model=model) == first
    ids = open_examples(first)[1]["train"].tokens.tolist()
    shutil.rmtree(first)  # the link to it stays
    assert make_examples("a.jsonl", tokenizer=copy, model=model) == first
    assert open_examples(first)[1]["train"].tokens.tolist() == ids


def test_cache_depends_on_the_content_of_tokenizer_files() -> None:
    write_jsonl("a.jsonl", ROWS)
    folders = [
        make_examples("a.jsonl", tokenizer=start_folder()),
        make_examples("a.jsonl", tokenizer=start_folder("ends", eos_token_id=257)),
    ]
    (Path("start") / "tokenizer_config.json").write_text(json.dumps(NAMES | {"eos_token": "<s>"}))
    folders.append(make_examples("a.jsonl", tokenizer="start"))
    assert len(set(folders)) == 3
    assert len({tuple(decode_texts(open_examples(folder)[1]["train"])) for folder in folders}) == 1
