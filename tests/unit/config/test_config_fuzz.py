# covers: megalite/config/strict.py megalite/config/faults.py
"""Any content of a run file loads as a config, or ends in faults of one line each."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalite.config import load_config, parse_config
from megalite.config.deepspeed_tables import KNOWN, REFUSED
from megalite.config.faults import dotted, known_keys
from megalite.errors import ConfigError
from megalite.plan import deepspeed_dict, make_plan
from tests.helpers.runs import BASE

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.integers()
    | st.floats()
    | st.sampled_from(["auto", "fp32", "bf16", "rope", "learned", "wsd", "sgd", "cosine", "full"])
    | st.text(max_size=8)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
KEYS = [dotted(key) for key in known_keys()]
DEEPSPEED = [f"deepspeed.{key}" for key in REFUSED] + [
    ".".join(part for part in ("deepspeed", section, key) if part)
    for section, kinds in KNOWN.items()
    for key in kinds
]
CHANGES = st.lists(st.tuples(st.sampled_from(KEYS + DEEPSPEED), VALUES), min_size=1, max_size=5)


def cases(number: int) -> settings:
    return settings(
        max_examples=number,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],  # one file, rewritten
    )


def check_outcome(outcome: Any) -> None:
    """Assert that a config can be planned and stored, and that each fault is one line."""
    if isinstance(outcome, ConfigError):
        assert outcome.faults
        assert all(line and "\n" not in line for line in outcome.faults)
        return
    config = outcome
    assert parse_config(json.loads(json.dumps(config.model_dump(mode="json")))) == config
    try:
        plan = make_plan(config, world_size=2, device="cuda")
    except ConfigError as error:
        check_outcome(error)
    else:
        assert min(plan.memory_bytes.values()) >= 0
        json.dumps(deepspeed_dict(config, plan), allow_nan=False)


@cases(1000)
@given(CHANGES)
def test_run_file_with_any_values_loads_or_is_refused(
    tmp_path: Path, changes: list[tuple[str, Any]]
) -> None:
    raw = copy.deepcopy(BASE)
    for key, value in changes:
        section: Any = raw
        *sections, name = key.split(".")
        for part in sections:
            section = section.setdefault(part, {}) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section[name] = value
    path = tmp_path / "run.json"
    path.write_text(json.dumps(raw))  # with NaN and Infinity
    try:
        outcome: Any = load_config(path)
    except ConfigError as error:
        outcome = error
    check_outcome(outcome)


@cases(500)
@given(st.binary(max_size=40), st.integers(0, 400), st.integers(0, 12))
def test_run_file_of_any_bytes_loads_or_is_refused(
    tmp_path: Path, junk: bytes, start: int, length: int
) -> None:
    whole = json.dumps(BASE).encode()
    path = tmp_path / "run.json"
    path.write_bytes(whole[:start] + junk + whole[start + length :])
    try:
        outcome: Any = load_config(path)
    except ConfigError as error:
        outcome = error
    check_outcome(outcome)


@cases(500)
@given(st.lists(st.text(max_size=20) | st.tuples(st.sampled_from(KEYS), VALUES), max_size=4))
def test_set_with_any_text_loads_or_is_refused(tmp_path: Path, items: list[Any]) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(BASE))
    sets = [item if isinstance(item, str) else f"{item[0]}={json.dumps(item[1])}" for item in items]
    try:
        outcome: Any = load_config(path, sets)
    except ConfigError as error:
        outcome = error
    check_outcome(outcome)


def test_check_outcome_detects_a_fault_of_two_lines() -> None:
    with pytest.raises(AssertionError):
        check_outcome(ConfigError("two\nlines"))
