"""One step of a run without its ranks: every shape, dtype and collective, in one CPU process.

The real model of one rank is built on the meta device, where tensors have shapes and no numbers,
and the process group of the full world is torch's fake one, which sends nothing. Engines are left
out: what ZeRO moves is the plan's to tell.

B samples of a micro-batch   T tokens of a sample
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

from megalite import shapes
from megalite.config import RunConfig
from megalite.engine.base import tune
from megalite.env import Launch
from megalite.errors import CommandError
from megalite.log import write_report
from megalite.mesh import Mesh
from megalite.model import LanguageModel, build
from megalite.parallel import Grid, local_model, prepare, split
from megalite.plan import Collective, Plan, labelled, make_plan, tensor_collectives
from megalite.plan.devices import Kind, find_device
from megalite.plan.memory import local_elements

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DEVICES = {"cpu": "CPU ranks", "cuda": "GPUs"}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_KINDS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
}


@dataclass(frozen=True)
class Rehearsal:
    """What a rank of a step did.

    Attributes:
        parameters: elements that the rank holds; with_gradient: those that a gradient came for.
        collectives: of the ranks that share a model, in one step.
        differences: from the plan, in words.
    """

    parameters: int
    with_gradient: int
    collectives: tuple[Collective, ...]
    differences: tuple[str, ...]
    seconds: float


def rehearse(config: RunConfig, plan: Plan) -> Rehearsal:
    """Go through one micro-batch, forward and backward, as rank 0 of `plan.world_size` would.

    A classifier whose labels are not told has as many as the plan takes it to have.

    Raises:
        CommandError: this process has ranks beside it already.
    """
    if dist.is_initialized():
        raise CommandError("a rehearsal needs a process of its own; it is in a group of ranks")
    began, config = time.monotonic(), labelled(config)
    with _world(plan) as grid:
        model = _build(config, plan, grid)
        calls = _Calls()
        with calls:
            loss = model(_batch(config, plan))
            loss.backward()
    assert loss.shape == (), loss.shape
    assert loss.dtype == torch.float32, loss.dtype
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.shape == parameter.shape, name
            assert parameter.grad.dtype == parameter.dtype, name
    every = list(model.parameters())
    collectives = calls.collectives(plan)
    return Rehearsal(
        parameters=sum(p.numel() for p in every),
        with_gradient=sum(p.numel() for p in every if p.grad is not None),
        collectives=collectives,
        differences=tuple(_differences(config, plan, every, collectives)),
        seconds=time.monotonic() - began,
    )


@contextmanager
def _world(plan: Plan) -> Iterator[Grid]:
    """Rank 0 of a world in which every other rank is imagined."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=plan.world_size)
    try:
        mesh = Mesh(data=plan.world_size // plan.tensor_parallel, tensor=plan.tensor_parallel)
        every = dist.group.WORLD
        assert every is not None
        yield Grid(
            rank=0,
            world_size=plan.world_size,
            local_rank=0,
            mesh=mesh,
            device=torch.device("meta"),
            zero_group=dist.new_group(list(mesh.group("zero", 0))),
            tensor_group=dist.new_group(list(mesh.group("tensor", 0))),
            cpu_group=every,
        )
    finally:
        dist.destroy_process_group()


def _build(config: RunConfig, plan: Plan, grid: Grid) -> LanguageModel:
    # compiled code calls the same collectives, and has no business here
    plain = config.training.model_copy(update={"compile": False})
    config = config.model_copy(update={"training": plain})
    with torch.device("meta"):
        model = build(local_model(config.model, plan.tensor_parallel))
    model.to(_DTYPES[plan.precision])
    loss = model.head_loss = tune(model, config)
    if plan.tensor_parallel > 1:
        split(model, config.model, grid, loss, sequence=config.parallel.sequence)
    recompute = config.training.activation_checkpointing
    prepare(model.blocks, recompute=recompute, compile_blocks=False)
    return model.train()


def _batch(config: RunConfig, plan: Plan) -> dict[str, Tensor]:
    """A micro-batch of the run's kind, of its full length."""
    model, B, T = config.model, plan.micro_batch_size, plan.sequence_length

    def ids(tokens: int) -> Tensor:
        return torch.empty(B, tokens, dtype=torch.int64, device="meta")

    def marks(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bool, device="meta")

    tuned, two = config.finetune, model.architecture == "encoder_decoder"
    of_stacks = [*shapes.lengths(config).values()]
    read, written = of_stacks[0], of_stacks[-1]
    batch = {"input_ids": ids(read)}
    if tuned and not tuned.data.packing and model.architecture != "decoder":
        batch["attention_mask"] = marks(B, read)
    if model.num_labels:
        if two:
            batch["decoder_input_ids"] = ids(1)
        lengths, labels = (torch.empty(B, dtype=torch.int64, device="meta") for _ in range(2))
        return batch | {"lengths": lengths, "labels": labels, "loss_mask": marks(B)}
    if two:
        batch["decoder_input_ids"] = ids(written)
    if config.data.mask_documents or (tuned and tuned.data.packing):
        batch |= {"position_ids": ids(T), "document_ids": ids(T)}
    rows = shapes.head_rows(B * written, shapes.counted(config, B * written))
    if rows < B * written:
        batch["target_rows"] = torch.empty(rows, dtype=torch.int64, device="meta")
    return batch | {"labels": ids(written), "loss_mask": marks(B, written)}


class _Calls(TorchDispatchMode):
    """Notes the collectives that pass, as the group's ranks make them."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: Counter[tuple[str, str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind = _KINDS[func._schema.name.partition("::")[2]]
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            dtype, elements = tensors[0].dtype, max(t.numel() for t in tensors)
            self._seen[kind, _NAMES[dtype], elements] += 1
        return func(*args, **(kwargs or {}))

    def collectives(self, plan: Plan) -> tuple[Collective, ...]:
        """Those of a whole step, whose micro-batches are alike."""
        times: int = plan.accumulation_steps
        found = (
            Collective("tensor", kind, dtype, elements, count * times)  # type: ignore[arg-type]
            for (kind, dtype, elements), count in self._seen.items()
        )
        return tuple(sorted(found))


def _differences(
    config: RunConfig, plan: Plan, every: list[Any], collectives: tuple[Collective, ...]
) -> Iterator[str]:
    planned, held = local_elements(config, plan.tensor_parallel), sum(p.numel() for p in every)
    if planned != held:
        yield f"parameters of a rank: {planned:,} planned, {held:,} rehearsed"
    expected = set(tensor_collectives(config, plan))
    for missing in sorted(expected - set(collectives)):
        yield f"planned, not rehearsed: {missing}"
    for found in sorted(set(collectives) - expected):
        yield f"rehearsed, not planned: {found}"


def _device(config: RunConfig, ranks: int, name: str | None) -> tuple[Kind, bool | None]:
    """The kind of device to rehearse, and whether it has bf16 (None: as this host's CPUs).

    Ranks that were started have this host's devices. Imagined ranks have GPUs, unless the run file
    asks for fp32 and this host has none.
    """
    if name is not None:
        device = find_device(name)
        return device.kind, device.native_bf16
    if torch.cuda.is_available():
        return "cuda", True
    here = ranks == 0 or config.training.precision == "fp32"
    return ("cpu", None) if here else ("cuda", True)


def dry_run(config: RunConfig, launch: Launch, ranks: int, gpu: str | None = None) -> int:
    """Rehearse a step, and report how it compares with the plan; for `--dry-run`.

    Args:
        ranks: of the run. 0 means those that were started, or as many as share a model.
        gpu: a device that the planner knows, or a device file. None chooses by `ranks`.
    Returns:
        1 if the rehearsal and the plan differ.
    Raises:
        CommandError: an unknown device.
    """
    if launch.rank != 0:
        return 0
    world = ranks or max(launch.world_size, config.parallel.tensor)
    device, native = _device(config, ranks, gpu)
    plan = make_plan(config, world_size=world, device=device, native_bf16=native)
    done = rehearse(config, plan)
    gib = 2**30
    lines = [
        f"{config.name} in {plan.precision} on {world} {_DEVICES[device]}, of which "
        f"{plan.tensor_parallel} share a model: every shape of a step agrees "
        f"({done.seconds:.0f} s)",
        f"a rank computes with {done.parameters:,} parameters; {done.with_gradient:,} had "
        "gradients",
    ]
    lines += [
        f"  {call.group} {call.kind} {call.dtype}: {call.count:,}, {call.bytes / gib:.3f} GiB"
        for call in done.collectives
    ]
    memory = plan.memory_bytes["total"]
    size = f"{memory / gib:.2f} GiB" if memory >= gib / 10 else f"{memory / 2**20:.1f} MiB"
    lines.append(f"memory of a rank's tensors: {size} by the plan")
    lines += [f"differs: {difference}" for difference in done.differences]
    write_report("\n".join(lines) + "\n")
    return 1 if done.differences else 0
