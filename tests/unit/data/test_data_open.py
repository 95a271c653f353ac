# covers: megalite/data/dataset.py
from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalite.config import DataConfig, SourceConfig
from megalite.data import Dataset, Loader, open_data, open_train, open_valid
from megalite.errors import DataError
from megalite.formats.manifest import ShardManifest, TokenizerInfo, write_manifest
from megalite.formats.shards import ShardWriter, open_shards

ONE, OTHER = "one tokenizer", "another"


def write_folder(
    folder: Path,
    documents: Sequence[Any],
    *,
    shards: int = 1,
    vocab_size: int = 500,
    tokenizer: str = ONE,
) -> None:
    """Write a shard folder of the given documents, split evenly over shards."""
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.model").write_text(tokenizer)
    digest = sha256(tokenizer.encode()).hexdigest()
    infos = []
    for number, part in enumerate(np.array_split(np.arange(len(documents)), shards)):
        with ShardWriter(
            folder, f"shard_{number:05d}", np.dtype("<u2"), vocab_size=vocab_size
        ) as writer:
            for document in part:
                writer.add_document(documents[document])
            infos.append(writer.close())
    manifest = ShardManifest(
        dtype="uint16",
        vocab_size=vocab_size,
        tokenizer=TokenizerInfo(path="tokenizer/tokenizer.model", sha256=digest),
        bos=None,
        eos=None,
        documents=len(documents),
        tokens=sum(info.tokens for info in infos),
        shards=infos,
        sources=[],
        arguments={},
    )
    write_manifest(folder, manifest)


def config(train: list[Path], valid: Sequence[Path] = (), **options: Any) -> DataConfig:
    weights = options.pop("weights", [None] * len(train))
    sources = zip(train, weights, strict=True)
    return DataConfig(
        train=tuple(SourceConfig(path=str(path), weight=weight) for path, weight in sources),
        valid=tuple(SourceConfig(path=str(path)) for path in valid),
        sequence_length=16,
        **options,
    )


@pytest.fixture
def folders(tmp_path: Path, memory_shards: Any) -> dict[str, Path]:
    """Write two folders of random documents, a short one, and one of another tokenizer."""
    for name, seed, lengths in (("web", 1, [30, 5, 90, 41] * 4), ("code", 2, [17, 200, 3])):
        source = memory_shards(lengths, seed=seed)
        documents = np.split(source.ids, source.starts[1:])
        write_folder(tmp_path / name, documents, shards=3)
    write_folder(tmp_path / "short", [np.arange(16)])
    write_folder(tmp_path / "foreign", [np.arange(100)], vocab_size=900, tokenizer=OTHER)
    return {name: tmp_path / name for name in ("web", "code", "short", "foreign")}


def test_folder_gives_the_samples_of_the_same_tokens_in_memory(
    folders: dict[str, Path], memory_shards: Any
) -> None:
    """Windows and documents that cross three shards are compared with one array."""
    data = config([folders["web"], folders["code"]], mask_documents=True, seed=9)
    dataset = open_train(data, vocab_size=500)
    in_memory = Dataset(
        [memory_shards([30, 5, 90, 41] * 4, seed=1), memory_shards([17, 200, 3], seed=2)],
        [None, None],
        sequence_length=16,
        seed=9,
        mask_documents=True,
    )
    places = np.arange(3 * dataset.num_samples)
    one, other = dataset.batch(places, 0), in_memory.batch(places, 0)
    assert one.targets == other.targets
    for name, tensor in one.tensors.items():
        assert tensor.equal(other.tensors[name]), name
    assert dataset.num_samples == 664 // 16 + 219 // 16
    paths = [source["path"] for source in dataset.describe()["sources"]]
    assert paths == [str(folders["web"]), str(folders["code"])]


def test_open_data_shuffles_training_but_not_validation(folders: dict[str, Path]) -> None:
    data = config([folders["web"]], [folders["web"]])
    train, valid = open_data(data, vocab_size=500)
    assert valid is not None
    natural = 16 * np.arange(valid.num_samples)
    assert np.array_equal(valid.source_of(np.arange(valid.num_samples))[1], natural)
    assert not np.array_equal(train.source_of(np.arange(train.num_samples))[1], natural)
    assert train.fingerprint == open_train(data, vocab_size=500).fingerprint
    again = open_valid(data, vocab_size=500)
    assert again is not None
    assert valid.fingerprint == again.fingerprint != train.fingerprint


def test_open_valid_returns_none_without_validation_data(folders: dict[str, Path]) -> None:
    data = config([folders["web"]])
    assert open_valid(data, vocab_size=500) is None
    assert open_data(data, vocab_size=500)[1] is None


def test_open_train_passes_on_weights_and_seed(folders: dict[str, Path]) -> None:
    both = [folders["web"], folders["code"]]
    dataset = open_train(config(both, weights=[1, 3]), vocab_size=500)
    assert (dataset.source_of(np.arange(400))[0] == 1).mean() == pytest.approx(0.75, abs=0.01)
    other = open_train(config(both, weights=[1, 3], seed=1), vocab_size=500)
    assert dataset.fingerprint != other.fingerprint


def test_open_data_names_every_fault_of_every_folder_at_once(folders: dict[str, Path]) -> None:
    cut = folders["code"] / "shard_00001.bin"
    cut.write_bytes(cut.read_bytes()[:-2])
    missing = folders["web"].parent / "missing"
    data = config(
        [folders["web"], folders["code"], folders["short"]], [missing, folders["foreign"]]
    )
    with pytest.raises(DataError) as caught:
        open_data(data, vocab_size=500)
    text = str(caught.value)
    lines = text.splitlines()
    assert len(lines) == len(set(lines)) == 5
    assert str(cut) in text
    assert f"{folders['short']}: 16 tokens are less than one sample" in text
    assert str(missing) in text
    assert f"{folders['foreign']}: its tokenizer has 900 ids, but model.vocab_size is 500" in text
    digest = sha256(OTHER.encode()).hexdigest()
    foreign = f"{folders['foreign']}: tokenized with {digest[:12]}, but {folders['web']} with"
    assert foreign in text
    with pytest.raises(DataError) as caught:
        open_train(data, vocab_size=500)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("configured", "verify", "fails"),
    [(True, None, True), (False, True, True), (True, False, False)],
)
def test_verify_overrides_the_configuration(
    folders: dict[str, Path], configured: bool, verify: bool | None, fails: bool
) -> None:
    flipped = folders["web"] / "shard_00000.bin"
    data = bytearray(flipped.read_bytes())
    data[0] ^= 1
    flipped.write_bytes(data)
    dataset = open_train(config([folders["web"]], verify=configured), vocab_size=500, verify=verify)
    places = np.arange(dataset.num_samples)
    if fails:
        with pytest.raises(DataError, match=r"shard_00000\.bin"):
            dataset.batch(places, 0)
    else:
        dataset.batch(places, 0)


def test_loader_reports_a_shard_that_was_damaged_meanwhile(
    folders: dict[str, Path],
) -> None:
    dataset = open_train(config([folders["web"]]), vocab_size=500)
    (folders["web"] / "shard_00002.bin").write_bytes(b"")
    loader = Loader(
        dataset,
        global_batch_size=4,
        micro_batch_size=4,
        data_rank=0,
        data_size=1,
        start=0,
        pin_memory=False,
    )
    with pytest.raises(DataError, match=r"shard_00002\.bin"):
        list(islice(loader, dataset.num_samples))
    loader.close()


def test_fingerprint_does_not_depend_on_the_folders_path(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    before = open_train(config([folders["web"]]), vocab_size=500).fingerprint
    moved = folders["web"].rename(tmp_path / "elsewhere")
    assert open_train(config([moved]), vocab_size=500).fingerprint == before
    assert open_shards(moved).fingerprint != open_shards(folders["code"]).fingerprint


@pytest.mark.parametrize("harm", ["missing", "changed"])
def test_tokenizer_file_that_is_missing_or_changed_is_reported(tmp_path: Path, harm: str) -> None:
    write_folder(tmp_path / "web", [np.arange(100)])
    model = tmp_path / "web" / "tokenizer" / "tokenizer.model"
    if harm == "missing":
        model.unlink()
    else:
        model.write_text("a later one")
    config = DataConfig.model_validate(
        {"train": [{"path": str(tmp_path / "web")}], "sequence_length": 8}
    )
    with pytest.raises(DataError, match=rf"tokenizer\.model (is|was) {harm}"):
        open_train(config, vocab_size=500)
