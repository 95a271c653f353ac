"""Progress messages of a long command: one at once, then every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from megalite.log import logger
from megalite.observe.console import format_duration

_EVERY = 5.0  # seconds
_P = ParamSpec("_P")
_R = TypeVar("_R")


def report_calls(
    function: Callable[_P, _R],
    *,
    total: int,
    what: str,
    clock: Callable[[], float] = time.monotonic,
) -> Callable[_P, _R]:
    """Wrap `function`: every 5 seconds, log how many of `total` calls are done.

    The first message comes at once. On ranks other than 0 the logger drops the messages.

    Args:
        what: beginning of the messages.
    """
    done = 0
    began = clock()
    reported = began
    logger.info("%s: 0 of %d batches", what, total)

    def counted(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        nonlocal done, reported
        result = function(*args, **kwargs)
        done += 1
        now = clock()
        if now - reported >= _EVERY and done < total:
            left = (now - began) / done * (total - done)
            logger.info("%s: %d of %d batches, left %s", what, done, total, format_duration(left))
            reported = now
        return result

    return counted
