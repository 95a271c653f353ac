# covers: data_prep/train.py
from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Literal

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import train
from data_prep.train import TrainOptions, chunks, sample_chunks, train_tokenizer
from megalite.errors import CommandError, DataError
from megalite.tokenizers.tokenizer import load_tokenizer

SOURCE = "def f(x):\n    if x:\n        return x + 123\n\n\nclass A:\n    pass\n"
NAMES = "ant bee cat dog eel fox gnu hen ibis jay kite lark mole newt owl pig ram seal toad yak"


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    for name in NAMES.split():
        (tmp_path / f"{name}.py").write_text(SOURCE.replace("x", f"name_{name}") * 20)
    return str(tmp_path / "*.py")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_tokenizer_is_lossless_and_equal_in_every_run(
    kind: Literal["bpe", "unigram"], corpus: str, tmp_path: Path
) -> None:
    models = []
    for name in ("a", "b"):
        options = TrainOptions([corpus], 310, tmp_path / name, kind)
        train_tokenizer(options)
        assert [path.name for path in (tmp_path / name).iterdir()] == ["tokenizer.model"]
        models.append((tmp_path / name / "tokenizer.model").read_bytes())
    assert models[0] == models[1]
    tokenizer = load_tokenizer(tmp_path / "a")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (310, 1, 2)
    for text in (SOURCE, "\n\n  \t\r\n", "中文🎉", " a  b   c    ", "\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_learns_newlines_and_splits_digits(corpus: str, tmp_path: Path) -> None:
    train_tokenizer(TrainOptions([corpus], 330, tmp_path / "out"))
    processor = sentencepiece.SentencePieceProcessor(
        model_file=str(tmp_path / "out" / "tokenizer.model")
    )
    pieces = {processor.id_to_piece(number) for number in range(330)}
    assert any("\n" in piece and piece != "\n" for piece in pieces)
    assert not any(sum(c.isdigit() for c in piece) > 1 for piece in pieces if piece[0] != "<")


@pytest.mark.parametrize(
    ("size", "message"),
    [(20_000, r"this text yields at most \d+ pieces"), (200, r"256 bytes, .* take \d+ pieces")],
)
def test_vocabulary_size_that_does_not_fit_the_text_is_refused(
    size: int, message: str, corpus: str, tmp_path: Path
) -> None:
    kinds: tuple[Literal["bpe", "unigram"], ...] = ("bpe", "unigram")
    for kind in kinds:
        options = TrainOptions([corpus], size, tmp_path / "out", kind)
        with pytest.raises(DataError, match=f"--vocab-size {size}: .*{message}"):
            train_tokenizer(options)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".py"] * 20


def test_vocabulary_size_that_the_error_names_works(corpus: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        train_tokenizer(TrainOptions([corpus], 20_000, tmp_path / "out"))
    largest = int(str(caught.value).split("yields at most ")[1].split()[0])
    assert train_tokenizer(TrainOptions([corpus], largest, tmp_path / "out")).vocab_size == largest


def test_output_in_use_and_an_empty_corpus_are_refused(corpus: str, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="exists and is not an empty folder"):
        train_tokenizer(TrainOptions([corpus], 330, tmp_path))
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no document in"):
        train_tokenizer(TrainOptions([str(tmp_path / "a.jsonl")], 330, tmp_path / "out"))


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="ab \n", max_size=300))
def test_chunks_add_up_and_begin_with_newlines(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_CHUNK_CHARACTERS", 20)
        parts = list(chunks(text))
    assert "".join(parts) == text
    assert all(len(part) <= 20 for part in parts)
    for before, after in pairwise(parts):
        assert before
        assert after[0] == "\n" or "\n" not in before[1:]


def test_tokenizer_of_text_without_spaces_keeps_spaces(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("大规模模型的训练，数据决定结果。\n" * 50, encoding="utf-8")
    tokenizer = train_tokenizer(TrainOptions([str(tmp_path / "a.txt")], 300, tmp_path / "out"))
    assert tokenizer.decode(tokenizer.encode("模型  a b\n ")) == "模型  a b\n "


def test_tokenizer_learns_from_a_long_line_without_spaces(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab" * 100_000)
    tokenizer = train_tokenizer(TrainOptions([str(tmp_path / "a.txt")], 265, tmp_path / "out"))
    assert len(tokenizer.encode("ab" * 20)) < 20


def test_sample_is_bounded_uniform_and_repeatable() -> None:
    documents = [f"{number:05d}" * 10 for number in range(10_000)]
    sample = sample_chunks(iter(documents), 50_000)
    assert sample == sample_chunks(iter(documents), 50_000)
    assert 20_000 < sum(map(len, sample)) <= 50_000
    assert sample == sorted(sample)
    halves = [sum(chunk[0] in digits for chunk in sample) for digits in ("01234", "56789")]
    numbers = [int(chunk[:5]) for chunk in sample]
    assert 0.35 < sum(number < 5000 for number in numbers) / len(numbers) < 0.65
    assert sum(halves) == len(sample)
    assert sample_chunks(iter(documents), 10**9) == documents
