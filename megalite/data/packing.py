"""Documents packed into windows with little left empty, and without cutting those that fit.

Best-fit decreasing: the longest document goes first, each into the fullest window that still holds
it (Ding et al. 2024, "Fewer Truncations Improve Language Modeling"). Fine-tuning uses it, because
a document cut in two spoils an example; pretraining reads the stream (`megalite.data.dataset`).

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
    """Assignment of pieces of documents to windows.

    length: L, of every window, in tokens.
    bounds: int64 [windows + 1]: pieces bounds[w] to bounds[w + 1] are those of window w, in order.
    documents, starts, lengths: int64 [pieces]; a piece is a whole document unless that was cut.
    left_out: the documents in no window.
    """

    length: int
    bounds: Ints
    documents: Ints
    starts: Ints
    lengths: Ints
    left_out: Ints

    @property
    def windows(self) -> int:
        return len(self.bounds) - 1

    @property
    def padding(self) -> float:
        """Share of the windows' places that hold no token."""
        places = self.windows * self.length
        return 1 - int(self.lengths.sum()) / places if places else 0.0


def pack(lengths: Ints, length: int, *, longer: Literal["cut", "omit"]) -> Packing:
    """Pack documents into as few windows as best-fit decreasing finds.

    Documents of one length go into all windows with the same room together: after the sort at most
    one step a document, and mostly far fewer, each of which looks at L bits.

    Args:
        lengths: tokens of each document; those without any are in no window and not omitted.
        length: L, tokens of a window.
        longer: documents of more than L tokens are cut into pieces of L and a rest, which is packed
            like a document, or omitted.
    """
    assert length > 0
    assert np.all(lengths >= 0)
    out = (lengths > length) & (longer == "omit")
    kept = np.where(out, 0, lengths)
    documents = np.repeat(np.arange(len(kept)), -(-kept // length))
    starts = _count_within(documents) * length
    pieces = np.minimum(kept[documents] - starts, length)
    order = np.argsort(-pieces, kind="stable")
    window = np.empty_like(pieces)
    window[order] = _best_fit(pieces[order], length)
    order = np.argsort(window, kind="stable")  # in a window, pieces lie in the documents' order
    bounds = np.concatenate([[0], np.cumsum(np.bincount(window))])
    return Packing(
        length,
        bounds,
        documents=documents[order],
        starts=starts[order],
        lengths=pieces[order],
        left_out=np.flatnonzero(out),
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
    """Return windows as a batch, shaped like a batch of pretraining, whose documents are separate.

    Positions restart with each piece, attention stays within it, the last token of a document has
    no target. Padding is a document of its own, of `pad_id`, and counts nowhere.

    Args:
        windows: int64 [B], numbers of windows.
        tokens: the ids of a document, by its number.
        place: of the first window in the order of training.
        loss_mask: which tokens of a document are learned, by its number. None means all.
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
            here = slice(column, column + count)
            counted = slice(column, column + len(ids) - 1)
            arrays["input_ids"][row, here] = ids[:count]
            arrays["labels"][row, counted] = ids[1:]  # a cut piece's last target is in the next one
            mask[row, counted] = True
            if loss_mask is not None:
                is_learned = loss_mask(int(packing.documents[piece]))
                mask[row, counted] = is_learned[start + 1 : start + len(ids)]
            arrays["position_ids"][row, here] = np.arange(count)
            arrays["document_ids"][row, here] = number
            column += count
        arrays["position_ids"][row, column:] = np.arange(L - column)
        arrays["document_ids"][row, column:] = high - low
    low = packing.bounds[windows]
    high = packing.bounds[windows + 1]
    held = sum(int(packing.lengths[a:b].sum()) for a, b in zip(low, high, strict=True))
    return Batch.of(arrays | {"loss_mask": mask}, place, held)


def _best_fit(lengths: Ints, length: int) -> Ints:
    """Return the window of each piece; `lengths` fall and lie in 1 to `length`.

    After the fullest window takes a piece, it is still the fullest one that holds another of that
    length, if any is: so it takes as many as it has room for, and all windows with the same room do
    so in one go.
    """
    window = np.empty_like(lengths)
    classes: dict[int, list[Ints]] = {}  # windows by their room
    open_rooms = 0  # bit r: there are windows with room r
    opened = 0
    edges = np.flatnonzero(np.diff(lengths, prepend=-1, append=-1))
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        need = int(lengths[low])
        while low < high:
            fitting = open_rooms >> need
            if fitting:
                room = need + (fitting & -fitting).bit_length() - 1
                found = classes.pop(room)
                open_rooms ^= 1 << room
                group = np.concatenate(found) if len(found) > 1 else found[0]
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
    """Return how many equal numbers stand before each one."""
    firsts = np.flatnonzero(np.diff(sorted_numbers, prepend=-1))
    counts = np.diff(firsts, append=len(sorted_numbers))
    return np.arange(len(sorted_numbers)) - np.repeat(firsts, counts)
