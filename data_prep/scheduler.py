"""Choice of the part that a worker encodes next."""

from __future__ import annotations

from collections.abc import Sequence

from data_prep.part_files import part_name
from data_prep.streams import Stream
from data_prep.work_folder import PrepRun


class PartScheduler:
    """Choice of the parts that a worker claims.

    Workers start at different parts of the input, so that they rarely compete. The worker that
    started a compressed file continues it. Others help only if nothing else is left.

    Args:
        start: where to start, as a fraction of the input in [0, 1).
    """

    def __init__(self, run: PrepRun, streams: Sequence[Stream], keys: Sequence[str], start: float):
        self._run = run
        self._streams = streams
        self._keys = keys
        places = [
            (number, part)
            for number, stream in enumerate(streams)
            for part in (range(stream.parts) if stream.parts is not None else (None,))
        ]
        first = int(start * len(places))
        self._places = iter(places[first:] + places[:first])
        self._open = [number for number, stream in enumerate(streams) if stream.parts is None]
        self._tried = dict.fromkeys(self._open, -1)
        self._reading: int | None = None

    def take(self) -> tuple[int, int] | None:
        """Claim a part and return the numbers of its stream and of the part, or None at the end."""
        if self._reading is not None and (claimed := self._next_of(self._reading)):
            return claimed
        for number, part in self._places:
            if self._claim(number, part or 0):
                self._reading = None if part is not None else number
                return number, part or 0
        for number in self._open:
            if claimed := self._next_of(number):
                self._reading = number
                return claimed
        return None

    def _next_of(self, number: int) -> tuple[int, int] | None:
        while True:
            part = self._tried[number] + 1
            if (last := self._run.last(self._keys[number])) is not None and part > last:
                return None
            self._tried[number] = part
            if self._claim(number, part):
                return number, part

    def _claim(self, number: int, part: int) -> bool:
        if number in self._tried:
            self._tried[number] = max(self._tried[number], part)
        return self._run.claim(part_name(self._keys[number], part))
