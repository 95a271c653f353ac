"""Comparison of replicas that must be equal, during training.

Ranks hold the same numbers in two ways. Under ZeRO 0 to 2 the ranks of a ZeRO group hold the same
weights; at every stage the ranks of a tensor group hold the same norms and biases. Training never
compares them. Once they differ (a flipped bit, a sum that one rank missed), they stay different,
and every checkpoint holds one rank's view.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalite import arch
from megalite.checkpoint import Progress
from megalite.config import ModelConfig
from megalite.engine import Engine
from megalite.errors import EngineError
from megalite.parallel import Grid
from megalite.train.hooks.hook import CONTINUE, Hook, Outcome, StepReport, is_due

_CHUNK = 1 << 20  # elements hashed at once, so that temporaries stay in a cache
_MASK = (1 << 62) - 1  # hashes are at least 0, and their negatives have room


class ReplicaCheck(Hook):
    """Comparison of replicas by hashes, in one small reduction.

    Args:
        every: steps between comparisons; one also comes before each save.
        stage: ZeRO stage. At 3 the ranks of a ZeRO group hold different parts.
    """

    def __init__(
        self, engine: Engine, model: ModelConfig, grid: Grid, *, every: int, stage: int
    ) -> None:
        self._grid = grid
        self._every = every
        self._checked = -1  # step
        self._group = grid.tensor_group if stage == 3 else grid.cpu_group
        self._device = grid.device if stage == 3 else torch.device("cpu")
        # tensor ranks that hold different parts of a parameter have a slot each
        parts = grid.mesh.tensor if stage < 3 else 0
        own = grid.tensor_coordinates.index(grid.at)
        self._compared: dict[str, nn.Parameter] = {}
        self._slots: list[int] = []  # of each parameter in the vector that is reduced
        self._size = 0
        rows = {row.name: row for row in arch.parameters(model)}
        for name, parameter in engine.model.named_parameters():
            replicated = rows[name].tensors[0].split is arch.Split.REPLICATED
            slots = 1 if replicated else parts
            if slots:
                self._compared[name] = parameter
                self._slots.append(self._size if replicated else self._size + own)
                self._size += slots
        if dist.get_world_size(self._group) == 1:
            self._compared = {}

    def after_step(self, report: StepReport) -> Outcome:
        if is_due(report.step, self._every):
            self._check_once(report.step)
        return CONTINUE

    def before_save(self, progress: Progress) -> None:
        self._check_once(progress.step)

    def on_rollback(self) -> None:
        self._checked = -1

    def _check_once(self, step: int) -> None:
        if self._checked != step:
            self.check(step)
            self._checked = step

    def check(self, step: int) -> None:
        """Compare the replicas; a collective.

        Raises:
            EngineError: on every rank, if replicas differ: the parameters, and the ranks that hold
                other numbers than most.
        """
        if not self._compared:
            return
        # under ZeRO-3 this rank holds its part of a parameter: ds_tensor, set by DeepSpeed
        # (runtime/zero/partition_parameters.py)
        kept = [getattr(p, "ds_tensor", p).detach() for p in self._compared.values()]
        own = torch.stack([_hash(tensor) for tensor in kept]).cpu()
        # the largest hash, and the negative of the smallest; slots that no rank fills stay equal
        both = torch.full((2, self._size), -_MASK - 1)
        both[0, self._slots] = own
        both[1, self._slots] = -own
        both = both.to(self._device)
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self._group)
        high, low = both.cpu()[:, self._slots]
        differing = (high != -low).nonzero().flatten().tolist()
        if not self._grid.all_true(not differing):
            self._raise(step, own, differing)

    def _raise(self, step: int, own: Tensor, differing: list[int]) -> None:
        """Raise EngineError with the ranks whose hashes differ from those of most ranks."""
        names = list(self._compared)
        own_hashes = {names[i]: (self._slots[i], int(own[i])) for i in differing}
        every = self._grid.all_gather_objects(own_hashes)
        lines = []
        for name in sorted({name for one in every for name in one}):
            hashes = [(rank, *one[name]) for rank, one in enumerate(every) if name in one]
            lines.append(f"{name} {_describe(hashes)}")
        shown = "\n".join(lines[:5]) + (f"\nand {len(lines) - 5} more" if len(lines) > 5 else "")
        raise EngineError(
            f"replicas differ at step {step}:\n{shown}\n"
            "the checkpoints of the steps before the last comparison are sound: resume from one, "
            "and look at the hosts of the ranks named"
        )


def _describe(hashes: list[tuple[int, int, int]]) -> str:
    """Return which ranks hold other numbers than most; if copies disagree evenly, all of them.

    Args:
        hashes: (rank, slot, hash) of each rank that has found a difference.
    """
    odd = list[int]()
    even = list[int]()
    for slot in {slot for _, slot, _ in hashes}:
        here = {rank: value for rank, at, value in hashes if at == slot}
        values = list(here.values())
        most = max(values, key=values.count)
        others = [rank for rank, value in here.items() if value != most]
        if others and 2 * values.count(most) <= len(values):
            even += here
        odd += others
    if even:
        return f"differs between ranks {', '.join(map(str, sorted(even)))}"
    return f"on rank {', '.join(map(str, sorted(odd)))} differs from what other ranks hold"


def _hash(tensor: Tensor) -> Tensor:
    """Return a hash of every bit and its position: int64 [], on the tensor's device."""
    bits = tensor.reshape(-1).view(torch.int32 if tensor.element_size() == 4 else torch.int16)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for number, chunk in enumerate(bits.split(_CHUNK)):
        mixed = torch.arange(len(chunk), dtype=torch.int32, device=tensor.device)
        mixed.add_(chunk).mul_(-1640531527)  # 2^32 / golden ratio (Knuth, TAOCP 6.4)
        mixed.bitwise_xor_(mixed >> 15).mul_(0x2C1B3C6D)
        total = total * 31 + mixed.sum(dtype=torch.int64) + number
    return total & _MASK
