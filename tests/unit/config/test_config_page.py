# covers: megalite/config/page.py megalite/config/__main__.py megalite/config/fields.py
# covers: megalite/config/logging.py
"""docs/configuration.md is generated from the schema, and is complete."""

from __future__ import annotations

import re

from megalite.config.__main__ import PAGE, json_schema
from megalite.config.deepspeed_tables import REFUSED
from megalite.config.faults import known_keys
from megalite.config.page import configuration_page
from megalite.config.schema import RunConfig


def documented() -> set[str]:
    """Return the keys of the first column, without indices of lists."""
    keys = re.findall(r"^\| `(.+?)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {key.replace("[0]", "") for key in keys}


def test_configuration_page_is_up_to_date() -> None:
    page = configuration_page(json_schema())
    assert PAGE.read_text(encoding="utf-8") == page, "run `python -m megalite.config`"
    assert configuration_page(json_schema()) == page


def test_configuration_page_documents_every_key_and_no_other() -> None:
    sections = {key[:-1] for key in known_keys()}
    keys = {".".join(key) for key in known_keys() if key not in sections and key[0] != "deepspeed"}
    on_page = {key for key in documented() if not key.startswith(("deepspeed.", "$", "extends"))}
    assert {key for key in on_page if tuple(key.split(".")) not in sections} == keys
    deepspeed = {
        key.removeprefix("deepspeed.") for key in documented() if key.startswith("deepspeed.")
    }
    assert deepspeed >= {"zero_optimization.stage", "gradient_clipping", *REFUSED}


def test_configuration_page_states_values_and_defaults_in_words() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    rows = {line.split("`")[1]: line for line in lines if line.startswith("| `")}
    assert "| whole number from 1 | required |" in rows["training.micro_batch_size"]
    assert "| number from 0 under 1 | `0.9` |" in rows["optimizer.momentum"]
    assert "| list of 2: whole number from 1 or `null` | `null` |" in rows["training.profile"]
    assert "| whole number from 1 or `null` | computed |" in rows["model.head_dim"]
    assert '| `"pre"`, `"post"` | `"pre"` |' in rows["model.norm_position"]
    for name, field in RunConfig.model_fields.items():
        if name not in ("name", "deepspeed", "plugins"):
            assert f"## {name}" in lines
            assert field.description
