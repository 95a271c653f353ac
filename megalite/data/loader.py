"""Batches on time: a thread reads ahead while the engine computes.

A thread, not a process: tensors are passed on without pickling or copying. A signal to the whole
job kills no reader, because Python runs handlers only in the main thread. The thread spends its
time in system calls and NumPy, which release the interpreter lock.

The place in the data order is the whole state: a loader started at the number of samples consumed
continues exactly where another, of any layout, stopped.

G global_batch_size   B micro_batch_size   R data_size   r data_rank
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from megalite.data.batch import Batch, Count, StepBatches
from megalite.data.order import Ints, leave_out
from megalite.data.samples import Samples

_CLOSE_SECONDS = 30.0  # longer than any healthy read of a few steps


class Loader:
    """Iterator over this rank's part of every step, without end.

    From the samples p to p + G of a step, micro-batch m of rank r takes p + (m R + r) B and the B -
    1 after it: the set of samples of a step is the same for any R and B.

    Args:
        dataset: to read from.
        global_batch_size: G, samples of a step; a multiple of B x R.
        micro_batch_size: B.
        data_rank: r, this rank's place among the data-parallel ones.
        data_size: R, how many of them there are.
        start: the place in the order where the first step begins.
        gaps: places [first, last) of the order that are omitted, ascending and disjoint.
        pin_memory: whether to hand over page-locked tensors (where CUDA is available).
        prefetch: steps held ready.
        count: the objective's count of a batch's targets. None means the labels that count.
    """

    def __init__(
        self,
        dataset: Samples,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        data_rank: int,
        data_size: int,
        start: int,
        pin_memory: bool,
        gaps: Sequence[tuple[int, int]] = (),
        prefetch: int = 2,
        count: Count | None = None,
    ) -> None:
        assert 0 <= data_rank < data_size
        assert global_batch_size % (micro_batch_size * data_size) == 0
        self._dataset = dataset
        self._place = start
        self._step = global_batch_size
        self._gaps = gaps
        self._count = count
        self._offsets = _offsets(global_batch_size, micro_batch_size, data_rank, data_size)
        self._pin = pin_memory and torch.cuda.is_available()
        self._ready: queue.Queue[StepBatches | BaseException] = queue.Queue(prefetch)
        self._closing = threading.Event()
        self._failure: BaseException | None = None
        # A daemon: a read that hangs on a network file system must not keep the process alive.
        self._thread = threading.Thread(target=self._produce, name="loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[StepBatches]:
        return self

    def __next__(self) -> StepBatches:
        """Return the next step's micro-batches; raise what failed in the thread."""
        if self._failure is None and not self._closing.is_set():
            item = self._ready.get()
            if isinstance(item, StepBatches):
                return item
            self._failure = item
        if self._failure is not None:
            raise self._failure
        raise StopIteration

    def close(self) -> None:
        """End the thread and drop what it has ready; closing twice is harmless."""
        self._closing.set()
        deadline = time.monotonic() + _CLOSE_SECONDS
        while self._thread.is_alive() and time.monotonic() < deadline:
            while not self._ready.empty():  # makes room for a thread that waits to put
                self._ready.get_nowait()
            self._thread.join(0.01)

    def _produce(self) -> None:
        try:
            while not self._closing.is_set():
                self._ready.put(self._make_step())
                self._place = advance(self._place, self._step, self._gaps)
        except BaseException as error:  # the consumer's to see, whatever it is
            self._ready.put(error)

    def _make_step(self) -> StepBatches:
        whole = leave_out(self._place + np.arange(self._step), self._place, self._gaps)
        indices = self._dataset.sort_by_length(whole)[self._offsets]
        sources, starts = self._dataset.source_of(indices)  # once a step: a few dozen small calls
        batches = []
        for row in range(len(indices)):
            place = int(indices[row, 0])
            batch = self._dataset.read(sources[row], starts[row], indices[row], place)
            batch = batch.with_targets(self._count) if self._count else batch
            batches.append(batch.pin() if self._pin else batch)
        targets, tokens = (sum(getattr(b, n) for b in batches) for n in ("targets", "tokens"))
        return StepBatches(self._place, batches, targets, tokens)


def advance(place: int, samples: int, gaps: Sequence[tuple[int, int]]) -> int:
    """Return the place in the order that follows `samples` further samples."""
    last = np.array([place + samples - 1], dtype=np.int64)
    return int(leave_out(last, place, gaps)[0]) + 1


def first_batches(
    dataset: Samples,
    samples: int,
    *,
    micro_batch_size: int,
    data_rank: int,
    data_size: int,
    count: Count | None = None,
) -> Iterator[Batch]:
    """Yield this rank's part of the first `samples`, for an evaluation.

    Every rank gets the same number of batches of the same shape, so that ranks stay in step and
    nothing is compiled again; samples beyond the last are copies of it that do not count.

    Args:
        count: the objective's count of a batch's targets. None means the labels that count.
    """
    step = micro_batch_size * data_size
    padded = -(-samples // step) * step
    order = dataset.sort_by_length(np.arange(samples))
    for offsets in _offsets(padded, micro_batch_size, data_rank, data_size):
        batch = dataset.batch(order[np.minimum(offsets, samples - 1)], int(offsets[0]))
        if offsets[-1] >= samples:
            batch = batch.first(max(0, samples - int(offsets[0])))
        yield batch.with_targets(count) if count else batch


def _offsets(samples: int, micro_batch_size: int, data_rank: int, data_size: int) -> Ints:
    """Return which of `samples` consecutive samples this rank reads: [micro-batches, B]."""
    step = micro_batch_size * data_size
    firsts = np.arange(data_rank * micro_batch_size, samples, step)
    return firsts[:, None] + np.arange(micro_batch_size)
