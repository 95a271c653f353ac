# covers: megalite/formats/index.py megalite/formats/manifest.py megalite/formats/shards.py
"""Megatron-LM's shards, which have no manifest; and Megatron's reader on ours, if installed."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalite.errors import DataError
from megalite.formats.index import DTYPES, Dtype, dtype_for, write_index
from megalite.formats.shards import ShardWriter, open_shards
from megalite.formats.verify import verify_folder
from megalite.log import logger
from megalite.tokenizers.tokenizer import ByteTokenizer

MakeFolder = Callable[..., Path]
U16, I32 = DTYPES[8], DTYPES[4]


def write_pair(prefix: Path, documents: Sequence[Sequence[Sequence[int]]], dtype: Dtype) -> None:
    """Write `prefix.bin` and `prefix.idx` of documents, each a list of sequences."""
    sequences = [sequence for document in documents for sequence in document]
    bounds = np.cumsum([0, *map(len, documents)])
    ids = [id for sequence in sequences for id in sequence]
    np.array(ids, dtype).tofile(prefix.with_name(f"{prefix.name}.bin"))
    write_index(
        prefix.with_name(f"{prefix.name}.idx"), [len(one) for one in sequences], bounds, dtype
    )


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list to which the warnings of a test are added."""
    messages: list[str] = []
    monkeypatch.setattr(logger, "warning", lambda text, *values: messages.append(text % values))
    return messages


# The golden pairs of test_mmididx.py: dtype, documents as lists of sequences, and the .bin in hex.
GOLDEN: dict[str, tuple[Dtype, list[list[list[int]]], str]] = {
    "three documents": (
        U16,
        [[[1, 2, 3]], [[4, 5]], [[65535, 0, 7, 8]]],
        "01000200030004000500ffff000007000800",
    ),
    "several sequences a document": (
        I32,
        [[[10, 11], [12, 13, 14]], [[70000]]],
        "0a0000000b0000000c0000000d0000000e00000070110100",
    ),
    "a document without a sequence": (U16, [[[1]], [], [[2, 3]]], "010002000300"),
    "a sequence without a token": (U16, [[[1]], [[]], [[2, 3]]], "010002000300"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_pair_opens_by_its_prefix(name: str, tmp_path: Path) -> None:
    dtype, documents, content = GOLDEN[name]
    prefix = tmp_path / "my_text_document"
    write_pair(prefix, documents, dtype)
    assert (tmp_path / "my_text_document.bin").read_bytes().hex() == content
    shards = open_shards(prefix)
    flat = [[id for sequence in document for id in sequence] for document in documents]
    assert [shards.document(number).tolist() for number in range(shards.documents)] == flat
    assert shards.read(0, shards.tokens).tolist() == [id for ids in flat for id in ids]
    starts = {sum(map(len, flat[:number])) for number in range(len(flat))}
    inside = sorted(start for start in starts if 0 < start < shards.tokens)
    assert shards.document_starts(0, shards.tokens).tolist() == inside
    assert (shards.folder, shards.path) == (tmp_path, prefix)


@pytest.mark.parametrize("code", DTYPES)
def test_pair_of_every_dtype_is_read(code: int, tmp_path: Path) -> None:
    write_pair(tmp_path / "a", [[[1, 2, 127]], [[5]]], DTYPES[code])
    shards = open_shards(tmp_path, vocab_size=128)
    assert shards.read(0, 4).tolist() == [1, 2, 127, 5]
    assert shards.dtype == DTYPES[code]


def test_modes_of_multimodal_files_are_ignored(tmp_path: Path) -> None:
    write_pair(tmp_path / "a", [[[1, 2], [9]]], U16)
    write_index(tmp_path / "a.idx", [2, 1], [0, 2], U16, modes=[0, 1])
    assert open_shards(tmp_path).document(0).tolist() == [1, 2, 9]


def test_folder_of_pairs_is_read_in_the_order_of_names(tmp_path: Path, warnings: list[str]) -> None:
    write_pair(tmp_path / "b_text_document", [[[4, 5], [6]]], U16)
    write_pair(tmp_path / "a_text_document", [[[1], [2]], [[3]]], U16)
    shards = open_shards(tmp_path, vocab_size=100)
    assert shards.read(0, 6).tolist() == [1, 2, 3, 4, 5, 6]
    assert shards.document_starts(0, 6).tolist() == [2, 3]
    assert (shards.documents, shards.vocab_size) == (3, 100)
    assert shards.manifest.tokenizer.sha256 == ""
    assert len(warnings) == 1
    for words in ("2 shards without a manifest", "no hashes", "which tokenizer", "of 100 as"):
        assert words in warnings[0]
    assert "data.verify" not in warnings[0]
    open_shards(tmp_path / "a_text_document", verify=True).read(0, 3)
    assert "data.verify does nothing here" in warnings[1]


def test_ids_are_compared_with_the_vocabulary_size_when_read(tmp_path: Path) -> None:
    write_pair(tmp_path / "a", [[[1, 2, 500, 3]]], I32)
    shards = open_shards(tmp_path / "a", vocab_size=500)
    assert shards.read(0, 2).tolist() == [1, 2]
    with pytest.raises(DataError, match=r"a\.bin: token 2 is 500, the vocabulary has 500"):
        shards.read(1, 3)
    assert open_shards(tmp_path / "a").read(0, 4).tolist() == [1, 2, 500, 3]


def test_tokenizer_in_the_folder_sets_the_vocabulary_size(
    tmp_path: Path, warnings: list[str]
) -> None:
    write_pair(tmp_path / "a", [[[1, 2, 258]]], U16)
    (tmp_path / "tokenizer").mkdir()
    ByteTokenizer().save(tmp_path / "tokenizer")
    shards = open_shards(tmp_path, vocab_size=1000)
    assert shards.vocab_size == 258
    assert shards.manifest.tokenizer.path == "tokenizer/bytes.json"
    assert shards.manifest.tokenizer.sha256 == ByteTokenizer().sha256
    assert "whether tokenizer/bytes.json made them" in warnings[0]
    with pytest.raises(DataError, match="token 2 is 258"):
        shards.read(0, 3)


def test_fingerprint_depends_on_indices_and_sizes_only(tmp_path: Path) -> None:
    documents = [[[1], [2]], [[3]]]
    write_pair(tmp_path / "a", documents, U16)
    before = open_shards(tmp_path / "a", vocab_size=50).fingerprint
    assert len(before) == 64
    assert open_shards(tmp_path, vocab_size=60).fingerprint == before
    (tmp_path / "tokenizer").mkdir()
    ByteTokenizer().save(tmp_path / "tokenizer")
    assert open_shards(tmp_path).fingerprint == before
    write_pair(tmp_path / "b", documents, U16)
    assert open_shards(tmp_path).fingerprint != before
    write_pair(tmp_path / "b", [[[1], [2], [3]]], U16)
    assert open_shards(tmp_path / "b").fingerprint != before


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:-size])


# A message, and the damage that it reports.
FAULTS: dict[str, Callable[[Path], object]] = {
    "a.bin: got 6 bytes, its .idx says 8 (4 tokens of uint16); it is truncated": (
        lambda folder: truncate(folder / "a.bin", 2)
    ),
    "a.idx: 2 sequences and 3 document boundaries take 82 bytes, the file has 81": (
        lambda folder: truncate(folder / "a.idx", 1)
    ),
    "a.bin: got 8 bytes, its .idx says 6 (3 tokens": lambda folder: shutil.copy(
        folder / "b.idx", folder / "a.idx"
    ),
    "a.idx: missing, but a.bin exists": lambda folder: (folder / "a.idx").unlink(),
    "b.bin: missing, but b.idx exists": lambda folder: (folder / "b.bin").unlink(),
    "a has int32, b has uint16; name each pair": lambda folder: write_pair(
        folder / "a", [[[1]]], I32
    ),
    "sequence 1 points at byte 7": lambda folder: (folder / "a.idx").write_bytes(
        (folder / "a.idx").read_bytes().replace(struct.pack("<q", 4), struct.pack("<q", 7))
    ),
}


@pytest.mark.parametrize("message", FAULTS)
def test_damaged_pair_is_reported(message: str, tmp_path: Path) -> None:
    write_pair(tmp_path / "a", [[[1, 2]], [[3, 4]]], U16)
    write_pair(tmp_path / "b", [[[5, 6, 7]]], U16)
    FAULTS[message](tmp_path)
    with pytest.raises(DataError) as caught:
        open_shards(tmp_path)
    assert message in str(caught.value)


def test_megalite_shards_need_their_manifest(make_folder: MakeFolder) -> None:
    folder = make_folder([[[1, 2]]])
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"has no manifest\.json; check .* interrupted"):
        open_shards(folder)
    for name in ("shard_00000.bin", "shard_00000.idx"):
        (folder / name).rename(folder / name.replace("shard_00000", "web"))
    assert "has no manifest.json" in verify_folder(folder)[0]
    assert open_shards(folder).read(0, 2).tolist() == [1, 2]


@pytest.fixture(scope="module")
def megatron() -> Any:
    """Return Megatron's module, from `pip install --no-deps megatron-core`."""
    return pytest.importorskip("megatron.core.datasets.indexed_dataset", exc_type=ImportError)


@pytest.mark.parametrize("vocab_size", [65_536, 70_001])
def test_megatron_reads_megalite_shards(megatron: Any, vocab_size: int, tmp_path: Path) -> None:
    numbers = np.random.default_rng(0)
    documents = [numbers.integers(0, vocab_size, size=n) for n in (5, 1, 0, 300, 17)]
    with ShardWriter(tmp_path, "a", dtype_for(vocab_size), vocab_size=vocab_size) as writer:
        for document in documents:
            writer.add_document(document)
        writer.close()
    for mmap in (True, False):
        dataset = megatron.IndexedDataset(str(tmp_path / "a"), mmap=mmap)
        assert len(dataset) == len(documents)
        assert dataset.sequence_lengths.tolist() == [5, 1, 0, 300, 17]
        assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4, 5]
        for number, document in enumerate(documents):
            assert dataset[number].tolist() == document.tolist()


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 8])
def test_megalite_reads_megatron_shards(megatron: Any, code: int, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    builder = megatron.IndexedDatasetBuilder(
        str(tmp_path / "a_text_document.bin"), dtype=megatron.DType.dtype_from_code(code)
    )
    documents = [[[1, 2, 3], [4]], [[5, 6]], [], [[127], [7, 8, 9], [10]]]
    for document in documents:
        for sequence in document:
            builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(str(tmp_path / "a_text_document.idx"))
    shards = open_shards(tmp_path / "a_text_document")
    flat = [[id for sequence in document for id in sequence] for document in documents]
    assert [shards.document(number).tolist() for number in range(4)] == flat
    assert shards.document_starts(0, shards.tokens).tolist() == [4, 6]
    index = (tmp_path / "a_text_document.idx").read_bytes()
    write_pair(tmp_path / "again", documents, DTYPES[code])
    assert (tmp_path / "again.idx").read_bytes() == index
