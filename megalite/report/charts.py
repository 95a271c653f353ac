"""Charts as SVG coordinates, 360 by 210: scales, ticks and downsampled curves."""

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
_SMOOTHED_FROM, _PART = 40, 40  # minimum rows to smooth; the mean is over a fortieth of them
_WIDE = 3  # ratio of maximum to minimum above which a scale is logarithmic
_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Panel:
    """A chart: one column of the train or valid rows, by step or by tokens.

    Attributes:
        valid: if true, the column is of valid rows.
        scale: factor from the row's value to `unit`.
        smooth: whether to draw a smoothed curve as well.
        wide: whether the scale may be logarithmic, if the values spread widely.
        zero: whether the scale begins at 0.
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
    Panel("Tokens per second", "tokens_per_second", smooth=True, zero=True),
    Panel("Peak memory per rank", "peak_memory_bytes", "GiB", scale=2**-30, zero=True),
    Panel("Model FLOPs utilization", "mfu", "%", scale=100, smooth=True, zero=True),
)


def compact(value: float) -> str:
    """Format a number to at most six digits: `0.0003`, `12.5`, `250k`, `1.2B`."""
    for size, sign in _UNITS:
        if abs(value) >= size:
            return f"{value / size:.6g}{sign}"
    return f"{value:.6g}"


def thin(values: Numbers, limit: int = _POINTS) -> npt.NDArray[np.int64]:
    """Return about `limit` indices: the minimum and the maximum of every interval."""
    count = len(values)
    if count <= limit:
        return np.arange(count)
    indices = {0, count - 1}
    for first, last in pairwise(np.linspace(0, count, limit // 2, dtype=int).tolist()):
        part = values[first:last]
        if np.isnan(part).all():
            indices.add(first)  # a gap stays a gap
        else:
            indices |= {first + int(np.nanargmin(part)), first + int(np.nanargmax(part))}
    return np.array(sorted(indices))


def smoothed(values: Numbers, *, wide: bool = False) -> Numbers:
    """Return the moving mean over a fortieth of the values. NaN stays NaN.

    Args:
        wide: if true, use the geometric mean.
    """
    half = max(1, len(values) // _PART // 2)
    known = ~np.isnan(values)
    parts = np.where(known, np.log(values) if wide else values, 0.0)
    sums, counts = (np.concatenate([[0.0], np.cumsum(one)]) for one in (parts, known))
    indices = np.arange(len(values))
    first = np.maximum(indices - half, 0)
    last = np.minimum(indices + half + 1, len(values))
    mean = (sums[last] - sums[first]) / np.maximum(counts[last] - counts[first], 1)
    return np.where(known, np.exp(mean) if wide else mean, np.nan)


def ticks(low: float, high: float, count: int, *, wide: bool = False) -> list[float]:
    """Return about `count` round numbers from `low` to `high`.

    Args:
        wide: whether the scale is logarithmic. Powers of ten are used if it spans several.
    """
    if wide and high / low > 10:
        tens = [10.0**p for p in range(math.ceil(math.log10(low)), math.ceil(math.log10(high)))]
        if len(tens) > 1:
            return tens[:: math.ceil(len(tens) / 6)]
        return [
            m * ten for ten in (tens[0] / 10, *tens) for m in (1, 2, 5) if low <= m * ten <= high
        ]
    least = (high - low) / (
        2 * count if wide else count
    )  # on a logarithmic scale, ticks crowd at the end
    power = 10.0 ** math.floor(math.log10(least))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= least)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


@dataclass(frozen=True)
class Axis:
    """Map from values to coordinates: `low` to `first`, `high` to `last`."""

    low: float
    high: float
    first: float
    last: float
    wide: bool = False

    def __call__(self, values: Numbers) -> Numbers:
        low, high = (math.log10(end) if self.wide else end for end in (self.low, self.high))
        along = (np.log10(values) if self.wide else values) - low
        coordinates: Numbers = self.first + along / (high - low) * (self.last - self.first)
        return coordinates

    def ticks(self, count: int) -> list[tuple[float, str]]:
        """Return about `count` ticks: coordinate and label."""
        values = ticks(self.low, self.high, count, wide=self.wide)
        coordinates = self(np.array(values)).round(1).tolist()
        return list(zip(coordinates, map(compact, values), strict=True))


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
    """Return a panel with the curves of all runs. None if no run has the column."""
    curves: list[tuple[int, Numbers, Numbers]] = []
    for index, record in enumerate(records):
        track = record.valid if panel.valid else record.train
        x = np.array(track.steps if panel.by == "step" else track.columns[panel.by])
        y = np.array(track.columns[panel.column]) * panel.scale
        x, y = x[~np.isnan(x)], y[~np.isnan(x)]
        if len(y) and not np.isnan(y).all():
            curves.append((index, x, y))
    if not curves:
        return None
    across = _axis([x for _, x, _ in curves], LEFT, RIGHT)
    up = _axis([y for *_, y in curves], BOTTOM, TOP, panel)
    return {
        "panel": panel,
        "x": across,
        "y": up,
        "curves": [_curve(panel, *one, across=across, up=up) for one in curves],
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
        "range": f"from {known[0]:.4g} to {known[-1]:.4g}, {min(known):.4g} to {max(known):.4g}",
        "lines": lines,
        "dots": "".join(f"M{a} {b}h0" for a, b in _points(x, y, across, up)) if dots else "",
        "gaps": [round(position, 1) for position in across(x[gaps]).tolist()],
    }


def _points(x: Numbers, y: Numbers, across: Axis, up: Axis) -> list[tuple[float, float]]:
    points = zip(across(x).round(1).tolist(), up(y).round(1).tolist(), strict=True)
    return [(a, b) for a, b in points if not math.isnan(b)]


def _line(x: Numbers, y: Numbers, across: Axis, up: Axis) -> dict[str, str]:
    """Return a path with gaps at missing values, and the values to show at the pointer."""
    breaks = np.flatnonzero(np.isnan(y))
    path = ""
    for part in np.split(np.arange(len(y)), breaks):
        points = _points(x[part], y[part], across, up)
        if points:  # round line ends show a single point
            path += "M" + "L".join(f"{a} {b}" for a, b in points) + "h0" * (len(points) == 1)
    known = ~np.isnan(y)
    return {
        "path": path,
        "x": " ".join(f"{value:.10g}" for value in x[known].tolist()),
        "y": " ".join(f"{value:.5g}" for value in y[known].tolist()),
    }
