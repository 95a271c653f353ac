# covers: megalite/data/dataset.py
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data import Dataset
from megalite.data.order import LIMIT, derive_key, permute
from megalite.errors import DataError

LENGTHS = st.lists(st.integers(0, 25), min_size=4, max_size=40).filter(lambda x: sum(x) > 30)


def make(sources: list[Any], *, L: int = 8, **options: Any) -> Dataset:
    weights = options.pop("weights", [None] * len(sources))
    return Dataset(
        sources, weights, sequence_length=L, **{"seed": 3, "mask_documents": False, **options}
    )


def naive_documents(starts: list[int], first: int, L: int) -> dict[str, list[Any]]:
    """Positions, document numbers and counted targets of one window, token by token."""
    positions, numbers, counted = [], [], []
    position, number = 0, 0
    for column in range(L):
        if column > 0 and first + column in starts:
            position, number = 0, number + 1
        positions.append(position)
        numbers.append(number)
        counted.append(first + column + 1 not in starts)
        position += 1
    return {"position_ids": positions, "document_ids": numbers, "loss_mask": counted}


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(LENGTHS, min_size=1, max_size=4),
    L=st.integers(1, 30),
    seed=st.integers(0, 2**63 - 1),
    shuffle=st.booleans(),
)
def test_samples_have_the_tokens_of_their_windows(
    memory_shards: Any, lengths: list[list[int]], L: int, seed: int, shuffle: bool
) -> None:
    sources = [memory_shards(one, seed=i) for i, one in enumerate(lengths)]
    dataset = make(sources, L=L, seed=seed, shuffle=shuffle)
    n = 2 * dataset.num_samples + 3
    batch = dataset.batch(np.arange(n), 0)
    seen = [0] * len(sources)
    owners, starts = dataset.source_of(np.arange(n))
    for row, owner in enumerate(owners.tolist()):
        ids, windows = sources[owner].ids, (sources[owner].tokens - 1) // L
        epoch, window = divmod(seen[owner], windows)
        if shuffle:
            key = derive_key(seed, np.array([owner]), np.array([epoch]))
            window = permute(window, windows, int(key[0]))
        seen[owner] += 1
        first = window * L
        assert starts[row] == first
        assert batch.tensors["input_ids"][row].tolist() == ids[first : first + L].tolist()
        assert batch.tensors["labels"][row].tolist() == ids[first + 1 : first + L + 1].tolist()
    assert batch.targets == n * L
    assert set(batch.tensors) == {"input_ids", "labels", "loss_mask"}


@settings(deadline=None, max_examples=150)
@given(lengths=LENGTHS, L=st.integers(1, 30), places=st.lists(st.integers(0, 500), min_size=1))
def test_documents_are_masked_from_each_other(
    memory_shards: Any, lengths: list[int], L: int, places: list[int]
) -> None:
    """Empty documents, which other tools write, do not count."""
    source = memory_shards(lengths)
    dataset = make([source], L=L, mask_documents=True)
    batch = dataset.batch(np.array(places), 0)
    expected = [
        naive_documents(source.starts.tolist(), int(first), L)
        for first in dataset.source_of(np.array(places))[1]
    ]
    for name in ("position_ids", "document_ids", "loss_mask"):
        assert batch.tensors[name].tolist() == [row[name] for row in expected], name
    assert batch.targets == sum(sum(row["loss_mask"]) for row in expected)


def test_window_of_whole_documents_has_the_expected_tensors(memory_shards: Any) -> None:
    # tokens: a a a | b b b b | c c c, windows of 4 + 1: "a a a b b" and "b b b c c"
    source = memory_shards([3, 4, 3])
    dataset = make([source], L=4, mask_documents=True, shuffle=False)
    tensors = dataset.batch(np.array([0, 1]), 0).tensors
    assert tensors["position_ids"].tolist() == [[0, 1, 2, 0], [0, 1, 2, 0]]
    assert tensors["document_ids"].tolist() == [[0, 0, 0, 1], [0, 0, 0, 1]]
    assert tensors["loss_mask"].tolist() == [[True, True, False, True]] * 2
    assert dataset.describe()["sources"][0]["dropped_tokens"] == 1


def test_tensors_have_the_dtypes_and_shapes_of_the_engine(memory_shards: Any) -> None:
    dataset = make([memory_shards([40] * 5)], L=16, mask_documents=True)
    batch = dataset.batch(np.array([4, 2, 7]), 4)
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.tensors.items()}
    ids = (torch.int64, (3, 16))
    assert kinds == {
        "input_ids": ids,
        "labels": ids,
        "loss_mask": (torch.bool, (3, 16)),
        "position_ids": ids,
        "document_ids": ids,
    }
    assert all(tensor.is_contiguous() for tensor in batch.tensors.values())
    assert batch.place == 4
    alone = dataset.sample(2)
    assert alone.place == 2
    for name, tensor in alone.to("cpu").tensors.items():
        assert torch.equal(tensor[0], batch.tensors[name][1])
    part = batch.first(1)
    assert part.tensors["loss_mask"][0].equal(batch.tensors["loss_mask"][0])
    assert part.targets == int(part.tensors["loss_mask"].sum()) < batch.targets
    assert batch.targets == int(batch.tensors["loss_mask"].sum())


def test_epoch_reads_every_window_once_in_its_own_order(memory_shards: Any) -> None:
    sources = [memory_shards([50] * 20, seed=1), memory_shards([70] * 3, seed=2)]
    dataset = make(sources, L=10)
    assert dataset.num_samples == 99 + 20
    epochs = []
    for epoch in range(2):
        places = np.arange(dataset.num_samples) + epoch * dataset.num_samples
        epochs.append(
            list(zip(*(part.tolist() for part in dataset.source_of(places)), strict=True))
        )
    expected = [(0, 10 * i) for i in range(99)] + [(1, 10 * i) for i in range(20)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == expected
    assert epochs[0] != epochs[1]


def test_windows_are_in_order_without_shuffle(memory_shards: Any) -> None:
    sources = [memory_shards([100], seed=1), memory_shards([50], seed=2)]
    dataset = make(sources, L=10, shuffle=False)
    owner, first = dataset.source_of(np.arange(dataset.num_samples))
    assert first[owner == 0].tolist() == [10 * i for i in range(9)]
    assert first[owner == 1].tolist() == [10 * i for i in range(4)]


def test_weights_define_the_shares_of_sources(memory_shards: Any) -> None:
    sources = [memory_shards([1000], seed=1), memory_shards([100], seed=2)]
    dataset = make(sources, L=10, weights=[1.0, 3.0])
    owner, _ = dataset.source_of(np.arange(400))
    assert abs(int((owner == 1).sum()) - 300) <= 2
    rows = dataset.describe(samples=400)["sources"]
    assert [row["share"] for row in rows] == [0.25, 0.75]
    assert rows[1]["epochs"] == pytest.approx(300 / 9)
    assert [row["windows"] for row in rows] == [99, 9]
    assert [row["dropped_tokens"] for row in rows] == [9, 9]


def test_sample_exists_up_to_the_limit(memory_shards: Any) -> None:
    dataset = make([memory_shards([100], seed=i) for i in range(3)], L=10)
    assert dataset.sample(LIMIT - 1).tensors["input_ids"].shape == (1, 10)


def test_fingerprint_depends_on_everything_that_changes_samples(memory_shards: Any) -> None:
    def fingerprint(**options: Any) -> str:
        seeds = options.pop("sources", (1, 2))
        return make([memory_shards([90], seed=s) for s in seeds], **options).fingerprint

    variants = [
        fingerprint(),
        fingerprint(sources=(2, 1)),
        fingerprint(sources=(1,)),
        fingerprint(L=9),
        fingerprint(seed=4),
        fingerprint(mask_documents=True),
        fingerprint(shuffle=False),
        fingerprint(weights=[1.0, 1.0]),
        fingerprint(weights=[1.0, 2.0]),
    ]
    assert len(set(variants)) == len(variants)
    assert fingerprint() == variants[0]


def test_sources_without_a_sample_are_reported_together(memory_shards: Any) -> None:
    sources = [
        memory_shards([10], name="short"),
        memory_shards([11], name="enough"),
        memory_shards([0], name="empty"),
    ]
    with pytest.raises(DataError) as caught:
        make(sources, L=10, weights=[1.0, None, None])
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("short: 10 tokens are less than one sample of sequence_length 10")
    assert lines[1].startswith("empty: 0 tokens")
    assert "2 of 3 sources have no weight" in lines[2]
