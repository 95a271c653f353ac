"""Packing of documents into windows with little padding, without splitting those that fit.

Best-fit decreasing places documents from the longest to the shortest, each in the fullest window
with room for it. See Ding et al. 2024, "Fewer Truncations Improve Language Modeling".
Fine-tuning uses packing, because splitting would spoil examples. Pretraining reads a stream
(`megalite.data.dataset`).

B samples   L length
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from megalite.data.batch import Batch
from megalite.data.order import Ints

Tokens = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Packing:
    """Assignment of documents, or pieces of long ones, to windows.

    Attributes:
        length: L, tokens of every window.
        bounds: int64 [windows + 1]; window w has the pieces bounds[w] to bounds[w + 1].
        documents: int64 [pieces], the document of each piece.
        starts: int64 [pieces], each piece's first token in its document.
        lengths: int64 [pieces], tokens of each piece.
        omitted: the documents that are in no window.
    """

    length: int
    bounds: Ints
    documents: Ints
    starts: Ints
    lengths: Ints
    omitted: Ints

    @property
    def windows(self) -> int:
        return len(self.bounds) - 1

    @property
    def padding(self) -> float:
        """The fraction of padding in the windows."""
        positions = self.windows * self.length
        return 1 - int(self.lengths.sum()) / positions if positions else 0.0


def pack(lengths: Ints, length: int, *, longer: Literal["cut", "omit"]) -> Packing:
    """Pack documents into few windows by best-fit decreasing.

    Documents of one length go to all windows with the same room in one step. So there is at most
    one step for each document after the sort, and mostly far fewer.

    Args:
        lengths: tokens of each document. Empty documents are in no window and do not count as
            omitted.
        length: L, tokens of a window.
        longer: "cut" splits documents of more than L tokens into pieces of L tokens and a rest.
            "omit" omits them.
    """
    assert length > 0
    assert np.all(lengths >= 0)
    is_omitted = (lengths > length) & (longer == "omit")
    packed = np.where(is_omitted, 0, lengths)
    documents = np.repeat(np.arange(len(packed)), -(-packed // length))
    starts = _count_within(documents) * length
    pieces = np.minimum(packed[documents] - starts, length)
    order = np.argsort(-pieces, kind="stable")
    window = np.empty_like(pieces)
    window[order] = _best_fit(pieces[order], length)
    order = np.argsort(window, kind="stable")  # keeps the documents' order within a window
    bounds = np.concatenate([[0], np.cumsum(np.bincount(window))])
    return Packing(
        length,
        bounds,
        documents=documents[order],
        starts=starts[order],
        lengths=pieces[order],
        omitted=np.flatnonzero(is_omitted),
    )


def assemble(
    packing: Packing,
    windows: Ints,
    tokens: Callable[[int], Tokens],
    place: int,
    *,
    pad_id: int = 0,
    loss_mask: Callable[[int], npt.NDArray[np.bool_]] | None = None,
) -> Batch:
    """Return windows as a batch whose documents are masked from each other.

    Positions restart with each piece. The last token of a document has no target. Padding is a
    separate document without targets.

    Args:
        windows: int64 [B], numbers of windows.
        tokens: function that returns the ids of a document by its number.
        place: the first window's position in the data order.
        loss_mask: function that returns which tokens of a document are targets. None means all.
    """
    shape = (len(windows), L := packing.length)
    names = ("input_ids", "labels", "position_ids", "document_ids")
    arrays = {name: np.zeros(shape, np.int64) for name in names}
    mask = np.zeros(shape, np.bool_)
    arrays["input_ids"][:] = arrays["labels"][:] = pad_id
    for row, window in enumerate(windows.tolist()):
        low, high = packing.bounds[window : window + 2].tolist()
        column = 0
        for number, piece in enumerate(range(low, high)):
            start = int(packing.starts[piece])
            count = int(packing.lengths[piece])
            ids = tokens(int(packing.documents[piece]))[start : start + count + 1]
            columns = slice(column, column + count)
            with_target = slice(column, column + len(ids) - 1)
            arrays["input_ids"][row, columns] = ids[:count]
            arrays["labels"][row, with_target] = ids[1:]  # may end with the next piece's first id
            mask[row, with_target] = True
            if loss_mask is not None:
                is_target = loss_mask(int(packing.documents[piece]))
                mask[row, with_target] = is_target[start + 1 : start + len(ids)]
            arrays["position_ids"][row, columns] = np.arange(count)
            arrays["document_ids"][row, columns] = number
            column += count
        arrays["position_ids"][row, column:] = np.arange(L - column)
        arrays["document_ids"][row, column:] = high - low
    low = packing.bounds[windows]
    high = packing.bounds[windows + 1]
    total = sum(int(packing.lengths[a:b].sum()) for a, b in zip(low, high, strict=True))
    return Batch.of(arrays | {"loss_mask": mask}, place, total)


def _best_fit(lengths: Ints, length: int) -> Ints:
    """Return the window of each piece.

    A window that takes a piece stays the fullest one for pieces of that length. So it takes as many
    as fit, and all windows with the same room do so in one step.

    Args:
        lengths: tokens of each piece, 1 to `length`, in descending order.
    """
    window = np.empty_like(lengths)
    classes: dict[int, list[Ints]] = {}  # windows by their room
    open_rooms = 0  # bit r is set if there are windows with room r
    opened = 0
    edges = np.flatnonzero(np.diff(lengths, prepend=-1, append=-1))
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        need = int(lengths[low])
        while low < high:
            fitting = open_rooms >> need
            if fitting:
                room = need + (fitting & -fitting).bit_length() - 1
                groups = classes.pop(room)
                open_rooms ^= 1 << room
                group = np.concatenate(groups) if len(groups) > 1 else groups[0]
            else:
                room = length
                group = np.arange(opened, opened - (low - high) // (length // need))
                opened += len(group)
            fits = room // need
            placed = min(high - low, fits * len(group))
            full, rest = divmod(placed, fits)
            window[low : low + placed] = np.repeat(group[: full + 1], fits)[:placed]
            low += placed
            after = (
                (group[:full], room - fits * need),
                (group[full : full + 1] if rest else group[:0], room - rest * need),
                (group[full + (rest > 0) :], room),
            )
            for members, left in after:
                if left and members.size:
                    classes.setdefault(left, []).append(members)
                    open_rooms |= 1 << left
    return window


def _count_within(sorted_numbers: Ints) -> Ints:
    """Return the number of equal numbers before each one."""
    firsts = np.flatnonzero(np.diff(sorted_numbers, prepend=-1))
    counts = np.diff(firsts, append=len(sorted_numbers))
    return np.arange(len(sorted_numbers)) - np.repeat(firsts, counts)
