"""Content of the report's sections. The layout is in page.html, page.css and page.js."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from megalite.observe.console import format_duration
from megalite.report import charts
from megalite.report.charts import compact
from megalite.report.record import Record, number

_FOLDER = Path(__file__).parent
_STATES = {  # symbol and colour class of each state
    "done": ("✓", "good"),
    "running": ("●", "going"),
    "saving": ("●", "going"),
    "stopped": ("■", "plain"),
    "superseded": ("■", "plain"),
    "failed": ("✕", "bad"),
}
_TRIANGLE, _DIAMOND, _SQUARE = "M-4-5L5 0L-4 5Z", "M0-5L5 0L0 5L-5 0Z", "M-4-4H4V4H-4Z"
_EVENTS = {  # SVG path around (0, 0), and colour class
    name: (path, kind)
    for names, path, kind in (
        (("start", "resume"), _TRIANGLE, "plain"),
        (("checkpoint",), "M0-6V6", "plain"),
        (("end",), _SQUARE, "good"),
        (("stopped", "superseded"), _SQUARE, "plain"),
        (("signal",), "M0-5L5 4H-5Z", "warn"),
        (("skip", "spike", "straggler"), _DIAMOND, "warn"),
        (("unsaved",), _DIAMOND, "bad"),
        (("rollback",), "M4-5L-5 0L4 5Z", "bad"),
        (("hang", "failed"), "M-4-4L4 4M4-4L-4 4", "bad"),
    )
    for name in names
}
_OTHER = ("M-3 0A3 3 0 1 0 3 0A3 3 0 1 0-3 0Z", "plain")
_GROUPED = ("checkpoint", "skip", "spike", "straggler")  # consecutive ones share a table row
_MOST_EVENTS, _MOST_SAMPLES, _MOST_EPOCHS = 200, 20, 50
_LONGEST, _LONGEST_SAMPLE = 400, 4000  # characters
_FEW_LABELS = 20  # up to which the whole confusion matrix is shown
_EVERY = tuple(n * unit for unit in (1, 60, 3600) for n in (1, 2, 5, 10, 15, 30))  # seconds
_COMMON = ("kind", "time", "attempt", "step")


def render(records: Sequence[Record], *, now: float | None = None) -> str:
    """Return one self-contained HTML page about runs.

    The template escapes everything that comes from a run. The page's content security policy
    allows only its own script.

    Args:
        now: Unix seconds. None means the current time.
    """
    now = time.time() if now is None else now
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown": _shown, "text": _text, "duration": format_duration}
    style, script = (_FOLDER.joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    panels = [chart for panel in charts.PANELS if (chart := charts.chart(panel, records))]
    return environment.get_template("page.html").render(
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        plane=charts,
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now)),
        names=_names(records),
        summary=[_summary(record, now) for record in records],
        charts=panels,
        smoothed=any("smooth" in curve["lines"] for chart in panels for curve in chart["curves"]),
        differences=differences(records),
        times=[record.time for record in records],
        timeline=_timeline(records),
        forecasts=_numbered(map(_forecast, records)),
        evaluations=_numbered(map(_evaluation, records)),
        samples=_numbered(map(_samples, records)),
        notes=[record.notes for record in records],  # last, because the sections above add notes
    )


def _numbered(items: Iterable[Any]) -> list[tuple[int, Any]]:
    """Return the non-empty items, each with the index of its run."""
    return [(index, item) for index, item in enumerate(items) if item]


def _names(records: Sequence[Record]) -> list[str]:
    """Return the folders' names, or the whole path if a name occurs twice."""
    names = [record.folder.resolve().name for record in records]
    shared = [names.count(name) > 1 for name in names]
    return [
        str(record.folder) if twice else name
        for record, name, twice in zip(records, names, shared, strict=True)
    ]


def _text(value: Any, limit: int = _LONGEST) -> str:
    """Return a value as text or JSON, cut after `limit` characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else f"{text[:limit]} ... ({len(text):,} characters)"


def _shown(value: Any, spec: str) -> str:
    return "–" if math.isnan(number(value)) else format(number(value), spec)


def _summary(record: Record, now: float) -> dict[str, Any]:
    train, valid, status = record.train, record.valid, record.status
    losses = train.columns["loss"]
    steps = train.steps
    valid_losses = [
        (y, x) for x, y in zip(valid.steps, valid.columns["loss"], strict=True) if y == y
    ]
    best = min(valid_losses, default=None)
    state = str(status.get("state"))
    state = state if state in _STATES else "unknown"
    loss = losses[-1] if losses else None
    going = ""
    if state in ("running", "saving") and record.spans:
        ago = now - max(last for _, last in record.spans.values())
        going = f"last row {format_duration(max(0.0, ago))} before this page was written"
    return {
        "path": str(record.folder),
        "state": state,
        "mark": _STATES.get(state, ("?", "plain")),
        "reason": going or _text(status.get("reason") or ""),
        "step": steps[-1] if steps else status.get("step"),
        "of": json.loads(record.config.get("training.steps", "null")),
        "loss": "not finite" if losses and math.isnan(losses[-1]) else _shown(loss, ".4f"),
        "valid": valid_losses[-1][0] if valid_losses else None,
        "best": best if best and best != valid_losses[-1] else None,
        "tokens": compact(float(f"{train.columns['tokens'][-1]:.3g}")) if steps else "–",
        "time": record.time,
    }


def differences(records: Sequence[Record]) -> dict[str, Any]:
    """Compare the complete configurations by dotted key: differing and identical values."""
    known = [record.config for record in records if record.config]
    differing, identical = [], []
    for key in sorted({key for values in known for key in values}):
        if len({values.get(key) for values in known}) == 1:
            identical.append((key, _text(known[0][key])))
        else:
            values = [record.config.get(key) for record in records]
            differing.append((key, [None if value is None else _text(value) for value in values]))
    return {"differing": differing, "identical": identical, "known": len(known)}


def _timeline(records: Sequence[Record]) -> dict[str, Any]:
    """Place attempts and events by the time since the run's first row, in percent."""
    begins = [min((a for a, _ in r.spans.values()), default=math.nan) for r in records]
    ends = [max((b for _, b in r.spans.values()), default=math.nan) for r in records]
    longest = max((b - a for a, b in zip(begins, ends, strict=True) if b > a), default=1.0)
    days = 86400 * math.ceil(longest / 86400 / 5)
    every = next((step for step in _EVERY if longest / step <= 5), days)
    times = [k * every for k in range(int(longest / every) + 1)]
    runs = [_lane(r, begin, longest) for r, begin in zip(records, begins, strict=True)]
    names = dict.fromkeys(name for run in runs for name, *_ in run["marks"])
    return {
        "ticks": [(100 * time / longest, format_duration(time)) for time in times],
        "legend": [(name, *_EVENTS.get(name, _OTHER)) for name in names],
        "runs": runs,
    }


def _lane(record: Record, begin: float, longest: float) -> dict[str, Any]:
    marks: dict[tuple[str, float], tuple[Any, ...]] = {}
    for event in record.events:
        name = _text(event.get("name"), 40)
        at = number(event.get("time")) - begin
        if not math.isnan(at):
            place = round(200 * at / longest) / 2  # one mark per kind and half percent
            label = f"{name}, step {event['step']:,.0f}, {format_duration(at)}"
            marks[name, place] = (name, place, label, *_EVENTS.get(name, _OTHER))
    rows = [_event_row(list(group), begin) for _, group in groupby(record.events, key=_group_key)]
    return {
        "bars": [
            (100 * (a - begin) / longest, 100 * (b - a) / longest, f"attempt {n:.0f}")
            for n, (a, b) in sorted(record.spans.items())
        ],
        "marks": list(marks.values()),
        "rows": rows[-_MOST_EVENTS:],
        "omitted": max(0, len(rows) - _MOST_EVENTS),
    }


def _group_key(event: Mapping[str, Any]) -> Any:
    """Return a key that consecutive events with a common table row share."""
    is_grouped = event.get("name") in _GROUPED
    return (event.get("attempt"), event.get("name")) if is_grouped else id(event)


def _event_row(events: Sequence[Mapping[str, Any]], begin: float) -> dict[str, Any]:
    last = events[-1]
    name = _text(last.get("name"), 40)
    at = number(last.get("time"))
    steps = dict.fromkeys(f"{event['step']:,.0f}" for event in (events[0], last))
    details = [_text(last["reason"])] if last.get("reason") else []
    for key, value in last.items():
        if key not in (*_COMMON, "name", "seconds", "reason") and value not in (None, {}):
            details.append(f"{key.replace('_', ' ')} {_text(value)}")
    return {
        "name": name,
        "mark": _EVENTS.get(name, _OTHER),
        "count": len(events),
        "steps": " to ".join(steps),
        "attempt": last.get("attempt"),
        "time": format_duration(at - begin) if at >= begin else "–",
        "details": _text("; ".join(details)),
    }


def _forecast(record: Record) -> dict[str, Any]:
    """Compare predicted and measured numbers. The longer of two bars is 100 wide."""
    section: dict[str, Any] = {}
    if not record.plan:
        return section
    with record.noting_errors("plan.json"):
        plan = record.plan
        rows = []
        for name, key, scale, unit in (
            ("memory per rank", "memory_bytes", 2**-30, "GiB"),
            ("time per step", "step_seconds", 1.0, "s"),
        ):
            both = {k: float(plan[k][key]) * scale for k in ("predicted", "measured")}
            most = max(both.values())
            ratio = both["measured"] / both["predicted"]
            bars = [(kind, f"{one:.3g} {unit}", 100 * one / most) for kind, one in both.items()]
            rows.append({"name": name, "bars": bars, "ratio": f"{ratio:.2f}"})
        device = f"{plan['hosts']} x {plan['per_host']} {plan['device']}"
        section = {"device": device, "guess": plan["device"] == "cpu", "rows": rows}
    return section


def _evaluation(record: Record) -> dict[str, Any]:
    """Return fine-tuning metrics by epoch, and a classifier's confusion matrix."""
    columns = dict.fromkeys(
        key
        for row in record.epochs
        for key, value in row.items()
        if key not in (*_COMMON, "best_step") and not math.isnan(number(value))
    )
    section: dict[str, Any] = {
        "columns": list(columns),
        "epochs": record.epochs[-_MOST_EPOCHS:],
        "classes": [],
        "record": record,
    }
    if record.evaluation:
        with record.noting_errors("evaluation.json"):
            section |= _confusion(record.evaluation)
    return section if record.epochs or section["classes"] else {}


def _confusion(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    names = list(evaluation["per_class"])
    matrix = evaluation["confusion"]
    places = range(len(names))
    values = [[int(matrix[is_][seen]) for seen in places] for is_ in places]
    pairs = ((values[i][j], names[i], names[j]) for i in places for j in places if i != j)
    measures = ("precision", "recall", "f1")
    few = len(names) <= _FEW_LABELS
    return {
        "split": f"{_text(evaluation['split'])}, step {evaluation['step']:,}",
        "classes": [
            (name, *(f"{one[measure]:.3f}" for measure in measures), f"{one['count']:,}")
            for name, one in evaluation["per_class"].items()
        ],
        "baselines": _baselines(evaluation),
        "names": names,
        "matrix": [[(n, n / max(sum(row), 1)) for n in row] for row in values if few],
        "taken": [pair for pair in sorted(pairs, reverse=True)[:_FEW_LABELS] if pair[0]],
    }


def _baselines(evaluation: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the scores of the model and of the baselines. Empty for older runs."""
    scores = evaluation.get("baselines") or {}
    rows = [
        ("the model", evaluation),
        ("a bag of words", scores.get("bag_of_words")),
        ("the most frequent label", scores.get("majority")),
    ]
    return [
        (name, *(f"{float(of[key]):.4f}" for key in ("accuracy", "f1")))  # type: ignore[misc]
        for name, of in rows
        if scores and of
    ]


def _samples(record: Record) -> list[dict[str, Any]]:
    """Return each prompt's last continuation, and some of the earlier ones."""
    by_prompt: dict[str, dict[float, str]] = {}
    for row in record.samples:
        prompt = _text(row.get("prompt", ""), _LONGEST_SAMPLE)
        by_prompt.setdefault(prompt, {})[row["step"]] = _text(row.get("text", ""), _LONGEST_SAMPLE)
    samples = []
    for prompt, texts in list(by_prompt.items())[:_MOST_SAMPLES]:
        order = [(f"{step:,.0f}", texts[step]) for step in sorted(texts, reverse=True)]
        every = math.ceil(len(order) / _MOST_SAMPLES)
        samples.append(
            {"prompt": prompt, "last": order[0], "before": order[every::every], "all": len(order)}
        )
    return samples
