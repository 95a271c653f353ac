# covers: megalite/data/packing.py
from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data import Packing, assemble, pack
from tests.helpers.models import loss_of, make_model, model_config

POLICIES = st.sampled_from(["cut", "omit"])


def naive_rooms(lengths: list[int], L: int) -> list[int]:
    """Return the room in each window after best-fit decreasing, one document at a time."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(L - length)
    return sorted(rooms)


def filled(packing: Packing) -> list[int]:
    parts = np.split(packing.lengths, packing.bounds[1:-1])
    return [int(part.sum()) for part in parts] if packing.windows else []


@settings(deadline=None, max_examples=200)
@given(lengths=st.lists(st.integers(0, 60), max_size=60), L=st.integers(1, 40), longer=POLICIES)
def test_pack_puts_every_token_into_one_window(
    lengths: list[int], L: int, longer: Literal["cut", "omit"]
) -> None:
    packing = pack(np.array(lengths, np.int64), L, longer=longer)
    out = [i for i, length in enumerate(lengths) if length > L and longer == "omit"]
    assert packing.omitted.tolist() == out
    placed = {i: np.zeros(length, int) for i, length in enumerate(lengths)}
    pieces = zip(packing.documents, packing.starts, packing.lengths, strict=True)
    for document, start, length in pieces:
        placed[int(document)][start : start + length] += 1
        assert length in (L, lengths[document] - start)  # only a document's last piece is shorter
    for number, counts in placed.items():
        assert (counts == (number not in out)).all()
    assert all(0 < tokens <= L for tokens in filled(packing))
    assert packing.bounds[0] == 0
    assert packing.bounds[-1] == len(packing.documents)
    places = packing.windows * L
    assert packing.padding == pytest.approx(1 - sum(filled(packing)) / places if places else 0)


@settings(deadline=None, max_examples=200)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=80), L=st.integers(40, 70))
def test_pack_equals_best_fit_decreasing(lengths: list[int], L: int) -> None:
    packing = pack(np.array(lengths), L, longer="cut")
    rooms = sorted(L - tokens for tokens in filled(packing))
    assert rooms == naive_rooms(lengths, L)
    assert len(rooms) == 1 or rooms[-1] + rooms[-2] < L  # no two windows would fit into one


def test_pack_gives_the_expected_windows() -> None:
    packing = pack(np.array([3, 8, 2, 5, 0, 25]), 10, longer="cut")
    # 25 is 10 + 10 + 5; then 8 with 2, 5 with 5, 3 alone
    windows = np.split(packing.documents, packing.bounds[1:-1])
    assert sorted(map(tuple, windows)) == [(0,), (1, 2), (3, 5), (5,), (5,)]
    assert packing.padding == pytest.approx(7 / 50)
    packing = pack(np.array([3, 8, 2, 5, 0, 25]), 10, longer="omit")
    assert packing.omitted.tolist() == [5]
    assert packing.windows == 2


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pack_needs_less_padding_than_next_fit(seed: int) -> None:
    lengths = np.random.default_rng(seed).exponential(300, 20_000).astype(np.int64) + 1
    lengths = lengths[lengths <= 2048]
    next_fit, room = 0, 0
    for length in lengths.tolist():
        if length > room:
            next_fit, room = next_fit + 1, 2048
        room -= length
    packing = pack(lengths, 2048, longer="cut")
    other = 1 - lengths.sum() / (next_fit * 2048)
    assert packing.padding < 0.01 < 0.05 < other
    again = pack(lengths, 2048, longer="cut")
    assert np.array_equal(again.documents, packing.documents)


def test_pack_of_nothing_is_empty() -> None:
    for lengths in ([], [0, 0]):
        packing = pack(np.array(lengths, np.int64), 8, longer="cut")
        assert (packing.windows, packing.padding) == (0, 0.0)


def test_assemble_separates_documents() -> None:
    documents = [np.arange(10, 13), np.arange(20, 24), np.arange(30, 39)]
    packing = pack(np.array([3, 4, 9]), 8, longer="cut")
    assert [part.tolist() for part in np.split(packing.documents, packing.bounds[1:-1])] == [
        [2],
        [0, 1, 2],
    ]
    batch = assemble(packing, np.array([1, 0]), documents.__getitem__, 6, pad_id=7)
    assert (batch.place, batch.targets) == (6, 2 + 3 + 8)
    got = {name: tensor.tolist() for name, tensor in batch.tensors.items()}
    assert got["input_ids"] == [[10, 11, 12, 20, 21, 22, 23, 38], [*range(30, 38)]]
    assert got["position_ids"] == [[0, 1, 2, 0, 1, 2, 3, 0], [*range(8)]]
    assert got["document_ids"] == [[0, 0, 0, 1, 1, 1, 1, 2], [0] * 8]
    assert got["loss_mask"] == [[True, True, False, True, True, True, False, False], [True] * 8]
    labels, mask = batch.tensors["labels"], batch.tensors["loss_mask"]
    assert labels[0][mask[0]].tolist() == [11, 12, 21, 22, 23]
    assert labels[1].tolist() == [*range(31, 39)]  # 38 is the first id of the next piece
    assert (labels[~mask] == 7).all()


def test_assemble_makes_padding_a_document_without_targets() -> None:
    packing = pack(np.array([3, 2]), 9, longer="cut")
    documents = [np.array([1, 2, 3]), np.array([4, 5])]
    tensors = assemble(packing, np.array([0]), documents.__getitem__, 0, pad_id=60).tensors
    assert tensors["input_ids"][0].tolist() == [1, 2, 3, 4, 5, 60, 60, 60, 60]
    assert tensors["document_ids"][0].tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert tensors["position_ids"][0, 5:].tolist() == [0, 1, 2, 3]
    assert tensors["loss_mask"][0].tolist() == [True, True, False, True] + [False] * 5


def test_packed_window_has_the_loss_of_its_separate_documents() -> None:
    config = model_config()
    model = make_model(config, spread=0.1)
    numbers = np.random.default_rng(3)
    documents = [numbers.integers(0, 61, size=length) for length in (7, 4, 9, 3)]
    packing = pack(np.array([7, 4, 9, 3]), 16, longer="cut")
    assert packing.windows == 2
    together = assemble(packing, np.arange(2), documents.__getitem__, 0)
    alone = 0.0
    for document in documents:
        single = assemble(
            pack(np.array([len(document)]), 16, longer="cut"),
            np.array([0]),
            lambda _, document=document: document,
            0,
        )
        alone += float(loss_of(model, single.tensors).detach())
    assert torch.isclose(torch.tensor(alone), loss_of(model, together.tensors), rtol=1e-5)
    assert together.targets == 6 + 3 + 8 + 2
