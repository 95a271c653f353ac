"""Compiled training has whole graphs, no recompilation, and released weights under ZeRO-3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megalite.config import parse_config
from megalite.env import Launch, has_compiler
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import run_file, zero

MIXED = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}

pytestmark = pytest.mark.skipif(not has_compiler(), reason="torch.compile needs a C++ compiler")


def counted(launch: Launch, raw: dict[str, Any]) -> dict[str, Any]:
    """Train. Return the number of graphs at each step, graph breaks, and unreleased weights.

    The weights are counted after each backward, and after the forward of each block.
    """
    from torch._dynamo.utils import counters

    from megalite.train import RunOptions, run

    graphs = list[int]()
    alive = list[int]()

    def elements(module: Any) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    def inspect(_step: int, engine: Any, *_: Any) -> None:
        graphs.append(counters["stats"]["unique_graphs"])
        alive.append(elements(engine.model))
        if len(graphs) == 1:  # after the engine's own hooks
            for block in engine.model.blocks:
                block.register_forward_hook(lambda block, *_: alive.append(elements(block)))

    run(RunOptions(parse_config(raw), inspect=inspect), launch)
    graphs.append(counters["stats"]["unique_graphs"])
    return {"graphs": graphs, "breaks": dict(counters["graph_break"]), "alive": alive}


@pytest.mark.parametrize(
    ("stage", "ranks", "sections"),
    [
        (0, 1, {}),
        (1, 2, {"training": {"activation_checkpointing": "selective"}}),
        (2, 2, {"data": {"mask_documents": True}}),
        (3, 2, {"training": {"activation_checkpointing": "full"}}),
        (1, 2, {"parallel": {"tensor": 2}}),
        (1, 1, {"model": MIXED}),
        pytest.param(3, 2, {"model": MIXED}, marks=pytest.mark.slow),
    ],
)
def test_compiled_training_has_no_graph_breaks_and_no_recompilation(
    shards: dict[str, str], tmp_path: Path, stage: int, ranks: int, sections: dict[str, Any]
) -> None:
    """The run has validations at the start, during training and at the end."""
    training = {"compile": True, "steps": 6, "eval_every": 2} | sections.get("training", {})
    sections = sections | {"training": training, "deepspeed": zero(stage)}
    for rank in run_ranks(counted, ranks, run_file(shards, tmp_path, **sections)):
        assert rank["breaks"] == {}
        # graphs of a block of each kind and of the loss's two passes, in validation and training
        kinds = 2 if "model" in sections else 1
        assert 2 + kinds <= rank["graphs"][0] <= 4 + 2 * kinds
        # no new graph after the first step
        assert set(rank["graphs"]) == {rank["graphs"][0]}
        # six backwards, and the forwards of two blocks in five steps and in validations
        assert len(rank["alive"]) > 6 + 5 * 2
        assert stage != 3 or set(rank["alive"]) == {0}
