# covers: megalite/data/dataset.py
"""Damaged shards are reported before the first step or when they are read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalite.config import DataConfig
from megalite.data import Dataset, open_data, open_train
from megalite.errors import DataError
from megalite.formats.index import DTYPES, write_index
from megalite.formats.manifest import ShardManifest, TokenizerInfo, write_manifest
from megalite.formats.shards import ShardWriter
from megalite.tokenizers.tokenizer import ByteTokenizer

VOCABULARY = 258  # of bytes


def write_folder(folder: Path, *, seed: int = 0) -> Path:
    """Write two shards of random documents with a manifest, and return the folder."""
    (folder / "tokenizer").mkdir(parents=True)
    name = ByteTokenizer().save(folder / "tokenizer")
    numbers, infos = np.random.default_rng(seed), []
    for shard in range(2):
        with ShardWriter(folder, f"shard_{shard:05d}", DTYPES[8], vocab_size=VOCABULARY) as writer:
            for length in (40, 3, 90, 7):
                writer.add_document(numbers.integers(0, 256, size=length))
            infos.append(writer.close())
    manifest = ShardManifest(
        dtype="uint16",
        vocab_size=VOCABULARY,
        tokenizer=TokenizerInfo(path=f"tokenizer/{name}", sha256=ByteTokenizer().sha256),
        bos=None,
        eos=None,
        documents=8,
        tokens=280,
        shards=infos,
    )
    write_manifest(folder, manifest)
    return folder


def write_megatron(folder: Path, *, seed: int = 0) -> Path:
    """Write the same tokens as Megatron-LM would, and return the folder."""
    source = write_folder(folder.with_name(f"{folder.name}_source"), seed=seed)
    folder.mkdir()
    for number in range(2):
        for ending in ("bin", "idx"):
            old = source / f"shard_{number:05d}.{ending}"
            shutil.copy(old, folder / f"part{number}_text_document.{ending}")
    return folder


def open_one(*folders: Path, **options: Any) -> Dataset:
    config = {
        "train": [{"path": str(folder)} for folder in folders],
        "sequence_length": 16,
        "mask_documents": True,
    } | options
    return open_train(DataConfig.model_validate(config), vocab_size=300)


def read_all(dataset: Dataset) -> None:
    dataset.batch(np.arange(dataset.num_samples), 0)


def truncate(folder: Path) -> None:
    path = min(folder.glob("*.bin"))
    path.write_bytes(path.read_bytes()[:-2])


def spoil_index(folder: Path) -> None:
    """Replace an index by that of a shorter file."""
    write_index(min(folder.glob("*.idx")), [40, 3, 90], [0, 1, 2, 3], DTYPES[8])


def put_high_id(folder: Path) -> None:
    path = min(folder.glob("*.bin"))
    path.write_bytes(b"\xff\xff" + path.read_bytes()[2:])


def flip(folder: Path) -> None:
    path = min(folder.glob("*.bin"))
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)


WRITERS = {"manifest": write_folder, "megatron": write_megatron}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(
    ("harm", "message"),
    [(truncate, r"\.bin: got 278 bytes, .* is truncated"), (spoil_index, r"\.idx")],
)
def test_damaged_files_are_reported_when_data_is_opened(
    kind: str, harm: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    folder = WRITERS[kind](tmp_path / "web")
    read_all(open_one(folder))
    harm(folder)
    with pytest.raises(DataError, match=message):
        open_one(folder)


@pytest.mark.parametrize("kind", WRITERS)
def test_id_out_of_range_is_reported_when_read(kind: str, tmp_path: Path) -> None:
    folder = WRITERS[kind](tmp_path / "web")
    put_high_id(folder)
    bound = VOCABULARY if kind == "manifest" else 300
    with pytest.raises(DataError, match=rf"\.bin: token 0 is 65535, the vocabulary has {bound}"):
        read_all(open_one(folder))


def test_changed_byte_is_reported_if_verify_is_set(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "web")
    read_all(open_one(folder, verify=True))
    flip(folder)
    read_all(open_one(folder))
    with pytest.raises(DataError, match=r"shard_00000\.bin: got sha256 .* the file changed"):
        read_all(open_one(folder, verify=True))


def test_megatron_shards_give_the_same_samples(tmp_path: Path) -> None:
    ours = write_folder(tmp_path / "web")
    theirs = write_megatron(tmp_path / "mega")
    one, other = open_one(ours), open_one(theirs)
    places = np.arange(2 * one.num_samples)
    batch, same = one.batch(places, 0), other.batch(places, 0)
    for name, tensor in batch.tensors.items():
        assert tensor.equal(same.tensors[name]), name
    assert one.fingerprint != other.fingerprint
    assert open_one(theirs).fingerprint == other.fingerprint
    flip(theirs)  # without hashes, the fingerprint depends on indices and sizes only
    assert open_one(theirs).fingerprint == other.fingerprint
    prefix = theirs / "part0_text_document"
    assert open_one(prefix).describe()["sources"][0]["path"] == str(prefix)


def test_tokenizer_is_that_of_the_first_source_that_names_one(tmp_path: Path) -> None:
    theirs = write_megatron(tmp_path / "mega")
    ours = write_folder(tmp_path / "web", seed=1)
    alone = open_one(theirs)
    assert (alone.tokenizer_folder, alone.tokenizer_sha256) == (None, "")
    both = open_one(theirs, ours)
    assert both.tokenizer_folder == ours / "tokenizer"
    assert both.tokenizer_sha256 == ByteTokenizer().sha256
    shutil.copytree(ours / "tokenizer", theirs / "tokenizer")
    assert open_one(theirs).tokenizer_folder == theirs / "tokenizer"


def test_tokenizer_of_megatron_shards_must_equal_the_others(tmp_path: Path) -> None:
    theirs, ours = write_megatron(tmp_path / "mega"), write_folder(tmp_path / "web", seed=1)
    (theirs / "tokenizer").mkdir()
    tokenizer = '{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": '
    (theirs / "tokenizer" / "tokenizer.json").write_text(tokenizer + '{"a": 0}, "merges": []}}')
    with pytest.raises(DataError, match=r"web: tokenized with .*, but .*mega with"):
        open_one(theirs, ours)


def test_open_data_names_faults_of_training_and_validation_at_once(tmp_path: Path) -> None:
    theirs, ours = write_megatron(tmp_path / "mega"), write_folder(tmp_path / "web")
    truncate(theirs)
    truncate(ours)
    config = DataConfig.model_validate(
        {
            "train": [{"path": str(ours)}],
            "valid": [{"path": str(theirs)}, {"path": str(tmp_path / "none")}],
            "sequence_length": 16,
        }
    )
    with pytest.raises(DataError) as caught:
        open_data(config, vocab_size=300)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    for words in ("shard_00000.bin", "part0_text_document.bin", "none does not exist"):
        assert any(words in line for line in lines)
