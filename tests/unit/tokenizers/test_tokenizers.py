# covers: megalite/tokenizers/tokenizer.py megalite/tokenizers/base.py
from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from megalite.errors import DataError
from megalite.files import sha256_file
from megalite.tokenizers.tokenizer import (
    PROBES,
    ByteTokenizer,
    Tokenizer,
    check_round_trip,
    load_tokenizer,
)

LOSSLESS = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "byte_fallback": True,
}
TEXT = ["def f(x):\n    return x + 1\n", "the quick brown fox </s> jumps"]


def sentencepiece_model(path: Path, options: Mapping[str, Any]) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_writer=model,
        vocab_size=310,
        model_type="bpe",
        minloglevel=2,
        **options,
    )
    path.write_bytes(model.getvalue())
    return path


def hugging_face_file(folder: Path, specials: Sequence[str] = ("<s>", "</s>")) -> Path:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "sentencepiece": str(sentencepiece_model(folder / "any.model", LOSSLESS)),
        "hugging face": str(hugging_face_file(folder / "hf")),
        "bytes": "bytes",
    }


KINDS = pytest.mark.parametrize("kind", ["sentencepiece", "hugging face", "bytes"])


@KINDS
def test_text_survives_encoding_and_decoding(kind: str, paths: dict[str, str]) -> None:
    tokenizer = load_tokenizer(paths[kind])
    check_round_trip(tokenizer)
    texts = [*PROBES, "", "</s><s>"]
    batch = tokenizer.encode_batch(texts, threads=2)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in texts]
    assert [tokenizer.decode(ids.tolist()) for ids in batch] == texts
    highest = max(ids.max(initial=0) for ids in batch)
    assert highest < tokenizer.vocab_size


@KINDS
def test_text_has_no_control_tokens_and_they_have_no_text(kind: str, paths: dict[str, str]) -> None:
    tokenizer = load_tokenizer(paths[kind])
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    assert bos is not None
    assert eos is not None
    ids = tokenizer.encode("<s>a</s>")
    assert not {bos, eos} & set(ids)
    assert tokenizer.decode([bos, *ids, eos]) == "<s>a</s>"


@KINDS
def test_saved_tokenizer_is_equal(kind: str, paths: dict[str, str], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(paths[kind])
    name = tokenizer.save(tmp_path)
    assert sha256_file(tmp_path / name) == tokenizer.sha256
    again = load_tokenizer(tmp_path)
    assert again.sha256 == tokenizer.sha256
    assert again.encode(PROBES[2]) == tokenizer.encode(PROBES[2])
    assert (again.vocab_size, again.bos_id, again.eos_id) == (
        tokenizer.vocab_size,
        tokenizer.bos_id,
        tokenizer.eos_id,
    )


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_byte_tokenizer_keeps_any_text(text: str) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_config_names_bos_and_eos(tmp_path: Path) -> None:
    file = hugging_face_file(tmp_path, ["<|im_end|>", "<s>", "</s>"])
    config = {"bos_token": None, "eos_token": {"content": "<|im_end|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(file)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 0)
    copy = tmp_path / "copy"
    copy.mkdir()
    tokenizer.save(copy)
    assert load_tokenizer(copy).eos_id == 0


def test_check_round_trip_refuses_a_tokenizer_that_loses_text(tmp_path: Path) -> None:
    plain = load_tokenizer(sentencepiece_model(tmp_path / "plain.model", {"byte_fallback": True}))
    with pytest.raises(DataError, match="the tokenizer loses text: '  two before, "):
        check_round_trip(plain)
    lower = tokenizers.Tokenizer.from_file(str(hugging_face_file(tmp_path)))
    lower.normalizer = normalizers.Lowercase()
    lower.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"'The quick .* comes back as 'the quick .* --lossy"):
        check_round_trip(load_tokenizer(tmp_path / "tokenizer.json"))


def bert_file(folder: Path) -> Path:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "quick", "fox", "##es"]
    backend = tokenizers.Tokenizer(
        models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    )
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    backend.add_special_tokens(words[:4])
    backend.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_check_round_trip_warns_of_an_allowed_loss(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = load_tokenizer(bert_file(tmp_path))
    with pytest.raises(DataError, match="allow the loss with --lossy"):
        check_round_trip(tokenizer)
    with caplog.at_level("WARNING", logger="megalite"):
        check_round_trip(tokenizer, lossy=True)
        check_round_trip(ByteTokenizer(), lossy=True)
    assert [record.getMessage().rpartition(" (")[2] for record in caplog.records] == [
        "6 of 6 probes changed)"
    ]
    # Its post-processor adds nothing here; --bos and the EOS of documents use its ids.
    assert tokenizer.encode("The quick foxes") == [4, 5, 6, 7]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (2, 3)


def test_save_writes_the_content_that_was_loaded(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(hugging_face_file(tmp_path / "first"))
    (tmp_path / "first" / "tokenizer.json").write_text("changed meanwhile")
    tokenizer.save(tmp_path)
    assert sha256_file(tmp_path / "tokenizer.json") == tokenizer.sha256


def test_load_tokenizer_refuses_other_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no tokenizer"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(DataError, match="got none of them"):
        load_tokenizer(tmp_path)
    for name in ("a.model", "b.model", "tokenizer.txt", "broken.json"):
        (tmp_path / name).write_text("{nothing")
    with pytest.raises(DataError, match=r"got a\.model, b\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match=r"a tokenizer is a \.model file"):
        load_tokenizer(tmp_path / "tokenizer.txt")
    for name in ("a.model", "broken.json"):
        with pytest.raises(DataError, match=f"{name}: not a readable tokenizer"):
            load_tokenizer(tmp_path / name)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "byte level", "byte fallback"])
def test_count_bytes_adds_up_even_within_a_character(tmp_path: Path, kind: str) -> None:
    """However a text's ids are split in two, the counts add up to the text's bytes."""
    tokenizer = _tokenizer_of_kind(kind, tmp_path)
    text = "naïve café 大规模  😀\n" * 2 + "ab ab"
    ids = tokenizer.encode(text)
    size = len(text.encode())
    assert tokenizer.count_bytes(ids) == size
    cuts = [(ids[:n], ids[n:]) for n in range(len(ids))]
    assert {sum(map(tokenizer.count_bytes, both)) for both in cuts} == {size}
    if tokenizer.eos_id is not None:
        assert tokenizer.count_bytes([tokenizer.eos_id]) == 0


def _tokenizer_of_kind(kind: str, folder: Path) -> Tokenizer:
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "sentencepiece":
        return load_tokenizer(sentencepiece_model(folder / "t.model", LOSSLESS))
    if kind == "byte level":
        return load_tokenizer(hugging_face_file(folder))
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"a": 256, "b": 257, "ab": 258}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [("a", "b")], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["</s>"])
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder / "tokenizer.json")
