# covers: megalite/data/loader.py megalite/data/samples.py
from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data import Batch, Dataset, Loader, StepBatches, first_batches

L = 6


@pytest.fixture(scope="module")
def dataset(memory_shards: Any) -> Dataset:
    sources = [memory_shards([7, 30, 2, 90] * 5, seed=1), memory_shards([40] * 9, seed=2)]
    return Dataset(sources, [1, 2], sequence_length=L, seed=5, mask_documents=True)


def make(dataset: Dataset, **options: Any) -> Loader:
    options = {
        "global_batch_size": 12,
        "micro_batch_size": 2,
        "data_rank": 0,
        "data_size": 1,
        "start": 0,
        "pin_memory": False,
    } | options
    return Loader(dataset, **options)


def take(loader: Loader, steps: int) -> list[StepBatches]:
    try:
        return [next(loader) for _ in range(steps)]
    finally:
        loader.close()


def same(one: Batch, other: Batch) -> bool:
    return (
        (one.place, one.targets) == (other.place, other.targets)
        and one.tensors.keys() == other.tensors.keys()
        and all(tensor.equal(other.tensors[name]) for name, tensor in one.tensors.items())
    )


@settings(deadline=None, max_examples=25)
@given(
    ranks=st.integers(1, 4),
    micro=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    start=st.integers(0, 1000),
)
def test_loader_reads_the_same_samples_on_any_layout(
    dataset: Dataset, ranks: int, micro: int, accumulation: int, start: int
) -> None:
    size = ranks * micro * accumulation
    layout = {"global_batch_size": size, "micro_batch_size": micro, "data_size": ranks}
    steps = [take(make(dataset, data_rank=r, start=start, **layout), 2) for r in range(ranks)]
    for number in range(2):
        place = start + number * size
        expected = dataset.batch(np.arange(place, place + size), place)
        ids: dict[int, torch.Tensor] = {}
        for rank in range(ranks):
            step = steps[rank][number]
            assert step.place == place
            assert len(step.micro_batches) == accumulation
            assert step.targets == sum(batch.targets for batch in step.micro_batches)
            for m, batch in enumerate(step.micro_batches):
                assert batch.place == place + (m * ranks + rank) * micro
                for row in range(micro):
                    ids[batch.place + row] = batch.tensors["input_ids"][row]
        assert sorted(ids) == list(range(place, place + size))
        in_order = torch.stack([ids[i] for i in sorted(ids)])
        assert in_order.equal(expected.tensors["input_ids"])
        assert sum(steps[rank][number].targets for rank in range(ranks)) == expected.targets


def test_loader_restarts_identically(dataset: Dataset) -> None:
    whole = take(make(dataset), 6)
    again = take(make(dataset, start=36), 3)
    for one, other in zip(whole[3:], again, strict=True):
        assert one.place == other.place
        assert all(map(same, one.micro_batches, other.micro_batches))


def test_loader_restarts_with_another_layout_and_batch_size(
    dataset: Dataset,
) -> None:
    whole = take(make(dataset, micro_batch_size=12), 4)
    rest = take(make(dataset, start=24, global_batch_size=8, micro_batch_size=8), 3)
    for name in ("input_ids", "labels", "loss_mask", "position_ids", "document_ids"):
        expected = torch.cat([step.micro_batches[0].tensors[name] for step in whole[2:]])
        assert torch.cat([step.micro_batches[0].tensors[name] for step in rest]).equal(expected)


def test_loader_continues_beyond_an_epoch(dataset: Dataset) -> None:
    steps = dataset.num_samples // 12 + 3
    assert [step.place for step in take(make(dataset), steps)] == [12 * i for i in range(steps)]


def test_loader_reads_at_most_prefetch_steps_ahead(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    source_of = Dataset.source_of

    def count(self: Dataset, indices: Any) -> Any:
        steps.append(len(indices))
        return source_of(self, indices)

    monkeypatch.setattr(Dataset, "source_of", count)
    loader = make(dataset, prefetch=3)
    deadline = time.monotonic() + 5
    while len(steps) < 4 and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.05)
    assert len(steps) == 4  # three are in the queue; the thread waits with the fourth
    loader.close()


def test_loader_raises_errors_of_its_thread_again_and_again(memory_shards: Any) -> None:
    source = memory_shards([100], name="disk")
    source.broken_from = 40
    dataset = Dataset(
        [source], [None], sequence_length=10, seed=0, mask_documents=False, shuffle=False
    )
    loader = make(dataset, global_batch_size=2)
    assert [next(loader).place, next(loader).place] == [0, 2]
    for _ in range(2):
        with pytest.raises(OSError, match="disk: cannot read token 40"):
            next(loader)
    loader.close()
    with pytest.raises(OSError, match="disk"):
        next(loader)


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_close_ends_the_thread_and_may_be_repeated(dataset: Dataset, taken: int) -> None:
    before = threading.enumerate()
    loader = make(dataset)
    for _ in range(taken):
        next(loader)
    (thread,) = [thread for thread in threading.enumerate() if thread not in before]
    assert thread.name == "loader"
    loader.close()
    loader.close()
    assert not thread.is_alive()
    assert list(loader) == []


def test_loader_asserts_that_batch_sizes_divide(dataset: Dataset) -> None:
    with pytest.raises(AssertionError):
        make(dataset, global_batch_size=12, micro_batch_size=5)


def test_loader_pins_memory_only_with_cuda(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[int] = []

    def pin(batch: Batch) -> Batch:
        pinned.append(batch.place)
        return batch

    monkeypatch.setattr(Batch, "pin", pin)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    take(make(dataset, pin_memory=True), 1)
    assert pinned == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    take(make(dataset, pin_memory=False), 1)
    assert pinned == []
    take(make(dataset, pin_memory=True), 1)
    assert pinned[:6] == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize("samples", [1, 4, 11, 12, 13])
@pytest.mark.parametrize(("ranks", "micro"), [(1, 4), (3, 2), (4, 1)])
def test_first_batches_read_each_sample_once(
    dataset: Dataset, samples: int, ranks: int, micro: int
) -> None:
    parts = [
        list(
            first_batches(dataset, samples, micro_batch_size=micro, data_rank=rank, data_size=ranks)
        )
        for rank in range(ranks)
    ]
    assert len({len(part) for part in parts}) == 1
    expected = dataset.batch(np.arange(samples), 0)
    targets = 0
    for batch in (batch for part in parts for batch in part):
        assert batch.tensors["input_ids"].shape == (micro, L)
        for row in range(micro):
            mask = batch.tensors["loss_mask"][row]
            if batch.place + row < samples:
                assert mask.equal(expected.tensors["loss_mask"][batch.place + row])
                ids = expected.tensors["input_ids"][batch.place + row]
                assert batch.tensors["input_ids"][row].equal(ids)
            else:
                assert not mask.any()
        assert batch.targets == int(batch.tensors["loss_mask"].sum())
        targets += batch.targets
    assert targets == expected.targets


def test_targets_are_counted_by_the_objective(dataset: Dataset) -> None:
    def count(arrays: Mapping[str, Any]) -> int:
        assert isinstance(arrays["input_ids"], np.ndarray)  # on the host, without torch
        return 100 * len(arrays["input_ids"])

    (step,) = take(make(dataset, count=count), 1)
    assert [batch.targets for batch in step.micro_batches] == [200] * 6
    assert step.targets == 1200
    options = {"micro_batch_size": 2, "data_rank": 0, "data_size": 1}
    counted = first_batches(dataset, 3, count=count, **options)
    assert [batch.targets for batch in counted] == [200, 200]


def test_first_batches_of_no_samples_are_empty(dataset: Dataset) -> None:
    assert list(first_batches(dataset, 0, micro_batch_size=2, data_rank=0, data_size=2)) == []


def test_loader_passes_tensors_on_without_pickling_or_copying(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("pickled")

    produced: list[torch.Tensor] = []
    read = Dataset.read

    def record(self: Dataset, *arguments: Any) -> Batch:
        batch = read(self, *arguments)
        produced.append(batch.tensors["input_ids"])
        return batch

    monkeypatch.setattr(Dataset, "read", record)
    for kind in (Batch, StepBatches, torch.Tensor):
        monkeypatch.setattr(kind, "__reduce_ex__", refuse)
    step = take(make(dataset), 1)[0]
    pointers = [batch.tensors["input_ids"].data_ptr() for batch in step.micro_batches]
    assert pointers == [tensor.data_ptr() for tensor in produced[: len(pointers)]]
    assert multiprocessing.active_children() == []


def test_loader_reads_in_its_thread(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    names = set()
    read = Dataset.read

    def record(self: Dataset, *arguments: Any) -> Batch:
        names.add(threading.current_thread().name)
        return read(self, *arguments)

    monkeypatch.setattr(Dataset, "read", record)
    take(make(dataset), 3)
    assert names == {"loader"}


def test_loader_survives_a_stop_signal(dataset: Dataset) -> None:
    """The handler runs in the main thread, and the batches are those without a signal."""
    expected = take(make(dataset), 6)
    seen: list[str] = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(threading.current_thread().name))
    loader = make(dataset)
    try:
        steps = [next(loader)]
        for _ in range(5):
            os.kill(os.getpid(), signal.SIGTERM)
            steps.append(next(loader))
    finally:
        signal.signal(signal.SIGTERM, before)
        loader.close()
    assert set(seen) == {"MainThread"}
    for one, other in zip(expected, steps, strict=True):
        assert all(map(same, one.micro_batches, other.micro_batches))


def test_loader_of_one_rank_stores_only_its_offsets(dataset: Dataset) -> None:
    """A step has a million sequences over 62,500 ranks; no array of that length is stored."""
    loader = make(
        dataset,
        global_batch_size=1_000_000,
        micro_batch_size=2,
        data_size=62_500,
        data_rank=62_499,
        start=3_000_000,
    )
    assert loader._offsets.base is None
    assert loader._offsets.shape == (8, 2)
    step = take(loader, 1)[0]
    places = [3_000_000 + (m * 62_500 + 62_499) * 2 for m in range(8)]
    assert [batch.place for batch in step.micro_batches] == places
    for batch in step.micro_batches:
        expected = dataset.batch(np.array([batch.place, batch.place + 1]), batch.place)
        assert same(batch, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pages are locked for a GPU only")
def test_pinned_tensors_are_unchanged_on_the_device(dataset: Dataset) -> None:
    plain, pinned = take(make(dataset), 2), take(make(dataset, pin_memory=True), 2)
    for one, other in zip(plain, pinned, strict=True):
        for batch, locked in zip(one.micro_batches, other.micro_batches, strict=True):
            assert all(tensor.is_pinned() for tensor in locked.tensors.values())
            assert same(batch, locked.to("cuda").to("cpu", non_blocking=False))
