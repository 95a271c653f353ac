# covers: megalite/tokenizers/special_tokens.py
"""Tokenizer folders are read as by transformers: ids, vocabulary, prefix and end of a text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from megalite.errors import DataError
from megalite.tokenizers.tokenizer import Tokenizer, load_tokenizer
from tests.helpers.tokenizers import END, NAMES, START, json_folder
from tests.unit.tokenizers.test_tokenizer_export import trained

transformers = pytest.importorskip("transformers")

TEXTS = (
    "The quick brown fox",
    f"{START}user\nhi {END}\n{START}assistant\n",
    f"def read(path): {END}  {END}return",
    "大规模 naïve 😀",
    "",
)


def added(content: str, **flags: bool) -> dict[str, Any]:
    defaults = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": content, "special": True, **defaults, **flags}


def test_id_far_beyond_the_number_of_tokens_is_refused(tmp_path: Path) -> None:
    file = json_folder(tmp_path) / "tokenizer.json"
    raw = json.loads(file.read_text())
    raw["model"]["vocab"]["a"] = 2**31 - 1
    file.write_text(json.dumps(raw))
    with pytest.raises(DataError, match="gives the id 2147483647 to one of its 260 tokens"):
        load_tokenizer(tmp_path)


def sentencepiece_folder(folder: Path, files: Mapping[str, Any], **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"model_type": "bpe", "normalization_rule_name": "identity"} | options
    tokenizer = trained(**settings, remove_extra_whitespaces=False)
    tokenizer.save(folder)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def compare(folder: Path, ours: Tokenizer) -> bool:
    """Assert that transformers reads the folder as we do."""
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    if ours.pad_id is not None:
        assert ours.pad_id == theirs.pad_token_id
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode_with_offsets(text)[0] == ids, text
        around = [*ours.prefix_ids, *ids, *ours.suffix_ids]
        assert theirs(text).input_ids == around
        if START not in text:  # transformers 5 takes some additional_special_tokens for text
            assert ours.decode(around) == theirs.decode(around, skip_special_tokens=True)
        plain = ours.encode(text)
        assert ours.decode(plain) == text
        if START not in text and END not in text:
            assert plain == ids
    return True


LLAMA = {"tokenizer_class": "LlamaTokenizer", **NAMES}
CHATML = {
    "added_tokens.json": {START: 400, END: 401},
    "special_tokens_map.json": {
        "bos_token": "<s>",
        "eos_token": {**added(END)},
        "additional_special_tokens": [START, END],
    },
}
FOLDERS: dict[str, dict[str, Any]] = {
    "bos": {"tokenizer_config.json": LLAMA | {"add_bos_token": True}},
    "bos and eos": {
        "tokenizer_config.json": LLAMA | {"add_bos_token": True, "add_eos_token": True}
    },
    "neither": {"tokenizer_config.json": LLAMA | {"add_bos_token": False}},
    "legacy": {"tokenizer_config.json": LLAMA | {"add_bos_token": True, "legacy": True}, **CHATML},
    "added_tokens.json": {"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}, **CHATML},
    "no class": CHATML,
    "of another class": {"tokenizer_config.json": NAMES | {"add_bos_token": True}, **CHATML},
    "added_tokens_decoder": {
        "tokenizer_config.json": LLAMA
        | {
            "eos_token": END,
            "added_tokens_decoder": {
                "400": added(START, lstrip=True),
                "401": added(END, rstrip=True),
                "402": added("<think>", special=False),
            },
        }
    },
    "eos in no other file": {"tokenizer_config.json": LLAMA | {"eos_token": END}},
}


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("space", [True, False], ids=["space", "no space"])
def test_sentencepiece_folder_is_read_as_by_transformers(
    kind: str, space: bool, tmp_path: Path
) -> None:
    files = {"config.json": {"model_type": "llama", "vocab_size": 410}} | FOLDERS[kind]
    if not space and "Llama" in str(files.get("tokenizer_config.json")):
        files["tokenizer_config.json"] = files["tokenizer_config.json"] | {
            "add_prefix_space": False
        }
    folder = sentencepiece_folder(tmp_path / "hf", files, add_dummy_prefix=space)
    ours = load_tokenizer(folder)
    assert compare(folder, ours)
    check_copies(ours, tmp_path)


def check_copies(ours: Tokenizer, tmp_path: Path) -> None:
    """Assert that a saved copy and an export equal a tokenizer."""
    for name, write in (("saved", ours.save), ("exported", ours.export)):
        folder = tmp_path / name
        folder.mkdir()
        write(folder)
        again = load_tokenizer(folder)
        keys = ("vocab_size", "bos_id", "eos_id", "pad_id", "prefix_ids", "suffix_ids")
        assert {k: getattr(again, k) for k in keys} == {k: getattr(ours, k) for k in keys}
        for text in TEXTS:
            assert again.encode_with_offsets(text) == ours.encode_with_offsets(text), name
            assert again.encode(text) == ours.encode(text)
    assert compare(tmp_path / "exported", ours)


JSON_FOLDERS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "bos": ("<s> $A", {"tokenizer_config.json": NAMES}),
    "bos against the config": (
        "<s> $A",
        {"tokenizer_config.json": NAMES | {"add_bos_token": False}},
    ),
    "no bos against the config": (
        None,
        {"tokenizer_config.json": NAMES | {"add_bos_token": True}},
    ),
    "several before and after": (
        f"{START} <s> $A </s>",
        {"tokenizer_config.json": NAMES},
    ),
    "names only in the map": (
        "<s> $A",
        {
            "tokenizer_config.json": {"model_max_length": 64},
            "special_tokens_map.json": {"bos_token": "<s>", "eos_token": added(END)},
        },
    ),
    "the map against the config": (
        None,
        {
            "tokenizer_config.json": NAMES,
            "special_tokens_map.json": {"eos_token": END, "pad_token": START},
        },
    ),
    "added_tokens_decoder against the map": (
        None,
        {
            "tokenizer_config.json": NAMES | {"added_tokens_decoder": {}},
            "special_tokens_map.json": {"eos_token": END},
        },
    ),
    "added_tokens.json": (None, {"tokenizer_config.json": NAMES}),
}


@pytest.mark.parametrize("kind", JSON_FOLDERS)
def test_tokenizer_json_folder_is_read_as_by_transformers(kind: str, tmp_path: Path) -> None:
    around, files = JSON_FOLDERS[kind]
    folder = json_folder(tmp_path / "hf", files, around)
    if kind == "added_tokens.json":
        size = load_tokenizer(folder).vocab_size
        (folder / kind).write_text(json.dumps({"<tool>": size, "<think>": size + 1}))
    ours = load_tokenizer(folder)
    assert compare(folder, ours)
    check_copies(ours, tmp_path)


def test_pieces_of_a_model_are_renamed_by_id(tmp_path: Path) -> None:
    names = {"399": added(END), "398": added(START)}
    files = {
        "config.json": {"model_type": "mistral"},
        "tokenizer_config.json": {"added_tokens_decoder": names, "eos_token": END},
    }
    folder = sentencepiece_folder(tmp_path / "hf", files)
    ours = load_tokenizer(folder)
    size = ours.vocab_size
    assert size == 400
    assert (ours.eos_id, ours.pieces()[398:]) == (399, [START, END])
    assert compare(folder, ours)
    check_copies(ours, tmp_path)


def test_added_token_that_would_get_another_id_is_refused(tmp_path: Path) -> None:
    files = {"tokenizer_config.json": {"added_tokens_decoder": {"410": added(END)}}}
    folder = sentencepiece_folder(tmp_path / "hf", files)
    with pytest.raises(
        DataError, match=r"has the id 410, but after those of tokenizer\.model it would get 400"
    ):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", "[]", "not an object"),
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("tokenizer_config.json", "[" * 100_000, "not valid JSON"),
        ("tokenizer_config.json", '{"eos_token": 5}', "eos_token is 5"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "added_tokens_decoder"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "added_tokens_decoder"),
        ("special_tokens_map.json", '{"eos_token": ["</s>"]}', "eos_token is"),
        ("added_tokens.json", '{"<x>": "7"}', "'<x>' has the id '7'"),
        ("generation_config.json", '{"eos_token_id": "</s>"}', "eos_token_id is '</s>'"),
        ("generation_config.json", '{"eos_token_id": [1, [2]]}', "not an id or a list of ids"),
    ],
)
def test_damaged_settings_file_is_reported(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    for folder in (
        sentencepiece_folder(tmp_path / "model", {}),
        json_folder(tmp_path / "json", {}),
    ):
        (folder / name).write_text(content)
        with pytest.raises(DataError, match=message) as caught:
            load_tokenizer(folder)
        assert str(folder / name) in str(caught.value)


def test_end_ids_are_those_of_all_files(tmp_path: Path) -> None:
    folder = json_folder(tmp_path / "hf", {"tokenizer_config.json": NAMES})
    start, stop = (tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")),) * 2
    ids = [start.token_to_id("</s>"), stop.token_to_id(START), stop.token_to_id(END)]
    (folder / "config.json").write_text(json.dumps({"eos_token_id": ids[1], "pad_token_id": 3}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids[2:]}))
    ours = load_tokenizer(folder)
    assert ours.eos_id == ids[0]
    assert set(ours.end_ids) == set(ids)
    copy = tmp_path / "copy"
    copy.mkdir()
    ours.save(copy)
    assert load_tokenizer(copy).end_ids == ours.end_ids
    assert json.loads((copy / "generation_config.json").read_text())["pad_token_id"] == 3


@pytest.mark.parametrize("source", ["class", "model type"])
def test_t5_ends_a_text_with_eos_although_no_file_says_so(source: str, tmp_path: Path) -> None:
    config = {"tokenizer_class": "T5Tokenizer"} if source == "class" else {"eos_token": "</s>"}
    files = {"config.json": {"model_type": "t5"}, "tokenizer_config.json": config}
    folder = sentencepiece_folder(tmp_path / "hf", files, model_type="unigram")
    (folder / "tokenizer.model").rename(folder / "spiece.model")
    ours = load_tokenizer(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs("a").input_ids[-1] == ours.eos_id
    copy = tmp_path / "copy"
    copy.mkdir()
    ours.save(copy)  # without the config.json of the model
    for tokenizer in (ours, load_tokenizer(copy)):
        assert (tokenizer.prefix_ids, tokenizer.suffix_ids) == ((), (ours.eos_id,))


ENCODED = ("<s>hello</s>world", "hello world", " </s> two", *TEXTS)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "t5", None])
@pytest.mark.parametrize("kind", FOLDERS)
def test_copy_encodes_as_the_original_folder(
    kind: str, model_type: str | None, tmp_path: Path
) -> None:
    """A copy lacks the model's config.json, on which the prepend scheme depends."""
    model = {"config.json": {"model_type": model_type}} if model_type else {}
    folder = sentencepiece_folder(tmp_path / "hf", model | FOLDERS[kind])
    fresh = load_tokenizer(folder)
    for name in ("copy", "copy of the copy"):
        (tmp_path / name).mkdir()
        load_tokenizer(folder).save(tmp_path / name)
        folder = tmp_path / name
        copy = load_tokenizer(folder)
        assert type(copy) is type(fresh)
        assert (copy.prefix_ids, copy.suffix_ids) == (fresh.prefix_ids, fresh.suffix_ids)
        for text in ENCODED:
            assert copy.encode_with_offsets(text) == fresh.encode_with_offsets(text)
            assert copy.encode(text) == fresh.encode(text)
    first, second = (tmp_path / name for name in ("copy", "copy of the copy"))
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes()


def test_bad_value_of_the_saved_prepend_scheme_is_refused(tmp_path: Path) -> None:
    config = LLAMA | {"megalite_space_before_text": "sometimes"}
    folder = sentencepiece_folder(tmp_path / "hf", {"tokenizer_config.json": config})
    with pytest.raises(DataError, match="is 'sometimes', not null, always, first or never"):
        load_tokenizer(folder)
