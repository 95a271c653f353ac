"""Dry run of one training step in one CPU process: every shape, dtype and collective of a rank.

The real model of one rank is built on the meta device, where tensors have shapes but no values.
The process group of the full world is PyTorch's fake one, which sends nothing. No engine is built,
so the messages of ZeRO are planned but not counted.

B: samples per micro-batch. T: tokens per sample.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megalite import arch
from megalite.config import Precision, RunConfig, target_count
from megalite.engine.base import freeze
from megalite.env import Launch
from megalite.errors import CommandError
from megalite.log import write_report
from megalite.model import LanguageModel, build, make_objective
from megalite.parallel import (
    Grid,
    apply_recompute_and_compile,
    apply_tensor_parallel,
    make_regions,
)
from megalite.plan import Collective, Plan, make_plan, resolve_labels, tensor_collectives
from megalite.plan.devices import Kind, find_device
from megalite.plan.zero import local_elements

_DEVICES = {"cpu": "CPU ranks", "cuda": "GPUs"}
_PRECISIONS = {precision.torch: precision for precision in Precision}
_KINDS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
}


@dataclass(frozen=True)
class DryRun:
    """Result of a dry run: the counts of one rank, and their differences from the plan.

    Attributes:
        parameters: elements that the rank holds.
        with_gradient: elements that received a gradient.
        collectives: calls among the ranks that share a model, in one step.
        differences: one sentence for each difference from the plan.
        seconds: duration of the dry run.
    """

    parameters: int
    with_gradient: int
    collectives: tuple[Collective, ...]
    differences: tuple[str, ...]
    seconds: float


def dry_run(config: RunConfig, plan: Plan) -> DryRun:
    """Run forward and backward of one micro-batch as rank 0 of `plan.world_size` ranks.

    A classifier without labels in its run file has as many labels as the plan assumes.

    Raises:
        CommandError: this process already belongs to a process group.
    """
    if dist.is_initialized():
        raise CommandError(
            "this process already belongs to a process group; start the dry run in a separate "
            "process"
        )
    config = resolve_labels(config)
    # compiled code calls the same collectives, and compilation would only cost time
    plain = config.training.model_copy(update={"compile": False})
    config = config.model_copy(update={"training": plain})
    began = time.monotonic()
    with _fake_world(plan) as grid:
        model = _build(config, plan, grid)
        calls = _Calls()
        with calls:
            loss = model(make_objective(config).loss, _batch(config, plan)).total
            loss.backward()
    assert loss.shape == (), loss.shape
    assert loss.dtype == torch.float32, loss.dtype
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.shape == parameter.shape, name
            assert parameter.grad.dtype == parameter.dtype, name
    parameters = list(model.parameters())
    collectives = calls.collectives(plan)
    return DryRun(
        parameters=sum(p.numel() for p in parameters),
        with_gradient=sum(p.numel() for p in parameters if p.grad is not None),
        collectives=collectives,
        differences=tuple(_differences(config, plan, parameters, collectives)),
        seconds=time.monotonic() - began,
    )


@contextmanager
def _fake_world(plan: Plan) -> Iterator[Grid]:
    """Yield the grid of rank 0 in a fake process group of the plan's world size."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=plan.world_size)
    try:
        mesh = plan.mesh
        world = dist.group.WORLD
        assert world is not None
        yield Grid(
            rank=0,
            world_size=plan.world_size,
            local_rank=0,
            mesh=mesh,
            device=torch.device("meta"),
            zero_group=dist.new_group(list(mesh.group("zero", 0))),
            tensor_group=dist.new_group(list(mesh.group("tensor", 0))),
            cpu_group=world,
        )
    finally:
        dist.destroy_process_group()


def _build(config: RunConfig, plan: Plan, grid: Grid) -> LanguageModel:
    sequence = config.parallel.sequence
    with torch.device("meta"):
        model = build(config.model, make_regions(config.model, grid, sequence=sequence))
    model.to(plan.precision.torch)
    freeze(model, config)
    apply_tensor_parallel(model, config.model, grid, sequence=sequence)
    recompute = config.training.activation_checkpointing
    apply_recompute_and_compile(model.blocks, recompute=recompute, compile_blocks=False)
    return model.train()


def _batch(config: RunConfig, plan: Plan) -> dict[str, Tensor]:
    """Return a micro-batch of the run's task at full length, on the meta device."""
    model, B, T = config.model, plan.micro_batch_size, plan.sequence_length

    def ids(tokens: int) -> Tensor:
        return torch.empty(B, tokens, dtype=torch.int64, device="meta")

    def mask(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bool, device="meta")

    finetune = config.finetune
    has_decoder = model.architecture == "encoder_decoder"
    lengths_of_stacks = [*arch.lengths(config).values()]
    source = lengths_of_stacks[0]
    target = lengths_of_stacks[-1]
    batch = {"input_ids": ids(source)}
    if finetune and not finetune.data.packing and model.architecture != "decoder":
        batch["attention_mask"] = mask(B, source)
    if model.num_labels:
        if has_decoder:
            batch["decoder_input_ids"] = ids(1)
        lengths, labels = (torch.empty(B, dtype=torch.int64, device="meta") for _ in range(2))
        return batch | {"lengths": lengths, "labels": labels, "loss_mask": mask(B)}
    if has_decoder:
        batch["decoder_input_ids"] = ids(target)
    if config.data.mask_documents or (finetune and finetune.data.packing):
        batch |= {"position_ids": ids(T), "document_ids": ids(T)}
    rows = arch.padded_targets(B * target, target_count(config, B * target))
    if rows < B * target:
        batch["target_rows"] = torch.empty(rows, dtype=torch.int64, device="meta")
    return batch | {"labels": ids(target), "loss_mask": mask(B, target)}


class _Calls(TorchDispatchMode):
    """Counter of the collectives that are called while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: Counter[tuple[str, Precision, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind = _KINDS[func._schema.name.partition("::")[2]]
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            dtype = tensors[0].dtype
            elements = max(t.numel() for t in tensors)
            self._seen[kind, _PRECISIONS[dtype], elements] += 1
        return func(*args, **(kwargs or {}))

    def collectives(self, plan: Plan) -> tuple[Collective, ...]:
        """Return the calls of a whole step, whose micro-batches all have the same calls."""
        times: int = plan.accumulation_steps
        collectives = (
            Collective("tensor", kind, dtype, elements, count * times)  # type: ignore[arg-type]
            for (kind, dtype, elements), count in self._seen.items()
        )
        return tuple(sorted(collectives))


def _differences(
    config: RunConfig, plan: Plan, parameters: list[Any], collectives: tuple[Collective, ...]
) -> Iterator[str]:
    planned = local_elements(config, plan.mesh.tensor)
    built = sum(p.numel() for p in parameters)
    if planned != built:
        yield f"parameters of a rank: {planned:,} planned, {built:,} counted"
    expected = set(tensor_collectives(config, plan))
    for missing in sorted(expected - set(collectives)):
        yield f"planned, but not counted: {missing}"
    for extra in sorted(set(collectives) - expected):
        yield f"counted, but not planned: {extra}"


def _device(config: RunConfig, ranks: int, name: str | None) -> tuple[Kind, bool | None]:
    """Return the device kind of the dry run, and whether it supports bf16.

    None means that bf16 depends on this host's CPUs. Ranks that were started have this host's
    devices. Other ranks have GPUs, unless this host has none and the run file sets precision fp32.
    """
    if name is not None:
        device = find_device(name)
        return device.kind, device.native_bf16
    if torch.cuda.is_available():
        return "cuda", True
    here = ranks == 0 or config.training.precision == "fp32"
    return ("cpu", None) if here else ("cuda", True)


def report_dry_run(config: RunConfig, launch: Launch, ranks: int, gpu: str | None = None) -> int:
    """Run the dry run and report its comparison with the plan (`--dry-run`).

    Args:
        ranks: world size. 0 means the ranks that were started, but at least those of one model.
        gpu: a device of the planner's table, or a device file. None chooses by `ranks`.
    Returns:
        the exit code: 1 if the dry run and the plan differ.
    Raises:
        CommandError: the device is unknown.
    """
    if launch.rank != 0:
        return 0
    world = ranks or max(launch.world_size, config.parallel.tensor)
    device, native = _device(config, ranks, gpu)
    plan = make_plan(config, world_size=world, device=device, native_bf16=native)
    counted = dry_run(config, plan)
    gib = 2**30
    lines = [
        f"{config.name} in {plan.precision} on {world} {_DEVICES[device]}, of which "
        f"{plan.mesh.tensor} share a model: every shape of a step agrees "
        f"({counted.seconds:.0f} s)",
        f"a rank computes with {counted.parameters:,} parameters; {counted.with_gradient:,} had "
        "gradients",
    ]
    lines += [
        f"  {call.group} {call.kind} {call.dtype}: {call.count:,}, {call.bytes / gib:.3f} GiB"
        for call in counted.collectives
    ]
    memory = plan.memory_bytes["total"]
    size = f"{memory / gib:.2f} GiB" if memory >= gib / 10 else f"{memory / 2**20:.1f} MiB"
    lines.append(f"memory of a rank's tensors: {size} by the plan")
    lines += [f"differs: {difference}" for difference in counted.differences]
    write_report("\n".join(lines) + "\n")
    return 1 if counted.differences else 0
