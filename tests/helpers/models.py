"""Small configurations, models and batches for unit tests, without files or a corpus."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from megalite import env
from megalite.config import ModelConfig, RunConfig
from megalite.data import Batch
from megalite.engine.reference import ReferenceEngine
from megalite.env import Launch
from megalite.mesh import WHOLE
from megalite.model import LanguageModel, build, initialize, plain_objective
from megalite.parallel import Grid, start, stop
from tests.helpers.runs import BASE, merge_sections

torch.set_num_threads(1)  # on models this small, several threads would be ten times slower

_MODEL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
_RUN = merge_sections(
    BASE,
    {
        "model": _MODEL,
        "data": {"train": [{"path": "shards"}], "sequence_length": 8},
        "optimizer": {"lr": 1e-2},
        "training": {"steps": 10, "global_batch_size": 4},
    },
)


def model_config(**overrides: Any) -> ModelConfig:
    """Return the configuration of a small decoder. Overrides are keys of the model section."""
    return ModelConfig.model_validate(_MODEL | overrides)


def run_config(**sections: Any) -> RunConfig:
    """Return a small run's configuration with `sections` merged in. Rules are not checked."""
    return RunConfig.model_validate(merge_sections(_RUN, sections))


def make_model(config: ModelConfig, *, seed: int = 5, spread: float = 0.0) -> LanguageModel:
    """Return an initialised model.

    Args:
        spread: standard deviation of noise on all parameters, so that norms and biases matter.
    """
    model = build(config)
    initialize(model, config, seed=seed, gather=lambda _: nullcontext())
    if spread:
        noise = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += spread * torch.randn(parameter.shape, generator=noise)
    return model


def make_batch(config: ModelConfig, *, samples: int = 2, length: int = 8, seed: int = 0) -> Batch:
    """Return a batch of random tokens. A quarter of the targets is masked."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (samples, length + 1), generator=generator)
    mask = torch.rand(samples, length, generator=generator) < 0.75
    tensors = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": mask}
    return Batch(tensors, seed * samples, int(mask.sum()), samples * length)


def loss_of(model: LanguageModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the summed loss of a batch, without smoothing or weights: fp32 scalar, nats."""
    total: torch.Tensor = model(plain_objective(model.config).loss, batch).total
    return total


# stands for the grid of an engine that needs no communication
SINGLE_RANK: Any = SimpleNamespace(
    device=torch.device("cpu"), rank=0, world_size=1, mesh=WHOLE.mesh, at=WHOLE
)


@contextmanager
def world_of_one() -> Iterator[Grid]:
    """Yield the grid of a single process. Restore the environment at the end."""
    environ = dict(os.environ)
    try:
        grid = start(Launch(0, 1, 0, 1, "127.0.0.1", 0, "python"))
        torch.set_num_threads(1)
        yield grid
    finally:
        stop()
        env.replace(environ)


def make_engine(**sections: Any) -> ReferenceEngine:
    """Return the reference engine of `run_config(**sections)`, on the CPU."""
    return ReferenceEngine(run_config(**sections), grid=SINGLE_RANK)


def train_steps(engine: ReferenceEngine, steps: range) -> list[tuple[float, float]]:
    """Train on a different batch each step. Return loss and gradient norm of each step."""
    curve = []
    for step in steps:
        batch = make_batch(engine.config.model, seed=step)
        result = engine.train_step([batch], divisor=batch.targets, lr=0.02, step=step)
        curve.append((float(result.loss), float(result.grad_norm)))
    return curve
