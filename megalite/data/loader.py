"""The loader of batches, which reads ahead in a thread while the engine computes.

A thread passes tensors on without pickling or copying. A signal to the job kills no reader, because
Python runs handlers only in the main thread. The thread spends its time in system calls and NumPy,
which release the GIL.

The only state is the position in the data order. A loader that starts at the number of consumed
samples continues exactly where another one stopped, on any layout.

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
from megalite.data.order import Ints, skip_gaps
from megalite.data.samples import Samples

_CLOSE_SECONDS = 30.0  # longer than a read of a few steps on a healthy disk


class Loader:
    """Endless iterator over this rank's micro-batches of every step.

    A step reads the samples p to p + G. Micro-batch m of rank r takes the B samples from
    p + (m R + r) B on. So the samples of a step do not depend on R and B.

    Args:
        dataset: the data set to read from.
        global_batch_size: G, samples of a step; a multiple of B x R.
        micro_batch_size: B.
        data_rank: r, this rank's number among the data-parallel ranks.
        data_size: R, the number of data-parallel ranks.
        start: the first step's position in the data order.
        gaps: ranges [first, last) of the data order to skip, ascending and disjoint.
        pin_memory: whether to return page-locked tensors if CUDA is available.
        prefetch: number of steps to read ahead.
        count: the objective's count of a batch's targets. None means the number of labels in the
            loss mask.
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
        # A daemon thread, because a read that hangs on a network file system must not keep the
        # process alive.
        self._thread = threading.Thread(target=self._produce, name="loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[StepBatches]:
        return self

    def __next__(self) -> StepBatches:
        """Return the next step's micro-batches, or raise the exception of the thread."""
        if self._failure is None and not self._closing.is_set():
            item = self._ready.get()
            if isinstance(item, StepBatches):
                return item
            self._failure = item
        if self._failure is not None:
            raise self._failure
        raise StopIteration

    def close(self) -> None:
        """End the thread and drop its batches. A second call does nothing."""
        self._closing.set()
        deadline = time.monotonic() + _CLOSE_SECONDS
        while self._thread.is_alive() and time.monotonic() < deadline:
            while not self._ready.empty():  # the thread may be waiting for room in the queue
                self._ready.get_nowait()
            self._thread.join(0.01)

    def _produce(self) -> None:
        try:
            while not self._closing.is_set():
                self._ready.put(self._make_step())
                self._place = advance(self._place, self._step, self._gaps)
        except BaseException as error:  # `__next__` raises it
            self._ready.put(error)

    def _make_step(self) -> StepBatches:
        samples = skip_gaps(self._place + np.arange(self._step), self._place, self._gaps)
        indices = self._dataset.sort_by_length(samples)[self._offsets]
        sources, starts = self._dataset.source_of(indices)  # one call for all micro-batches
        batches = []
        for row in range(len(indices)):
            place = int(indices[row, 0])
            batch = self._dataset.read(sources[row], starts[row], indices[row], place)
            batch = batch.with_targets(self._count) if self._count else batch
            batches.append(batch.pin() if self._pin else batch)
        targets, tokens = (sum(getattr(b, n) for b in batches) for n in ("targets", "tokens"))
        return StepBatches(self._place, batches, targets, tokens)


def advance(place: int, samples: int, gaps: Sequence[tuple[int, int]]) -> int:
    """Return the position in the data order after `samples` more samples."""
    last = np.array([place + samples - 1], dtype=np.int64)
    return int(skip_gaps(last, place, gaps)[0]) + 1


def first_batches(
    dataset: Samples,
    samples: int,
    *,
    micro_batch_size: int,
    data_rank: int,
    data_size: int,
    count: Count | None = None,
) -> Iterator[Batch]:
    """Yield this rank's batches of the first `samples` samples, for an evaluation.

    Every rank gets the same number of batches of the same shape, so that ranks stay in step and
    nothing is recompiled. The missing samples are masked copies of the last one.

    Args:
        count: as in `Loader`.
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
    """Return the offsets of this rank's samples among `samples`: [micro-batches, B]."""
    step = micro_batch_size * data_size
    firsts = np.arange(data_rank * micro_batch_size, samples, step)
    return firsts[:, None] + np.arange(micro_batch_size)
