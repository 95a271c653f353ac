# covers: megalite/data/dataset.py
"""What is wrong with shards, as training says it: before the first step or where it is read."""

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
    """Return two shards of random documents, with a manifest."""
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
    """Return the same tokens as Megatron-LM would leave them."""
    made = write_folder(folder.with_name(f"{folder.name}_made"), seed=seed)
    folder.mkdir()
    for number in range(2):
        for ending in ("bin", "idx"):
            old = made / f"shard_{number:05d}.{ending}"
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


def cut(folder: Path) -> None:
    path = min(folder.glob("*.bin"))
    path.write_bytes(path.read_bytes()[:-2])


def spoil_index(folder: Path) -> None:
    """That of an earlier, shorter file."""
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
    ("harm", "named"), [(cut, r"\.bin: 278 bytes, .* is cut"), (spoil_index, r"\.idx")]
)
def test_a_cut_file_and_a_stale_index_stop_a_run_before_it_starts(
    kind: str, harm: Callable[[Path], None], named: str, tmp_path: Path
) -> None:
    folder = WRITERS[kind](tmp_path / "web")
    read_all(open_one(folder))
    harm(folder)
    with pytest.raises(DataError, match=named):
        open_one(folder)


@pytest.mark.parametrize("kind", WRITERS)
def test_an_id_out_of_range_is_named_where_it_is_read(kind: str, tmp_path: Path) -> None:
    folder = WRITERS[kind](tmp_path / "web")
    put_high_id(folder)
    bound = VOCABULARY if kind == "manifest" else 300
    with pytest.raises(DataError, match=rf"\.bin: token 0 is 65535, the vocabulary has {bound}"):
        read_all(open_one(folder))


def test_a_flipped_byte_is_named_where_verifying_was_asked_for(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "web")
    read_all(open_one(folder, verify=True))
    flip(folder)
    read_all(open_one(folder))
    with pytest.raises(DataError, match=r"shard_00000\.bin: got sha256 .* the file changed"):
        read_all(open_one(folder, verify=True))


def test_megatrons_shards_are_read_as_the_same_samples(tmp_path: Path) -> None:
    ours = write_folder(tmp_path / "web")
    theirs = write_megatron(tmp_path / "mega")
    one, other = open_one(ours), open_one(theirs)
    places = np.arange(2 * one.num_samples)
    batch, same = one.batch(places, 0), other.batch(places, 0)
    for name, tensor in batch.tensors.items():
        assert tensor.equal(same.tensors[name]), name
    assert one.fingerprint != other.fingerprint
    assert open_one(theirs).fingerprint == other.fingerprint
    flip(theirs)  # no hash tells; the fingerprint is of indices and sizes
    assert open_one(theirs).fingerprint == other.fingerprint
    prefix = theirs / "part0_text_document"
    assert open_one(prefix).describe()["sources"][0]["path"] == str(prefix)


def test_a_tokenizer_is_taken_from_the_first_source_that_tells_it(tmp_path: Path) -> None:
    theirs = write_megatron(tmp_path / "mega")
    ours = write_folder(tmp_path / "web", seed=1)
    alone = open_one(theirs)
    assert (alone.tokenizer_folder, alone.tokenizer_sha256) == (None, "")
    both = open_one(theirs, ours)
    assert both.tokenizer_folder == ours / "tokenizer"
    assert both.tokenizer_sha256 == ByteTokenizer().sha256
    shutil.copytree(ours / "tokenizer", theirs / "tokenizer")
    assert open_one(theirs).tokenizer_folder == theirs / "tokenizer"


def test_a_tokenizer_beside_megatrons_shards_must_be_that_of_the_others(tmp_path: Path) -> None:
    theirs, ours = write_megatron(tmp_path / "mega"), write_folder(tmp_path / "web", seed=1)
    (theirs / "tokenizer").mkdir()
    tokenizer = '{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": '
    (theirs / "tokenizer" / "tokenizer.json").write_text(tokenizer + '{"a": 0}, "merges": []}}')
    with pytest.raises(DataError, match=r"web: tokenized with .*, but .*mega with"):
        open_one(theirs, ours)


def test_open_data_names_faults_of_training_and_validation_at_once(tmp_path: Path) -> None:
    theirs, ours = write_megatron(tmp_path / "mega"), write_folder(tmp_path / "web")
    cut(theirs)
    cut(ours)
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
