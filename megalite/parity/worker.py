"""One rank of a layout, which trains as in a launcher and inspects tensors of some steps.

A run stores these tensors, compares them with those that another run stored, or both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from megalite import arch, env, files
from megalite.cli import run_main
from megalite.config import ModelConfig, RunConfig, parse_config
from megalite.engine import Engine
from megalite.parallel import Grid, is_counted
from megalite.parity.trial import SAVED_STEP
from megalite.plan.optimizer import state_names
from megalite.train.options import RunOptions
from megalite.train.session import run

WEIGHT, OUTPUT, GRADIENT, NORM = "weight", "output", "gradient", "counted norm"
GROUP = "hyper-parameters"
_FLOOR = 1e-6  # share of the whole gradient's norm below which a gradient is rounding error

Inspected = Iterator[tuple[str, str, Tensor]]  # (kind, name, value); values are valid on rank 0


@dataclass(frozen=True)
class ParityJob:
    """Instructions for the ranks of one run, stored as a JSON file.

    Attributes:
        config: the run file.
        steps: steps whose tensors are inspected.
        others: folder of stored tensors to compare with. None means no comparison.
        keep: folder to store the tensors in. None means that nothing is stored.
        tolerance: relative error above which a layer's output counts as different.
        report: file for the result of the comparison, a list of `Difference`.
    """

    config: dict[str, Any]
    engine: Literal["deepspeed", "reference"]
    resume: str
    steps: list[int]
    others: str | None
    keep: str | None
    tolerance: float
    report: str


@dataclass(frozen=True)
class Difference:
    """The largest difference of a kind at a step. For outputs, the first above the tolerance."""

    step: int
    kind: str
    name: str
    error: float  # relative; inf if a value is not a number


class Inspector:
    """Inspector of the tensors of a job's steps, in the order in which a fault spreads.

    At the first step, and at the one after SAVED_STEP, it inspects weights, optimizer states and
    hyper-parameters. At each step it inspects the outputs of layers, the gradients, and each
    parameter's contribution to the gradient norm.
    """

    def __init__(self, job: ParityJob, config: RunConfig) -> None:
        self._job, self._config = job, config
        self._outputs: _Outputs | None = None
        self.differences: list[Difference] = []

    def __call__(self, step: int, engine: Engine, grid: Grid) -> None:
        if step in self._job.steps:
            worst = _Worst(self._job, step, grid.rank)
            # a resumed run starts after SAVED_STEP, and compares its start with this run
            starts = step in (self._job.steps[0], SAVED_STEP + 1)
            for kind, name, value in self._inspect(engine, grid, starts=starts):
                worst.add(kind, name, value)
            self.differences += worst.close()
        if self._outputs is None:
            self._outputs = _Outputs(engine.model, self._config.model)
        self._outputs.clear()

    def _inspect(self, engine: Engine, grid: Grid, *, starts: bool) -> Inspected:
        rows = {row.name: row for row in arch.parameters(self._config.model)}
        parameters = [(rows[name], p) for name, p in engine.model.named_parameters()]
        for row, parameter in parameters if starts else ():
            with engine.gathered([parameter]):
                weight = _equal_or_off(parameter.data, grid.zero_group)
            yield from _canonical(WEIGHT, row, weight, grid)
        states = [(row, p, state_names(self._config, row)) for row, p in parameters if starts]
        for state in sorted({name for _, _, names in states for name in names}):
            for row, parameter, names in states:
                if state in names:
                    yield from _canonical(state, row, engine.read_state(parameter, state), grid)
        for row, parameter in parameters if starts else ():
            yield GROUP, row.name, _hyper_parameters(engine.group(parameter))
        if self._outputs is not None:
            yield from self._outputs.means(grid, sequence=self._config.parallel.sequence)
        for row, parameter in parameters:
            yield from _canonical(GRADIENT, row, engine.read_gradient(parameter), grid)
        for row, parameter in parameters:
            square = engine.read_gradient(parameter).square().sum() * is_counted(parameter, grid)
            dist.all_reduce(square, group=grid.tensor_group)
            yield NORM, row.name, square.sqrt().reshape(1)


class _Worst:
    """Comparison of a step's tensors with those of another run, and their storage; on rank 0."""

    def __init__(self, job: ParityJob, step: int, rank: int) -> None:
        self._step = step
        self._tolerance = job.tolerance
        self._stored: dict[str, Tensor] = {}
        self._worst: dict[str, tuple[str, float]] = {}
        self._keep: Path | None = None
        self._others: Any = None
        self._other_keys: set[str] = set()
        name = f"step_{step}.safetensors"
        if rank == 0 and job.keep:
            self._keep = Path(job.keep) / name
        if rank == 0 and job.others:
            self._others = safe_open(Path(job.others) / name, framework="pt")
            self._other_keys = set(self._others.keys())
            norms = [self._others.get_tensor(k) for k in self._other_keys if k.startswith(NORM)]
            self._floor = _FLOOR * float(torch.cat(norms).norm())
        # After the first update, weights whose gradient is rounding error differ under AdamW, and
        # so do means in which large terms cancel.
        self._compared = {
            job.steps[0]: lambda kind: True,
            job.steps[1]: lambda kind: kind in (OUTPUT, GRADIENT, NORM),
        }.get(step, lambda kind: kind in (GRADIENT, NORM))

    def add(self, kind: str, name: str, value: Tensor) -> None:
        key = f"{kind}/{name}"
        if self._keep is not None:
            self._stored[key] = value.detach().cpu().clone()
        if key not in self._other_keys or not self._compared(kind):
            return
        before = self._worst.get(kind, ("", -1.0))
        if kind == OUTPUT and before[1] > self._tolerance:
            return
        other = self._others.get_tensor(key)
        size = max(float(other.norm()), self._floor if kind in (GRADIENT, NORM) else 1e-12)
        error = float((value.detach().cpu() - other).norm()) / size
        error = float("inf") if error != error else error
        if error > before[1]:
            self._worst[kind] = (name, error)

    def close(self) -> list[Difference]:
        if self._keep is not None:
            save_file(self._stored, self._keep)
        return [Difference(self._step, kind, *worst) for kind, worst in self._worst.items()]


class _Outputs:
    """Outputs of layers, averaged over the tokens of a step, which show where a fault begins.

    Only layers whose output is whole on every tensor rank are observed. Outputs of recomputed
    layers are added twice, in sum and count.
    """

    def __init__(self, model: nn.Module, config: ModelConfig) -> None:
        owners = [
            row.name.rpartition(".")[0]
            for row in arch.parameters(config)
            if row.tensors[0].split in (arch.Split.REPLICATED, arch.Split.INPUT_DIM)
            or row.name == "model.embed_tokens.weight"
        ]
        self._outputs: dict[str, list[Tensor]] = {}
        for name in dict.fromkeys(owners):
            model.get_submodule(name).register_forward_hook(partial(self._add, name))

    def _add(self, name: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        # selective recompute requires that each pass runs the same operations
        self._outputs.setdefault(name, []).append(output.detach())

    def means(self, grid: Grid, *, sequence: bool) -> Inspected:
        for name, outputs in self._outputs.items():
            by_head = outputs[0].dim() == 4  # [B, T, heads of this rank, width of a head]
            rows = torch.cat(outputs).flatten(0, -2)
            total = torch.cat((rows.sum(0), rows.new_tensor([len(rows)])))
            dist.all_reduce(total, group=grid.zero_group)
            if by_head or (sequence and ".embed_" not in name):
                dist.all_reduce(total, group=grid.tensor_group)
            yield OUTPUT, name, _equal_or_off(total[:-1] / total[-1], grid.tensor_group)

    def clear(self) -> None:
        self._outputs.clear()


def _hyper_parameters(group: Mapping[str, Any]) -> Tensor:
    """Return a parameter's hyper-parameters without the learning rate, which varies by step."""
    keys = ("weight_decay", "decoupled_l2", "l1", "betas", "eps", "momentum")
    values = [
        torch.tensor(group[key], dtype=torch.float64).flatten() for key in keys if key in group
    ]
    return torch.cat(values)


def _equal_or_off(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return a value that should be equal on all ranks of a group. If not, add their difference."""
    if dist.get_world_size(group) == 1:
        return value
    high, low = value.clone(), value.clone()
    dist.all_reduce(high, op=dist.ReduceOp.MAX, group=group)
    dist.all_reduce(low, op=dist.ReduceOp.MIN, group=group)
    return value + (high - low)


def _canonical(kind: str, row: arch.ParameterSpec, value: Tensor, grid: Grid) -> Inspected:
    """Yield the canonical tensors of a parameter, gathered over the tensor ranks."""
    coordinates = grid.tensor_coordinates
    if row.tensors[0].split is arch.Split.REPLICATED:
        coordinates = (grid.at,)
        parts = [_equal_or_off(value, grid.tensor_group)]
    else:
        parts = [torch.empty_like(value) for _ in coordinates]
        dist.all_gather(parts, value.contiguous(), group=grid.tensor_group)
    whole = {tensor.name: value.new_zeros(tensor.shape) for tensor in row.tensors}
    for at, part in zip(coordinates, parts, strict=True):
        for piece in arch.pieces(row, at):
            whole[piece.tensor.name][piece.source] = part[piece.target]
    for name, tensor in whole.items():
        yield kind, name, tensor


def main(path: str) -> None:
    """Run the job at `path` as this process's rank."""
    job = ParityJob(**files.read_json(Path(path)))
    config = parse_config(job.config)
    launch = env.find_launch()
    inspector = Inspector(job, config)
    run(RunOptions(config, job.resume, engine=job.engine, inspect=inspector), launch)
    if launch.rank == 0:
        report = [vars(difference) for difference in inspector.differences]
        files.write_atomic(Path(job.report), json.dumps(report))


def work(_launch: env.Launch, path: str) -> None:
    """Run `main` and end the process with its exit code."""
    run_main(partial(main, path), ranks=True)
