"""Model families on all kinds of layouts, compared with one process and with transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megalite.checkpoint.huggingface import export
from megalite.config import ModelConfig
from megalite.env import Launch
from megalite.evaluate import open_model
from megalite.evaluate.verify import inputs_of, transformers_logits
from megalite.tokenizers.tokenizer import load_tokenizer
from tests.helpers.families import FAMILIES, model_section
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import curve, rows, run_file, zero
from tests.parity.test_layouts import _reference, misses
from tests.unit.huggingface.test_huggingface_families import InMemory, random_model

SEQUENCE = {"tensor": 2, "sequence": True}
LENGTH = {"t5": 31, "marian": 31}  # 2 spans of 5 tokens are removed: source 28, target 8


def family_run(shards: dict[str, str], folder: Path, family: str, **sections: Any) -> Any:
    """Return a run file of a family's second shape, with bytes, a mask token and sentinels."""
    model = model_section(family, 1) | {"vocab_size": 301, "initializer_range": 0.05}
    data = {"sequence_length": LENGTH.get(family, 32)}
    objective = {"mask_token_id": 258, "whole_words": True, "mask_probability": 0.16}
    objective = objective if family == "bert" else {}
    objective = {"mask_probability": 0.16} if family in LENGTH else objective
    return run_file(shards, folder, model=model, data=data, objective=objective, **sections)


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "sequence": (2, {"parallel": SEQUENCE, "deepspeed": zero(3)}),
    "tp2": (4, {"parallel": {"tensor": 2}, "deepspeed": zero(1)}),
    "tp4": (4, {"parallel": {"tensor": 4, "sequence": True}, "deepspeed": zero(0)}),
}
LAYOUTS["sequence"][1]["training"] = {"activation_checkpointing": "selective"}
ALL = ["qwen3"]  # grouped heads, and norms of heads
SOME = ["t5", "gpt2", "bert"]  # two stacks; biases and learned positions; both directions


@pytest.mark.parametrize(
    ("family", "names"),
    [(family, list(LAYOUTS) if family in ALL else ["sequence"]) for family in ALL + SOME]
    + [
        pytest.param(family, list(LAYOUTS)[1 if family in SOME else 0 :], marks=pytest.mark.slow)
        for family in FAMILIES
        if family not in ALL
    ],
)
def test_family_gives_the_numbers_of_one_process_on_every_kind_of_layout(
    shards: dict[str, str], tmp_path: Path, family: str, names: list[str]
) -> None:
    plain = family_run(shards, tmp_path / "plain", family)
    run_ranks(_reference, 1, plain)
    oracle = {"curve": curve(plain), "valid": [row["loss"] for row in rows(plain, "valid")]}
    losses = [loss for loss, _ in oracle["curve"]]
    assert losses[-1] < losses[0] - 0.3
    for name in names:
        ranks, sections = LAYOUTS[name]
        raw = family_run(shards, tmp_path / name, family, **sections)
        assert misses(raw, ranks, oracle) == [], name


def _scores(launch: Launch, folders: list[str]) -> list[Any]:
    from megalite.parallel import start

    grid, scores = start(launch, tensor=launch.world_size), []
    for folder in folders:
        opened = open_model(folder, grid)
        with torch.no_grad():
            logits = opened.model.logits(inputs_of(opened, ids_of(opened.config)))
        scores.append(logits.numpy())
    return scores


def ids_of(config: ModelConfig) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(config.vocab_size, (2, 20), generator=generator)


def test_tensor_ranks_give_the_logits_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folders = []
    for family in FAMILIES:
        for number in range(3):
            config = ModelConfig.model_validate(model_section(family, number))
            folders.append(str(tmp_path / f"{family}-{number}"))
            stored = InMemory(random_model(config), config)
            export(stored, config, load_tokenizer("bytes"), Path(folders[-1]))
    expected = [
        transformers_logits(loaded, ids_of(loaded.config)) for loaded in map(open_model, folders)
    ]
    for size in (2, 4):
        for rank in run_ranks(_scores, size, folders):
            for folder, scores, theirs in zip(folders, rank, expected, strict=True):
                error = float((torch.from_numpy(scores) - theirs).abs().max() / theirs.std())
                assert error <= 1e-4, (folder, size, error)
