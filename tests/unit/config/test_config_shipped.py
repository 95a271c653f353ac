# covers: megalite/config/page.py
"""Every shipped run file loads, and schema.json is up to date."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megalite.config import LoggingConfig, load_config
from megalite.config.__main__ import SCHEMA, json_schema
from megalite.plan import make_plan

CONFIGS = Path(__file__).parents[3] / "configs"
SHIPPED = {  # parameters, intended number of ranks, ZeRO stage, tensor-parallel size
    "smoke": (7_309_824, 2, 1, 1),
    "125m": (134_105_856, 8, 1, 1),
    "350m": (373_867_520, 8, 1, 1),
    "1b": (1_100_048_384, 8, 1, 1),
    "7b": (6_738_415_616, 32, 3, 1),
    "13b": (13_015_864_320, 32, 3, 1),
    "70b": (68_976_648_192, 64, 3, 1),
}


def test_shipped_files_are_all_tested() -> None:
    assert {path.stem for path in CONFIGS.glob("*.json")} == {*SHIPPED, "schema"}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_config_fits_its_gpus(name: str) -> None:
    parameters, ranks, stage, tensor = SHIPPED[name]
    config = load_config(CONFIGS / f"{name}.json")
    assert config.name == name
    plan = make_plan(config, world_size=ranks, device="cuda")
    assert (plan.parameters, plan.zero_stage, plan.tensor_parallel) == (parameters, stage, tensor)
    assert plan.precision == "bf16"
    assert plan.memory_bytes["total"] < 72 * 2**30  # of 80 GB, with room for CUDA and libraries


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("finetune/*.json")), ids=lambda p: p.stem)
def test_shipped_config_of_fine_tuning_loads(path: Path) -> None:
    base = load_config(CONFIGS / "125m.json").model.model_dump(mode="json")
    needs_model = path.stem in ("sft", "lora", "chat", "table_pretrained")
    config = load_config(path, model=base if needs_model else None)
    assert config.name == path.stem
    assert (config.finetune is None) == (path.stem == "imdb_text")
    assert make_plan(config, world_size=1, device="cpu").parameters > 10**6


@pytest.mark.parametrize("name", ["table", "chat"])
def test_shipped_config_for_local_data_holds_out_by_fraction(name: str) -> None:
    base = load_config(CONFIGS / "125m.json").model.model_dump(mode="json")
    config = load_config(CONFIGS / f"finetune/{name}.json", model=base if name == "chat" else None)
    assert config.finetune is not None
    data = config.finetune.data
    assert (data.test_split, data.valid_split, data.test_fraction) == (None, None, 0.1)
    assert not Path(data.path).is_absolute()


def test_schema_file_is_up_to_date() -> None:
    assert json.loads(SCHEMA.read_text()) == json_schema(), "run `python -m megalite.config`"


def test_schema_describes_every_key_and_refuses_others() -> None:
    schema = json_schema()
    sections = [schema, *schema["$defs"].values()]
    for section in sections:
        assert section["additionalProperties"] is False
        for name, field in section["properties"].items():
            assert field.get("description"), name
    model = schema["$defs"]["ModelConfig"]["properties"]
    assert model["activation"]["enum"] == [
        *("swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh", "relu")
    ]
    assert model["head_dim"]["type"] == ["integer", "null"]
    assert "gradient_clipping" in schema["properties"]["deepspeed"]["properties"]


@pytest.mark.parametrize(
    "name",
    [
        *SHIPPED,
        *(f"finetune/{n}" for n in ("imdb", "sft", "lora", "chat", "table", "table_pretrained")),
    ],
)
def test_schema_contains_every_shipped_key(name: str) -> None:
    def check(value: Any, schema: dict[str, Any]) -> None:
        schema = next((kind for kind in schema.get("anyOf", ()) if "$ref" in kind), schema)
        schema = defs[schema["$ref"].rsplit("/", 1)[1]] if "$ref" in schema else schema
        if isinstance(value, dict):
            for key, inner in value.items():
                assert key in schema["properties"], key
                check(inner, schema["properties"][key])
        elif isinstance(value, list) and "items" in schema:
            for item in value:
                check(item, schema["items"])

    whole = json_schema()
    defs = whole["$defs"]
    check(json.loads((CONFIGS / f"{name}.json").read_text()), whole)


def test_readme_run_file_loads(tmp_path: Path) -> None:
    text = (CONFIGS.parent / "README.md").read_text()
    block = text[text.index('    {\n      "$schema"') :]
    raw = json.loads(block[: block.index("\n    }\n") + 6])
    raw["extends"] = str(CONFIGS / raw["extends"])
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(raw))
    assert load_config(path).name == "mine"


def test_logging_sections_of_pages_are_accepted() -> None:
    root = CONFIGS.parent
    page = (root / "docs" / "watching.md").read_text(encoding="utf-8")
    (section,) = re.findall(r'^    "logging": (\{.*\})$', page, re.MULTILINE)
    assert LoggingConfig.model_validate(json.loads(section)).wandb is not None
    text = (root / "docs" / "index.md").read_text(encoding="utf-8")
    keys = dict(re.findall(r"`logging\.(samples|wandb): (\{.*?\})`", text))
    assert keys.keys() == {"samples", "wandb"}
    LoggingConfig.model_validate({key: json.loads(value) for key, value in keys.items()})
