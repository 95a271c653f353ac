"""Formatting of metrics as lines of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def table(result: Mapping[str, Any]) -> str:
    """Return a line for each number. Those of `baselines` and `tasks` are last, with a prefix."""
    rows = {name: value for name, value in result.items() if isinstance(value, int | float)}
    for section in ("baselines", "tasks"):
        for task, metrics in (result.get(section) or {}).items():
            rows |= {f"{task} {name}": value for name, value in metrics.items()}
    width = max(14, *map(len, rows)) if rows else 14
    texts = {k: f"{v:,}" if isinstance(v, int) else f"{v:.4f}" for k, v in rows.items()}
    return "".join(f"{name:<{width}} {text}\n" for name, text in texts.items())
