# covers: megalite/checkpoint/huggingface/export.py megalite/evaluate/verify.py
"""Ids that end a text, from a model folder through a checkpoint to an exported folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megalite.checkpoint.huggingface import export
from megalite.config import ModelConfig
from megalite.evaluate.verify import verify_text
from megalite.tokenizers.tokenizer import copy_generation_config, load_tokenizer
from tests.helpers.families import model_section
from tests.helpers.tokenizers import NAMES, START, json_folder
from tests.unit.huggingface.test_huggingface_families import InMemory, random_model

transformers = pytest.importorskip("transformers")

GENERATION = {"eos_token_id": [257, 259], "temperature": 0.6, "top_p": 0.9, "do_sample": True}


def exported(tokenizer: Path, folder: Path, family: str = "llama", **options: Any) -> Any:
    """Export a random model with a tokenizer and return its generation_config.json."""
    config = ModelConfig.model_validate(model_section(family, 1) | {"vocab_size": 300})
    stored = InMemory(random_model(config), config)
    export(stored, config, load_tokenizer(tokenizer), folder, **options)
    assert verify_text(folder) == []
    return json.loads((folder / "generation_config.json").read_text())


def test_export_keeps_the_generation_settings_of_the_start(tmp_path: Path) -> None:
    settings = GENERATION | {"transformers_version": "4.40.0"}
    base = json_folder(tmp_path / "base", {"generation_config.json": settings})
    written = exported(base, tmp_path / "out")
    assert written == GENERATION | {"bos_token_id": 256, "pad_token_id": 257}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] == [257, 259]
    assert "pad_token_id" not in config  # transformers would not train EOS's embedding
    ours = load_tokenizer(tmp_path / "out")
    assert (ours.eos_id, ours.end_ids) == (257, (257, 259))


def test_export_adds_the_end_of_turn_of_a_chat(tmp_path: Path) -> None:
    files = {"tokenizer_config.json": NAMES | {"pad_token": START}}
    base = json_folder(tmp_path / "base", files, "<s> $A")
    written = exported(base, tmp_path / "out", ends=[259, 257])
    assert written == {"bos_token_id": 256, "eos_token_id": [257, 259], "pad_token_id": 258}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pad_token_id"] == 258
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("a").input_ids[0] == 256


def test_export_omits_ids_beyond_the_vocabulary(tmp_path: Path) -> None:
    base = json_folder(tmp_path / "base")
    assert exported(base, tmp_path / "out", ends=[999])["eos_token_id"] == 257


def test_export_of_an_encoder_decoder_keeps_its_start_token(tmp_path: Path) -> None:
    base = json_folder(tmp_path / "base")
    for family in ("t5", "marian"):
        written = exported(base, tmp_path / family, family)
        config = json.loads((tmp_path / family / "config.json").read_text())
        keys = ("decoder_start_token_id", "pad_token_id")
        assert {k: written[k] for k in keys} == {k: config[k] for k in keys}


def test_verify_text_reports_a_difference(tmp_path: Path) -> None:
    exported(json_folder(tmp_path / "base"), tmp_path / "out")
    path = tmp_path / "out" / "generation_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"eos_token_id": 65}))
    (fault,) = verify_text(tmp_path / "out")
    assert fault == "a text ends with [65] in transformers, but with [65, 257] in MegaLite"


@pytest.mark.parametrize("kind", ["model folder", "checkpoint"])
def test_run_keeps_the_end_ids_of_the_model_it_starts_from(kind: str, tmp_path: Path) -> None:
    start = tmp_path / "start" / ("tokenizer" if kind == "checkpoint" else "")
    json_folder(start, {"generation_config.json": {"temperature": 0.6}})
    if kind == "model folder":
        (start / "config.json").write_text('{"model_type": "llama", "eos_token_id": [257, 259]}')
    else:
        (start / "generation_config.json").write_text(json.dumps(GENERATION))
    mine = json_folder(tmp_path / "mine")
    copy_generation_config(mine, tmp_path / "start")
    tokenizer = load_tokenizer(mine)
    assert tokenizer.end_ids == (257, 259)
    assert tokenizer.generation_config["temperature"] == 0.6
    # The ids of another tokenizer have other meanings.
    other = json_folder(tmp_path / "other", around="<s> $A")
    copy_generation_config(other, tmp_path / "start")
    assert load_tokenizer(other).end_ids == (257,)
    (tmp_path / "empty").mkdir()
    copy_generation_config(tmp_path / "empty", tmp_path / "start")
    assert not list((tmp_path / "empty").iterdir())
