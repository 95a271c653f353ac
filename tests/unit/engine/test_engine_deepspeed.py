# covers: megalite/engine/deepspeed/engine.py megalite/engine/deepspeed/settings.py
# covers: megalite/engine/deepspeed/partitions.py
"""The DeepSpeed engine: its settings are complete and verified; partitions cover all parameters."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megalite.config import Precision
from megalite.env import Launch
from megalite.errors import ConfigError, EngineError
from megalite.parallel import Grid
from tests.helpers.models import run_config, world_of_one
from tests.helpers.ranks import run_ranks


def section(stage: int, **others: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_allreduce_op": "mean" if stage == 3 else "sum",
        "zero_optimization": {"stage": stage},
        **others,
    }


@pytest.fixture(scope="module")
def one() -> Any:
    with world_of_one() as grid:
        yield grid


def test_settings_have_every_default_of_deepspeed(one: Grid) -> None:
    from megalite.engine.deepspeed.settings import defaults, fill_defaults

    full = fill_defaults(section(2, gradient_clipping=0.5), one)
    assert full["gradient_clipping"] == 0.5
    assert full["zero_optimization"]["stage"] == 2
    assert full["zero_optimization"]["reduce_bucket_size"] > 0
    assert full["fp16"]["enabled"] is False
    assert defaults(one)["zero_optimization"]["stage"] == 0


def test_fill_defaults_refuses_an_unknown_key_by_name(one: Grid) -> None:
    from megalite.engine.deepspeed.settings import fill_defaults

    wrong = section(2)
    wrong["zero_optimization"]["reduce_bucket_sise"] = 5
    with pytest.raises(ConfigError, match="reduce_bucket_sise"):
        fill_defaults(wrong, one)


def test_verify_effective_names_a_value_that_the_engine_does_not_use() -> None:
    from megalite.engine.deepspeed.settings import verify_effective

    weight = torch.nn.Linear(2, 2)
    engine = SimpleNamespace(
        module=weight,
        gradient_average=False,
        zero_optimization_stage=lambda: 0,
        train_batch_size=lambda: 2,
        train_micro_batch_size_per_gpu=lambda: 2,
        gradient_accumulation_steps=lambda: 1,
        gradient_clipping=lambda: 1.0,
        fp16_enabled=lambda: False,
        bfloat16_enabled=lambda: False,
        get_data_types=lambda: (torch.float32, torch.float32),
    )
    settings = {"train_batch_size": 2, "gradient_clipping": 1.0}
    verify_effective(settings, engine)
    settings["gradient_clipping"] = 0.5
    message = r"deepspeed.gradient_clipping: requested 0.5, .* uses 1.0"
    with pytest.raises(EngineError, match=message):
        verify_effective(settings, engine)


def partitions_of(launch: Launch, stage: int) -> dict[str, tuple[int, int]]:
    """Return this rank's part of each parameter, after a comparison of the masters' values."""
    from megalite.engine.deepspeed.engine import DeepSpeedEngine
    from megalite.engine.deepspeed.partitions import zero_partitions
    from megalite.engine.deepspeed.settings import fill_defaults
    from megalite.parallel import start

    grid = start(launch)
    settings = section(stage)
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    engine = DeepSpeedEngine(
        run_config(), grid=grid, precision=Precision.FP32, settings=fill_defaults(settings, grid)
    )
    names = {id(parameter): name for name, parameter in engine.model.named_parameters()}
    zero: Any = engine.optimizer
    flat = (
        zero.fp32_partitioned_groups_flat
        if stage == 3
        else [group["params"][0] for group in zero.optimizer.param_groups]
    )
    masters = {id(master): master for master in flat}
    local_parts = {}
    for key, parts in zero_partitions(zero, stage, grid).items():
        for parameter, (first, length, offset) in parts:
            whole = engine.read_state(parameter, "weight").flatten()
            part = masters[key].detach()[offset : offset + length]
            assert torch.equal(part, whole[first : first + length])
            local_parts[names[id(parameter)]] = (first, length)
    return local_parts


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_partitions_of_all_ranks_cover_every_parameter_once(stage: int) -> None:
    from tests.helpers.models import make_model

    ranks = run_ranks(partitions_of, 2, stage)
    for name, parameter in make_model(run_config().model).named_parameters():
        parts = sorted(rank[name] for rank in ranks if rank[name][1])
        assert sum(length for _, length in parts) == parameter.numel(), name
        ends = [first + length for first, length in parts]
        assert [first for first, _ in parts[1:]] == ends[:-1], name
