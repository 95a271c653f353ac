# covers: megalite/tokenizers/legacy.py
"""Tokenizer folders of older formats are refused with a command that converts them."""

from __future__ import annotations

import base64
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import pre_tokenizers

from megalite.errors import DataError
from megalite.tokenizers.legacy import convert_marian
from megalite.tokenizers.tokenizer import load_tokenizer
from tests.unit.tokenizers.test_tokenizer_export import trained

transformers = pytest.importorskip("transformers")

TEXTS = ("The quick brown fox", "def read(path): 12", "大规模  naïve")


def gpt2(folder: Path) -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: n for n, name in enumerate([*alphabet, "Ġt", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nĠ t\n")
    return transformers.GPT2Tokenizer.from_pretrained(folder)


def bert(folder: Path) -> Any:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "quick", "fox", "def", "##s"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return transformers.BertTokenizer.from_pretrained(folder)


def bert_of_a_model(folder: Path) -> Any:
    bert(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    return transformers.AutoTokenizer.from_pretrained(folder)


def tekken(folder: Path) -> Any:
    names = [bytes([n]) for n in range(256)] + [b"he"]
    content = {
        "config": {
            "pattern": r"\p{L}+|\p{N}|\s+|[^\s\p{L}\p{N}]+",
            "num_vocab_tokens": 257,
            "default_vocab_size": 260,
            "default_num_special_tokens": 3,
            "version": "v3",
        },
        "vocab": [
            {"rank": n, "token_bytes": base64.b64encode(name).decode(), "token_str": None}
            for n, name in enumerate(names)
        ],
        "special_tokens": [
            {"rank": n, "token_str": name, "is_control": True}
            for n, name in enumerate(("<unk>", "<s>", "</s>"))
        ],
    }
    (folder / "tekken.json").write_text(json.dumps(content))
    return transformers.AutoTokenizer.from_pretrained(folder)


def xlm_roberta(folder: Path) -> Any:
    model = trained(model_type="unigram")
    model.save(folder)
    (folder / "tokenizer.model").rename(folder / "sentencepiece.bpe.model")
    return transformers.XLMRobertaTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("make", [gpt2, bert, bert_of_a_model, tekken, xlm_roberta])
def test_command_makes_a_tokenizer_json_with_the_ids_of_transformers(
    make: Any, tmp_path: Path
) -> None:
    theirs = make(tmp_path)
    with pytest.raises(DataError, match=r"make its tokenizer\.json") as caught:
        load_tokenizer(tmp_path)
    command = shlex.split(str(caught.value).splitlines()[-1])
    assert command[:2] == ["python", "-c"]
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True, timeout=120)
    ours = load_tokenizer(tmp_path)
    assert ours.vocab_size == len(theirs)
    for text in TEXTS:
        expected = theirs(text).input_ids
        assert [*ours.prefix_ids, *ours.encode(text), *ours.suffix_ids] == expected


def marian(folder: Path) -> Any:
    models = {
        "source": trained(model_type="unigram"),
        "target": trained(model_type="unigram", user_defined_symbols=["ziel", "wort"]),
    }
    names = ["</s>", "<unk>"]
    for name, model in models.items():
        model.save(folder)
        file = folder / "tokenizer.model"
        file.rename(folder / f"{name}.spm")
        processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / f"{name}.spm"))
        pieces = [processor.id_to_piece(n) for n in range(processor.get_piece_size())]
        names += [piece for piece in pieces if piece not in ("<s>", "</s>", "<unk>")]
    names = [*dict.fromkeys(names), ">>deu<<", "<pad>"]
    vocabulary = {name: n for n, name in enumerate(names)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "config.json").write_text(json.dumps({"model_type": "marian"}))
    return transformers.MarianTokenizer.from_pretrained(folder)


@pytest.mark.filterwarnings("ignore:Recommended")
def test_marian_conversion_joins_the_two_models(tmp_path: Path) -> None:
    theirs = marian(tmp_path)
    with pytest.raises(DataError, match=r"source.spm and target.spm") as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).endswith(f"convert_marian as c; c('{tmp_path}')\"")
    convert_marian(tmp_path)
    ours = load_tokenizer(tmp_path)
    assert (ours.vocab_size, ours.eos_id, ours.bos_id) == (len(theirs), 0, None)
    assert ours.pad_id == theirs.pad_token_id
    for text in (*TEXTS[:2], "fox fox  jumps"):
        expected = theirs(text).input_ids
        assert [*ours.prefix_ids, *ours.encode(text), *ours.suffix_ids] == expected
        answer = theirs(text_target=text).input_ids
        assert ours.decode(answer) == theirs.decode(answer, skip_special_tokens=True)
    coded, _ = ours.encode_with_offsets(">>deu<<")
    assert coded == theirs(">>deu<<").input_ids[:1]


def test_marian_conversion_refuses_other_folders(tmp_path: Path) -> None:
    for name in ("source.spm", "target.spm"):
        (tmp_path / name).write_bytes(b"nothing")
    for content in ("{}", "[]", '{"</s>": 0, "<unk>": 7}', "["):
        (tmp_path / "vocab.json").write_text(content)
        with pytest.raises(DataError):
            convert_marian(tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()


def test_tiktoken_files_are_refused(tmp_path: Path) -> None:
    lines = [f"{base64.b64encode(bytes([n])).decode()} {n}" for n in range(256)]
    for name in ("qwen.tiktoken", "tokenizer.model"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("\n".join(lines) + "\n")
        for path in (folder, folder / name):
            with pytest.raises(DataError, match="is tiktoken's format"):
                load_tokenizer(path)


def test_file_of_an_older_format_is_reported_as_its_folder(tmp_path: Path) -> None:
    gpt2(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        with pytest.raises(DataError, match=r"holds merges.txt, which is GPT-2's format"):
            load_tokenizer(tmp_path / name)
