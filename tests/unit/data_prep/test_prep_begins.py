# covers: data_prep/encoder.py data_prep/options.py
"""Documents and examples begin with the tokenizer's prefix, unless --bos or --no-bos is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.encode import tokenize
from data_prep.options import TokenizeOptions
from megalite.errors import UserError
from megalite.formats.shards import open_shards
from megalite.formats.verify import verify_folder
from megalite.tokenizers.tokenizer import load_tokenizer
from tests.helpers.rows import make_examples, open_examples, write_jsonl
from tests.helpers.tokenizers import END, START, json_folder

BOS, EOS = 256, 257


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl("texts.jsonl", [{"text": "ab"}, {"text": "c"}])


def documents(tokenizer: str, name: str, **options: Any) -> list[list[int]]:
    tokenize(TokenizeOptions(["texts.jsonl"], tokenizer, Path(name), **options))
    assert verify_folder(Path(name)) == []
    shards = open_shards(name)
    return [np.asarray(shards.document(n)).tolist() for n in range(shards.documents)]


def ids(text: str) -> list[int]:
    return load_tokenizer("plain").encode(text)


@pytest.fixture(autouse=True)
def folders(place: None) -> None:
    json_folder(Path("plain"))
    json_folder(Path("begins"), around="<s> $A")
    json_folder(Path("several"), around=f"{START} <s> $A {END}")


@pytest.mark.parametrize(
    ("tokenizer", "bos", "before"),
    [
        ("plain", None, []),
        ("plain", True, [BOS]),
        ("begins", None, [BOS]),
        ("begins", True, [BOS]),
        ("begins", False, []),
        ("several", None, [258, BOS]),
        ("several", False, []),
    ],
)
def test_documents_begin_by_the_tokenizer_or_the_option(
    tokenizer: str, bos: bool | None, before: list[int]
) -> None:
    ids_of_documents = documents(tokenizer, "out", bos=bos)
    assert ids_of_documents == [[*before, *ids(text), EOS] for text in ("ab", "c")]
    # Prompts begin like the documents, also with a saved or exported copy of the tokenizer.
    saved = load_tokenizer("out/tokenizer")
    assert list(saved.prefix_ids) == before
    assert documents("out/tokenizer", "again") == ids_of_documents
    Path("exported").mkdir()
    saved.export(Path("exported"))
    assert load_tokenizer("exported").prefix_ids == saved.prefix_ids


@pytest.mark.parametrize("bos", [None, True, False])
def test_byte_tokenizer_has_no_prefix_unless_bos_is_set(bos: bool | None) -> None:
    ids_of_documents = documents("bytes", "out", bos=bos)
    before = [BOS] if bos else []
    assert ids_of_documents == [[*before, *text.encode(), EOS] for text in ("ab", "c")]
    assert list(load_tokenizer("out/tokenizer").prefix_ids) == before


def test_tokenizer_without_bos_is_refused_only_if_bos_is_set() -> None:
    json_folder(Path("none"), {"tokenizer_config.json": {"bos_token": None, "eos_token": "</s>"}})
    with pytest.raises(UserError, match="has no BOS token; use another, or omit --bos"):
        documents("none", "out", bos=True)
    assert documents("none", "out", bos=None)[1] == [*ids("c"), EOS]


@pytest.mark.parametrize(("tokenizer", "before"), [("plain", []), ("begins", [BOS])])
def test_examples_begin_with_the_tokenizers_prefix(tokenizer: str, before: list[int]) -> None:
    write_jsonl("a.jsonl", [{"text": "ab", "label": n % 2, "target": "xy"} for n in range(4)])
    split = open_examples(make_examples("a.jsonl", tokenizer=tokenizer))[1]["train"]
    assert split.ids(0).tolist() == [*before, *ids("ab"), EOS]
    model = {"architecture": "encoder"}
    split = open_examples(make_examples("a.jsonl", tokenizer=tokenizer, model=model))[1]["train"]
    assert split.ids(0).tolist() == [BOS, *ids("ab"), EOS]
    split = open_examples(make_examples("a.jsonl", "language_modeling", tokenizer=tokenizer))[1][
        "train"
    ]
    assert split.ids(0).tolist() == [*before, *ids("ab"), EOS]
    assert split.loss_mask(0).tolist() == [False] * len(before) + [True] * 3
    split = open_examples(make_examples("a.jsonl", "seq2seq", tokenizer=tokenizer))[1]["train"]
    assert split.ids(0).tolist() == [*before, *ids("ab"), EOS, *ids("xy"), EOS]


def test_examples_are_made_again_if_a_settings_file_changes() -> None:
    write_jsonl("a.jsonl", [{"text": "ab"}] * 3)
    first = make_examples("a.jsonl", "language_modeling", tokenizer="plain")
    assert make_examples("a.jsonl", "language_modeling", tokenizer="plain") == first
    Path("plain/generation_config.json").write_text('{"eos_token_id": [257, 259]}')
    again = make_examples("a.jsonl", "language_modeling", tokenizer="plain")
    assert again != first
    assert load_tokenizer(again / "tokenizer").end_ids == (EOS, 259)
