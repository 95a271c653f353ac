# covers: megalite/report/page.py megalite/report/record.py
"""The report page, read as a browser reads it: curves, differences, escapes, damaged records."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from megalite.report import read_records, render
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import rows, run_file, train

SECTIONS = ("summary", "curves", "differences", "time", "events", "forecast", "samples")


class Page(HTMLParser):
    """Elements with their attributes, and the text and table rows of every section."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: dict[str, str] = {}
        self.rows: dict[str, list[list[str]]] = {}
        self.scripts: list[str] = []
        self._section, self._tag, self._cell = "", "", False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.elements.append((tag, attributes))
        self._tag = tag
        if tag == "section":
            self._section = attributes["id"]
            self.text[self._section], self.rows[self._section] = "", []
        elif tag == "tr":
            self.rows[self._section].append([])
        elif tag in ("td", "th"):
            self.rows[self._section][-1].append("")
            self._cell = True
        elif tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._tag = ""
        self._cell = self._cell and tag not in ("td", "th", "tr", "table")

    def handle_data(self, data: str) -> None:
        if self._tag == "script":
            self.scripts[-1] += data
        elif self._section and self._tag != "style":
            self.text[self._section] += data
            if self._cell:
                self.rows[self._section][-1][-1] += data.strip()

    def paths(self, kind: str, chart: str = "") -> list[dict[str, str]]:
        """Return the lines of a kind in the charts whose label begins with `chart`."""
        lines, label = [], ""
        for tag, attributes in self.elements:
            if tag == "svg":
                label = attributes.get("aria-label", "")
            elif attributes.get("class", "").split()[:1] == [kind] and label.startswith(chart):
                lines.append(attributes)
        return lines

    def curve(self, chart: str, run: str) -> dict[float, float]:
        (line,) = [line for line in self.paths("raw", chart) if line["data-name"] == run]
        x, y = (map(float, line[key].split()) for key in ("data-x", "data-y"))
        return dict(zip(x, y, strict=True))


def row(kind: str, step: int, *, attempt: int = 0, **fields: Any) -> dict[str, Any]:
    return {"kind": kind, "time": 1000.0 + step, "attempt": attempt, "step": step, **fields}


def numbers(step: int, loss: float | None, **fields: Any) -> dict[str, Any]:
    common = {"lr": 1e-3, "grad_norm": 1.5, "tokens": 64 * step, "tokens_per_second": 100.0}
    return row("train", step, loss=loss, peak_memory_bytes=2**30, **common, **fields)


def write_run(folder: Path, lines: list[Any], **contents: Any) -> Path:
    folder.mkdir(parents=True)
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "metrics.jsonl").write_text("\n".join(texts))
    contents = {"status": {"state": "done", "step": 1}, "config": {"name": folder.name}, **contents}
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def read_page(*folders: Path, now: float = 2000.0) -> Page:
    return Page(render(read_records(folders), now=now))


def test_train_loss_curve_is_the_mean_since_the_previous_row(tmp_path: Path) -> None:
    rows = [numbers(1, 9.0, mean_loss=9.0), numbers(3, 5.0, mean_loss=6.5), numbers(4, 4.0)]
    page = read_page(write_run(tmp_path / "one", rows))
    assert page.curve("Train loss by step", "one") == {1: 9.0, 3: 6.5, 4: 4.0}


def test_page_compares_two_runs(tmp_path: Path) -> None:
    ends = row("event", 4, name="end", seconds={"setup": 2.0, "step": 3.0})
    begins = row("event", 0, name="start", world_size=2)
    config = {"name": "one", "optimizer": {"lr": 1e-3}, "data": {"train": [{"path": "a"}]}}
    other = {"name": "two", "optimizer": {"lr": 1e-3}, "data": {"train": [{"path": "b"}]}}
    one = write_run(
        tmp_path / "one",
        [begins, *(numbers(n, 8 - n) for n in (1, 2, 3, 4)), row("valid", 4, loss=3.5), ends],
        config=config | {"training": {"steps": 4}},
    )
    two = write_run(tmp_path / "two", [begins, numbers(2, 5.25), ends], config=other)
    page = read_page(one, two)
    assert [attributes["id"] for tag, attributes in page.elements if tag == "section"] == [
        *SECTIONS
    ]
    assert page.curve("Train loss by step", "one") == {1: 7, 2: 6, 3: 5, 4: 4}
    assert page.curve("Train loss by tokens", "one") == {64: 7, 128: 6, 192: 5, 256: 4}
    assert page.curve("Train loss by step", "two") == {2: 5.25}
    assert page.curve("Valid loss", "one") == {4: 3.5}
    assert page.curve("Peak memory", "two") == {2: 1.0}
    assert page.rows["differences"][1:4] == [
        ["data.train.0.path", '"a"', '"b"'],
        ["name", '"one"', '"two"'],
        ["training.steps", "4", "–"],
    ]
    assert "1 keys with identical values" in page.text["differences"]
    assert "optimizer.lr" in page.text["differences"]
    summary = page.rows["summary"]
    assert [cell.split("/")[0] for cell in summary[1]][:3] == ["one", "✓done", "4of 4"]
    assert summary[1][3:] == ["4.0000", "3.5000", "256", "0:06", "50.0%", "0"]
    assert summary[2][2:5] == ["2of –", "5.2500", "–"]
    assert "step 50.0%" in " ".join(page.text["time"].split())
    dashes = {line["class"] for line in page.paths("raw", "Train loss by step")}
    assert dashes == {"raw c0 d0", "raw c1 d1"}


def test_repeated_steps_show_the_later_row(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        [
            row("event", 0, name="start"),
            *(numbers(n, 9.0) for n in range(1, 9)),
            row("sample", 4, prompt="a", text="kept"),
            row("sample", 8, prompt="a", text="gone"),
            row("event", 9, name="rollback", to=6, gap=[1, 2], reason="it jumped"),
            numbers(7, 3.0),
            row("event", 4, name="resume", attempt=1),
            *(numbers(n, 2.0, attempt=1) for n in (5, 6)),
        ],
    )
    page = read_page(run)
    assert page.curve("Train loss by step", "run") == {1: 9, 2: 9, 3: 9, 4: 9, 5: 2, 6: 2}
    assert "after a crash or rollback: 5." in page.text["summary"]
    assert "kept" in page.text["samples"]
    assert "gone" not in page.text["samples"]
    assert [line[3] for line in page.rows["events"][1:]] == ["start", "rollback", "resume"]
    assert page.rows["events"][2][4] == "it jumped; to 6; gap [1, 2]"


EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7*7 }} \ud800"


def test_texts_of_a_run_are_escaped(tmp_path: Path) -> None:
    folder = tmp_path / EVIL.replace("/", "_").encode(errors="replace").decode()
    measures = {"precision": 1.0, "recall": 1.0, "f1": 1.0, "count": 2}
    evaluation = {"step": 1, "split": EVIL, "per_class": {EVIL: measures}, "confusion": [[2]]}
    both = {"memory_bytes": 1, "step_seconds": 1}
    write_run(
        folder,
        [
            row("event", 0, name="start", **{EVIL: EVIL}),
            *(numbers(n, 2.0) for n in range(1, 60)),
            row("valid", 59, epoch=1.0, split=EVIL, **{"loss": 1.0, EVIL: 2.0}),
            row("sample", 59, prompt=EVIL, text=EVIL),
            row("event", 59, name=EVIL, reason=EVIL, seconds={EVIL: 3.0}),
        ],
        status={"state": "failed", "reason": EVIL},
        config={EVIL: EVIL},
        evaluation=evaluation,
        plan={"device": EVIL, "hosts": EVIL, "per_host": 1, "predicted": both, "measured": both},
    )
    (folder / "predictions.jsonl").write_text(
        json.dumps({"id": EVIL, "label": EVIL, "prediction": "b", "probabilities": [0.5]})
    )
    text = render(read_records([folder]))
    page = Page(text.encode(errors="replace").decode())
    assert len(page.scripts) == 1
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"img", "link", "iframe", "object", "embed", "base", "form"}
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        assert attributes.get("href", "#").startswith("#")
        assert not {"src", "srcset", "action", "xlink:href"} & attributes.keys()
    assert "url(" not in text
    assert "@import" not in text
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    (policy,) = [one["content"] for _, one in page.elements if "http-equiv" in one]
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    shown = EVIL.replace("\ud800", "?")
    for section in ("summary", "differences", "events", "forecast", "evaluation", "samples"):
        assert shown[:-2] in page.text[section], section


def test_long_curve_is_thinned_and_keeps_its_extremes(tmp_path: Path) -> None:
    lines = [json.dumps(numbers(n, 2.0 + 0.1 * math.sin(n))) for n in range(1, 20_001)]
    lines[7_776] = json.dumps(numbers(7_777, 40.0))
    lines[15_554] = json.dumps(numbers(15_555, 0.5))
    run = write_run(tmp_path / "run", [*lines])
    text = render(read_records([run]))
    curve = Page(text).curve("Train loss by step", "run")
    assert 900 < len(curve) <= 1002
    assert (curve[7_777], curve[15_555]) == (40.0, 0.5)
    assert {1, 20_000} <= curve.keys()
    assert len(Page(text).paths("smooth", "Train loss by step")[0]["data-x"].split()) == 250
    assert len(text) < 300_000


def test_non_finite_loss_is_a_gap_with_a_note(tmp_path: Path) -> None:
    losses = [None if n in (3, 4, 9) else 5.0 - n / 10 for n in range(1, 11)]
    lines = [json.dumps(numbers(n, loss)) for n, loss in enumerate(losses, 1)]
    lines[8] = lines[8].replace("null", "NaN")
    page = read_page(write_run(tmp_path / "run", [*lines, "{}", "[1]", '{"kind": "tra']))
    (line,) = page.paths("raw", "Train loss by step")
    assert line["data-x"] == "1 2 5 6 7 8 10"
    assert line["d"].count("M") == 3
    assert line["d"].endswith("h0")  # the last is a single point
    assert len(page.paths("gap", "Train loss by step")) == 3
    assert "Rows without a finite loss: 3 of 10, the first at step 3." in page.text["summary"]
    assert "such as those cut short by a crash: 3." in page.text["summary"]
    assert page.rows["summary"][1][3] == "4.0000"
    last = write_run(tmp_path / "last", [numbers(1, 3.0), numbers(2, None)])
    assert read_page(last).rows["summary"][1][3] == "not finite"
    never = write_run(tmp_path / "never", [numbers(1, None)])
    assert not read_page(never).paths("raw", "Train loss by step")


def test_page_of_new_runs_and_of_missing_files(tmp_path: Path) -> None:
    fresh = write_run(tmp_path / "fresh", [], status={"state": "running", "step": 0})
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "status.json").write_text("{")
    going = write_run(
        tmp_path / "going",
        [row("event", 0, name="start"), numbers(5, 2.0)],
        status={"state": "running"},
    )
    page = read_page(fresh, bare, going, now=1065.0)
    summary = page.text["summary"]
    assert summary.count("The run has recorded no training step yet.") == 1
    for fault in (
        "config.json cannot be read: No such file or directory.",
        "metrics.jsonl cannot be read: No such file or directory.",
        "status.json is damaged: JSONDecodeError",
        "Running: last row 1:00 before this page was written",
    ):
        assert fault in summary
    assert [cells[1] for cells in page.rows["summary"][1:]] == ["●running", "?unknown", "●running"]
    assert "No run has recorded a number yet." in read_page(fresh, bare).text["curves"]
    assert "There is no second configuration" in read_page(fresh, bare).text["differences"]
    for note in ("No run has a plan.json", "No run recorded text samples"):
        assert note in page.text["forecast"] + page.text["samples"]


def test_consecutive_events_of_a_kind_share_a_row(tmp_path: Path) -> None:
    saves = [row("event", n, name="checkpoint", path=f"step_{n}") for n in range(10, 5000, 10)]
    stop = row("event", 5000, name="signal", signal="SIGTERM")
    run = write_run(tmp_path / "run", [row("event", 0, name="start"), *saves, stop])
    page = read_page(run)
    assert [line[2:] for line in page.rows["events"][2:]] == [
        ["10 to 4,990", "checkpoint × 499", "path step_4990"],
        ["5,000", "signal", "signal SIGTERM"],
    ]
    marks = [one for _, one in page.elements if one.get("class", "").startswith("mark ")]
    assert len(marks) < 210


def test_page_shows_metrics_and_mistakes_of_fine_tuning(tmp_path: Path) -> None:
    per_class = {
        name: {"precision": 0.5, "recall": 0.25, "f1": 1 / 3, "count": 4} for name in ("no", "yes")
    }
    matrix = [[3, 1], [2, 2]]
    baselines = {"bag_of_words": {"accuracy": 0.75, "f1": 0.7, "examples": 8}}
    run = write_run(
        tmp_path / "run",
        [
            row("valid", 5, epoch=1.0, split="valid", loss=0.7, accuracy=0.6, f1=0.5),
            row("valid", 9, epoch=2.0, split="valid", loss=0.9, accuracy=0.5, f1=0.4),
            row("valid", 9, best_step=5, split="test", loss=0.8, accuracy=0.55),
        ],
        evaluation={
            **{"step": 5, "split": "test", "per_class": per_class, "confusion": matrix},
            **{"accuracy": 0.625, "f1": 0.6, "baselines": baselines},
        },
    )
    predictions = [("no", "yes", 0.6), ("no", "no", 0.9), ("yes", "no", 0.8), (None, "no", 1.0)]
    (run / "predictions.jsonl").write_text(
        "\n".join(
            json.dumps({"id": n, "label": a, "prediction": b, "probabilities": [p, 1 - p]})
            for n, (a, b, p) in enumerate(predictions)
        )
    )
    page = read_page(run)
    table = page.rows["evaluation"]
    assert table[3] == ["9", "test, weights of step 5", "–", "0.8", "0.55", "–"]
    assert table[5:7] == [["no", "3", "1"], ["yes", "2", "2"]]
    assert table[8:10] == [
        ["the model", "0.6250", "0.6000"],
        ["a bag of words", "0.7500", "0.7000"],
    ]
    assert table[11] == ["no", "0.500", "0.250", "0.333", "4"]
    assert table[14:] == [["2", "yes", "no", "0.800"], ["0", "no", "yes", "0.600"]]
    assert "of 2 in 3 predictions" in page.text["evaluation"]
    assert page.curve("Valid accuracy", "run") == {5: 60, 9: 50}
    broken = write_run(tmp_path / "broken", [], evaluation={"per_class": {"a": {}}, "step": "x"})
    assert "evaluation.json is damaged" in read_page(broken).text["summary"]


def test_page_of_a_trained_run(shards: dict[str, str], tmp_path: Path) -> None:
    raw = run_file(shards, tmp_path, checkpoint={"every": 10})
    run_ranks(train, 1, raw)
    page = read_page(tmp_path / "run")
    expected = {line["step"]: line["loss"] for line in rows(raw)}
    assert page.curve("Train loss by step", "run") == pytest.approx(expected, rel=1e-4)
    assert page.curve("Valid loss", "run").keys() == {0, 10, 20}
    assert page.rows["summary"][1][1:3] == ["✓done", "20of 20"]
    assert "going" not in page.text["summary"]
    assert "cannot be read" not in page.text["summary"]
    assert [line[3] for line in page.rows["events"][1:]] == ["start", "checkpoint × 2", "end"]
    assert [line[-3] for line in page.rows["forecast"]] == 2 * ["predicted", "measured"]
    assert "1 x 1 cpu: seconds are a guess until the CPU is calibrated" in page.text["forecast"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
KEYS = (
    *("time", "attempt", "name", "to", "loss", "lr", "tokens", "epoch", "best_step"),
    *("split", "seconds", "reason", "prompt", "text", "grad_norm", "accuracy"),
)
ROWS = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(("train", "valid", "event", "sample")),
        "step": st.integers(0, 9) | st.floats(),
    },
    optional={key: JSON for key in KEYS},
)
EVENTS = st.fixed_dictionaries(
    {
        "kind": st.just("event"),
        "step": st.integers(0, 9),
        "time": st.floats(0, 1e6),
        "attempt": st.integers(0, 2),
        "name": st.sampled_from(("start", "resume", "rollback", "checkpoint", "end")),
    },
    optional={key: JSON for key in ("to", "seconds", "reason", "path")},
)
FILES = st.fixed_dictionaries(
    {},
    optional={
        "status": st.dictionaries(st.sampled_from(("state", "step", "reason")), JSON) | JSON,
        "config": st.fixed_dictionaries({"training": st.dictionaries(st.just("steps"), JSON)})
        | JSON,
        "plan": st.fixed_dictionaries(
            {
                **{key: JSON for key in ("device", "hosts", "per_host")},
                **{
                    key: st.fixed_dictionaries({"memory_bytes": JSON, "step_seconds": JSON})
                    for key in ("predicted", "measured")
                },
            }
        ),
        "evaluation": st.fixed_dictionaries(
            {key: JSON for key in ("step", "split", "per_class", "confusion", "baselines")}
        ),
    },
)


@settings(
    max_examples=100,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # shrinking takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(lines=st.lists(ROWS | EVENTS, max_size=12), contents=FILES)
def test_page_is_written_for_any_content_of_a_run_folder(
    lines: list[Any], contents: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = write_run(tmp_path_factory.mktemp("any") / "run", lines, **contents)
    assert {*SECTIONS} <= read_page(run).text.keys()
