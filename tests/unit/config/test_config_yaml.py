# covers: megalite/config/yaml_text.py
"""Run files in YAML: the same configuration as in JSON, and values by YAML 1.2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megalite.config import load_config
from megalite.config.load import SHIPPED
from megalite.config.strict import parse_strict, read_value
from megalite.config.yaml_text import format_yaml
from megalite.errors import ConfigError

FILES = sorted(path for path in SHIPPED.rglob("*.json") if path.name != "schema.json")


def as_yaml(path: Path, folder: Path) -> Path:
    """Convert a run file, and the files that it extends, to YAML; return the new path."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    if "extends" in raw:
        raw["extends"] = as_yaml((path.parent / raw["extends"]).resolve(), folder).name
    raw.pop("$schema", None)
    target = folder / f"{path.parent.name}_{path.stem}.yaml"
    target.write_text(yaml.safe_dump(raw, sort_keys=False, allow_unicode=True))
    return target


MODEL = {"architecture": "decoder", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
MODEL |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 4096}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_file_loads_identically_from_yaml(path: Path, tmp_path: Path) -> None:
    model = MODEL if "model" not in path.read_text() else None  # files that start from a model
    try:
        expected = load_config(path, model=model)
    except ConfigError:
        expected = load_config(path, model=MODEL)
        model = MODEL
    config = load_config(as_yaml(path, tmp_path), model=model)
    assert config == expected
    assert config.model_dump_json() == expected.model_dump_json()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("off", "off"),
        ("no", "no"),
        ("yes", "yes"),
        ("y", "y"),
        ("010", 10),
        ("+12", 12),
        ("0o17", 15),
        ("0x1f", 31),
        ("1_000", "1_000"),
        ("12:30:45", "12:30:45"),
        ("2026-01-01", "2026-01-01"),
        ("true", True),
        ("False", False),
        ("'true'", "true"),
        ('"1"', "1"),
        ("~", None),
        ("", None),
        ("null", None),
        ("=", "="),
        ("|\n  two\n  lines\n", "two\nlines\n"),
        ('"\\ud83d\\ude00 \\/"', "😀 /"),
        ("[1, a, {b: null}]", [1, "a", {"b": None}]),
    ],
)
def test_scalar_has_its_value_of_yaml_1_2(tmp_path: Path, text: str, value: Any) -> None:
    (tmp_path / "a.yaml").write_text(f"key: {text}\n")
    read, notes = read_value(tmp_path / "a.yaml")
    assert notes == []
    assert read == {"key": value}
    assert type(read["key"]) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x 1\nb: *x\n", r"line 1 column 4: the anchor &x: .*; remove it"),
        ("a: *x\n", r"line 1 column 4: the alias \*x: .*; write the value out"),
        ("a: !!int '3'\n", "line 1 column 4: the tag tag:yaml.org,2002:int"),
        ("a: !custom 3\n", "the tag !custom"),
        ("a: 1\n1: x\n", "line 2 column 1: the key 1, which is not text: .*; put it in quotes"),
        ("? [a]\n: 1\n", "which is not text"),
        ("true: 1\n", "the key true"),
        ("a: 1\n---\nb: 2\n", "line 2 column 1: a second document: .*; write one file for each"),
        ("%YAML 1.1\n---\na: 1\n", "line 1 column 1: a directive"),
        ("a: [1\n", "line 2 column 1: not YAML"),
        ("\ta: 1\n", "line 1 column 1: not YAML"),
        ("a: 1\nb: \x01\n", "line 2 column 4: not YAML: a control character; remove it"),
        ("a:\t1\n", "line 1 column 3: not YAML: .*; indent and separate with spaces"),
        ('a: "\\UFFFFFFFF"\n', "line 1 column 7: not YAML: .* is not a character; write the"),
        ("a: 1\nb: x\u2028c: 2\n", r"line 2 column 5: the character U\+2028, .*; remove it, or"),
        ("[" * 5000, "sections more than 30 deep"),
    ],
)
def test_feature_that_json_lacks_is_refused_with_its_line(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "a.yml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_value(tmp_path / "a.yml")


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("a: 1\nb:\n  c: 1\n  c: 2\n", 'line 4 column 3: "c" occurs twice'),
        ("a: .inf\n", "line 1 column 4: .inf is not a JSON number"),
        ("b: 1\na: .nan\n", "line 2 column 4: .nan is not a JSON number"),
        ("a: 1e999\n", "out of range; write a number below 1e308"),
        (f"a: {2**63}\n", "out of range"),
        (f"a: 0x{'f' * 9000}\n", "out of range"),
    ],
)
def test_invalid_value_is_noted_with_its_line(tmp_path: Path, text: str, note: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    _, notes = read_value(tmp_path / "a.yaml")
    assert len(notes) == 1
    assert note in notes[0]


def test_json_and_yaml_files_extend_each_other(tmp_path: Path) -> None:
    (tmp_path / "first.yaml").write_text("extends: smoke.json\nname: first\n")
    (tmp_path / "second.json").write_text('{"extends": "first.yaml", "training": {"steps": 7}}')
    config = load_config(tmp_path / "second.json")
    assert (config.name, config.training.steps) == ("first", 7)


def test_yaml_file_without_sections_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match=r"a.yaml: expected sections, such as `training:`"):
        load_config(tmp_path / "a.yaml")


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.sampled_from(
        ["off", "3e-4", "0o17", "null", "True", "~", "", "a b", "x: y", "- 1", "b#c"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), values, min_size=1))
def test_written_yaml_has_the_same_value(sections: dict[str, Any]) -> None:
    assert parse_strict(format_yaml(sections), yaml=True) == (sections, [])


def test_written_yaml_has_sections_and_plain_words() -> None:
    raw = {"extends": "base.json", "parallel": {"tensor": 2}, "name": "off", "data": {"train": [1]}}
    expected = 'extends: base.json\nparallel:\n  tensor: 2\nname: "off"\ndata:\n  train: [1]\n'
    assert format_yaml(raw) == expected
