# covers: data_prep/labels.py
"""Labels are stripped of white space; others that look the same are reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_prep.labels import describe_similar, label_name
from data_prep.records import Unusable
from tests.helpers import rows as labelled

BOM, ZERO_WIDTH, IDEOGRAPHIC, NO_BREAK = "\ufeff", "\u200b", "\u3000", "\xa0"


def counts(tmp_path: Path, named: list[Any], /, **data: Any) -> dict[str, int]:
    rows = [{"text": f"text {n}", "label": label} for n, label in enumerate(named)]
    path = labelled.write_jsonl(str(tmp_path / "rows" / "train.jsonl"), rows)
    manifest, _ = labelled.open_examples(
        labelled.make_examples(path, cache=str(tmp_path / "cache"), **data)
    )
    return dict(manifest.splits["train"].counts)


@pytest.mark.parametrize(
    "space", [" ", "\t", "\n", NO_BREAK, IDEOGRAPHIC, ZERO_WIDTH, BOM, "\u2060 \u200d"]
)
def test_labels_are_stripped_of_white_space(tmp_path: Path, space: str) -> None:
    label_counts = counts(
        tmp_path, ["正面", f"正面{space}", f"{space}负面", "负面", f"{space}负面{space}"]
    )
    assert label_counts == {"正面": 2, "负面": 3}
    assert label_name(f" a{space}b ", "label", None) == f"a{space}b"
    with pytest.raises(Unusable, match="neither an integer nor a name"):
        label_name(space, "label", None)


def test_labels_of_the_run_file_are_taken_as_they_are(tmp_path: Path) -> None:
    assert counts(tmp_path, ["a", " b", "a "], labels=["a", " b"]) == {"a": 2, " b": 1}


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["Positive", "positive", "negative"], "'Positive' (1), 'positive' (1)"),
        (["café", "cafe\u0301", "tea"], r"'caf\xe9' (1), 'cafe\u0301' (1)"),
        (["ｆｕｌｌ", "full", "x"], "'ｆｕｌｌ' (1), 'full' (1)"),
        (["two  words", "two words", "x"], "'two  words' (1), 'two words' (1)"),
        (["a\u200bb", "ab", "x"], r"'a\u200bb' (1), 'ab' (1)"),
        ([1, "1.0", "01", "2"], "'1' (1), '1.0' (1), '01' (1)"),
        ([True, "true", "no"], "'True' (1), 'true' (1)"),
    ],
)
def test_labels_that_look_the_same_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, labels: list[Any], words: str
) -> None:
    assert sum(counts(tmp_path, labels).values()) == len(labels)
    assert f"these similar values are different labels: {words} (rows of each)" in caplog.text


def test_other_labels_are_not_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    counts(tmp_path, ["a", "b", "10", "1", "-1", "nan", "inf", "1a", "ä"])
    assert "different labels" not in caplog.text
    assert describe_similar({"US": 3, "us": 1, "it": 2}) == ["'US' (3), 'us' (1)"]
