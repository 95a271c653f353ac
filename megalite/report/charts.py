"""Curves as numbers on a plane of 360 by 210: scales, ticks, and as few points as show the
same curve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from megalite.report.record import Record

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 210, 52, 350, 10, 182
_POINTS, _SMOOTHED_POINTS, _MARKS, _DOTS = 1000, 250, 40, 40
_SMOOTHED_FROM, _PART = 40, 40  # rows; the mean is over a fortieth of them
_WIDE = 3  # times the least value: from there on a scale is logarithmic
_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Panel:
    """One chart: a column of the train or valid rows by step or by tokens.

    Attributes:
        wide: logarithmic where the values spread widely.
        zero: the scale begins at 0.
    """

    title: str
    column: str
    unit: str = ""
    by: str = "step"
    valid: bool = False
    scale: float = 1.0
    smooth: bool = False
    wide: bool = False
    zero: bool = False


PANELS = (
    Panel("Train loss", "loss", smooth=True, wide=True),
    Panel("Train loss", "loss", by="tokens", smooth=True, wide=True),
    Panel("Valid loss", "loss", valid=True, wide=True),
    Panel("Valid accuracy", "accuracy", "%", valid=True, scale=100),
    Panel("Valid F1", "f1", "%", valid=True, scale=100),
    Panel("Learning rate", "lr", zero=True),
    Panel("Gradient norm", "grad_norm", smooth=True, wide=True),
    Panel("Tokens a second", "tokens_per_second", smooth=True, zero=True),
    Panel("Peak memory of a rank", "peak_memory_bytes", "GiB", scale=2**-30, zero=True),
    Panel("Model FLOPs utilisation", "mfu", "%", scale=100, smooth=True, zero=True),
)


def compact(value: float) -> str:
    """`0.0003`, `12.5`, `250k`, `1.2B`: six digits at most."""
    for size, sign in _UNITS:
        if abs(value) >= size:
            return f"{value / size:.6g}{sign}"
    return f"{value:.6g}"


def thin(values: Numbers, most: int = _POINTS) -> npt.NDArray[np.int64]:
    """Places of at most some `most` values, with the least and the largest of every stretch."""
    count = len(values)
    if count <= most:
        return np.arange(count)
    places = {0, count - 1}
    for first, last in pairwise(np.linspace(0, count, most // 2, dtype=int).tolist()):
        part = values[first:last]
        if np.isnan(part).all():
            places.add(first)  # the gap stays one
        else:
            places |= {first + int(np.nanargmin(part)), first + int(np.nanargmax(part))}
    return np.array(sorted(places))


def smoothed(values: Numbers, *, wide: bool = False) -> Numbers:
    """Return the mean over a fortieth of the values around each, geometric if `wide`; NaN where it
    is.
    """
    half = max(1, len(values) // _PART // 2)
    known = ~np.isnan(values)
    parts = np.where(known, np.log(values) if wide else values, 0.0)
    sums, counts = (np.concatenate([[0.0], np.cumsum(one)]) for one in (parts, known))
    places = np.arange(len(values))
    first = np.maximum(places - half, 0)
    last = np.minimum(places + half + 1, len(values))
    mean = (sums[last] - sums[first]) / np.maximum(counts[last] - counts[first], 1)
    return np.where(known, np.exp(mean) if wide else mean, np.nan)


def ticks(low: float, high: float, count: int, *, wide: bool = False) -> list[float]:
    """Some `count` round numbers between two others; powers of ten if a scale has several."""
    if wide and high / low > 10:
        tens = [10.0**p for p in range(math.ceil(math.log10(low)), math.ceil(math.log10(high)))]
        if len(tens) > 1:
            return tens[:: math.ceil(len(tens) / 6)]
        return [
            m * ten for ten in (tens[0] / 10, *tens) for m in (1, 2, 5) if low <= m * ten <= high
        ]
    least = (high - low) / (2 * count if wide else count)  # they crowd at its end
    power = 10.0 ** math.floor(math.log10(least))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= least)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


@dataclass(frozen=True)
class Axis:
    """From values to places: `first` is where `low` is, `last` where `high` is."""

    low: float
    high: float
    first: float
    last: float
    wide: bool = False

    def __call__(self, values: Numbers) -> Numbers:
        low, high = (math.log10(end) if self.wide else end for end in (self.low, self.high))
        along = (np.log10(values) if self.wide else values) - low
        found: Numbers = self.first + along / (high - low) * (self.last - self.first)
        return found

    def ticks(self, count: int) -> list[tuple[float, str]]:
        values = ticks(self.low, self.high, count, wide=self.wide)
        places = self(np.array(values)).round(1).tolist()
        return list(zip(places, map(compact, values), strict=True))


def _axis(parts: Sequence[Numbers], first: float, last: float, panel: Panel | None = None) -> Axis:
    values = np.concatenate(parts)
    values = values[~np.isnan(values)]
    low, high = float(values.min()), float(values.max())
    if panel and panel.wide and low > 0 and high > _WIDE * low:
        return Axis(low / 1.1, high * 1.1, first, last, wide=True)
    if panel:
        room = 0.05 * (high - low)
        low = min(0.0, low) if panel.zero else low - room
        high = high + room
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = max(0.05 * max(abs(high), abs(low)), 0.0 if panel and high else 1.0)
        low = low - room
        high = high + room
    return Axis(low, high, first, last)


def chart(panel: Panel, records: Sequence[Record]) -> dict[str, Any] | None:
    """Return a panel with the curve of each run that has one; None if none has."""
    found: list[tuple[int, Numbers, Numbers]] = []
    for index, record in enumerate(records):
        track = record.valid if panel.valid else record.train
        x = np.array(track.steps if panel.by == "step" else track.columns[panel.by])
        y = np.array(track.columns[panel.column]) * panel.scale
        x, y = x[~np.isnan(x)], y[~np.isnan(x)]
        if len(y) and not np.isnan(y).all():
            found.append((index, x, y))
    if not found:
        return None
    across = _axis([x for _, x, _ in found], LEFT, RIGHT)
    up = _axis([y for *_, y in found], BOTTOM, TOP, panel)
    return {
        "panel": panel,
        "x": across,
        "y": up,
        "curves": [_curve(panel, *one, across=across, up=up) for one in found],
    }


def _curve(panel: Panel, index: int, x: Numbers, y: Numbers, *, across: Axis, up: Axis) -> Any:
    at = thin(y)
    lines = {"raw": _line(x[at], y[at], across, up)}
    if panel.smooth and len(y) >= _SMOOTHED_FROM:
        count = min(len(y), _SMOOTHED_POINTS)
        at = np.linspace(0, len(y) - 1, count).round().astype(int)
        lines["smooth"] = _line(x[at], smoothed(y, wide=up.wide)[at], across, up)
    known = y[~np.isnan(y)].tolist()
    gaps = np.flatnonzero(np.isnan(y))
    gaps = gaps[:: math.ceil(len(gaps) / _MARKS) or 1]
    dots = len(known) <= _DOTS
    return {
        "index": index,
        "told": f"from {known[0]:.4g} to {known[-1]:.4g}, {min(known):.4g} to {max(known):.4g}",
        "lines": lines,
        "dots": "".join(f"M{a} {b}h0" for a, b in _places(x, y, across, up)) if dots else "",
        "gaps": [round(place, 1) for place in across(x[gaps]).tolist()],
    }


def _places(x: Numbers, y: Numbers, across: Axis, up: Axis) -> list[tuple[float, float]]:
    places = zip(across(x).round(1).tolist(), up(y).round(1).tolist(), strict=True)
    return [(a, b) for a, b in places if not math.isnan(b)]


def _line(x: Numbers, y: Numbers, across: Axis, up: Axis) -> dict[str, str]:
    """Return a path, broken where values are missing, and its values for whoever points at it."""
    breaks = np.flatnonzero(np.isnan(y))
    path = ""
    for part in np.split(np.arange(len(y)), breaks):
        places = _places(x[part], y[part], across, up)
        if places:  # a single one is a dot: round ends show it
            path += "M" + "L".join(f"{a} {b}" for a, b in places) + "h0" * (len(places) == 1)
    known = ~np.isnan(y)
    return {
        "path": path,
        "x": " ".join(f"{value:.10g}" for value in x[known].tolist()),
        "y": " ".join(f"{value:.5g}" for value in y[known].tolist()),
    }
