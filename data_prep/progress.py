"""Log lines on the progress of all workers of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from data_prep.streams import Stream
from data_prep.work_folder import PrepRun
from megalite.errors import DataError
from megalite.files import repeating
from megalite.log import logger

_LOG_SECONDS = 5.0
_POLL_SECONDS = 1.0


@contextmanager
def log_progress(run: PrepRun, streams: Sequence[Stream], limit: int) -> Iterator[None]:
    """Log the progress of a run every few seconds and at the end.

    Stop the run if all workers together have more than `limit` bad records.
    """
    size = sum(stream.size for stream in streams)
    began = reported = time.monotonic()

    def look() -> None:
        nonlocal reported
        reports = run.reports()
        if (bad := _sum(reports, "bad_records")) > limit:
            run.fail(
                DataError(
                    f"{bad} bad records, more than --max-bad-records {limit} allows: fix the "
                    "input, or allow more; the first ones are named above"
                )
            )
        if time.monotonic() - reported >= _LOG_SECONDS:
            reported = time.monotonic()
            _report(reports, size, reported - began)

    with repeating(look, every=_POLL_SECONDS):
        yield
    _report_end(run.reports())


def _report(reports: Sequence[dict[str, Any]], size: int, seconds: float) -> None:
    text = _sum(reports, "bytes")
    covered = _sum(reports, "covered")
    share = min(1.0, covered / size) if size else 0.0
    left = f", {share:.0%}, {_time(seconds * (1 - share) / share)} left" if share > 0 else ""
    megabytes = text / 1e6
    counts = (
        f"{_documents(reports)}, {megabytes:.1f} MB of text, {_sum(reports, 'tokens'):,} tokens"
    )
    logger.info("so far: %s, %.2f MB/s%s", counts, megabytes / seconds, left)


def _report_end(reports: Sequence[dict[str, Any]]) -> None:
    active = [report for report in reports if report["ended"]]
    if not active:
        return  # an earlier run has done all parts
    seconds = max(r["ended"] for r in active) - min(r["began"] for r in active)
    megabytes = _sum(active, "bytes") / 1e6
    per_second = 1 / max(seconds, 1e-9)
    rates = (
        f"{megabytes * per_second:.2f} MB/s, {_sum(active, 'tokens') * per_second:,.0f} tokens/s"
    )
    counts = _documents(active)
    logger.info("all: %s; encoded %.1f MB in %.2f s (%s)", counts, megabytes, seconds, rates)


def _documents(reports: Sequence[dict[str, Any]]) -> str:
    count = _sum(reports, "documents")
    return f"{count:,} document{'' if count == 1 else 's'}"


def _sum(reports: Sequence[dict[str, Any]], key: str) -> int:
    return int(sum(report[key] for report in reports))


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
