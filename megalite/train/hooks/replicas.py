"""Comparison of replicas during training.

Under ZeRO 0 to 2 the ranks of a ZeRO group have the same weights. At every stage the ranks of a
tensor group have the same norms and biases. Nothing in training compares these replicas. If they
differ once (a flipped bit, a failed reduction), they stay different, and checkpoints contain the
numbers of one rank.
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

_CHUNK = 1 << 20  # elements hashed at a time, so that temporaries fit into the cache
_MASK = (1 << 62) - 1  # hashes are not negative, and their negatives do not overflow


class ReplicaCheck(Hook):
    """Comparison of replicas by hashes, in one small reduction.

    Args:
        every: steps between comparisons. There is also a comparison before each save.
        stage: ZeRO stage. At stage 3 the ranks of a ZeRO group hold different parts.
    """

    def __init__(
        self, engine: Engine, model: ModelConfig, grid: Grid, *, every: int, stage: int
    ) -> None:
        self._grid = grid
        self._every = every
        self._checked_step = -1
        self._group = grid.tensor_group if stage == 3 else grid.cpu_group
        self._device = grid.device if stage == 3 else torch.device("cpu")
        # a split parameter has a slot for each tensor rank
        parts = grid.mesh.tensor if stage < 3 else 0
        tensor_rank = grid.tensor_coordinates.index(grid.at)
        self._compared: dict[str, nn.Parameter] = {}
        self._slots: list[int] = []  # index of each parameter in the reduced vector
        self._size = 0
        rows = {row.name: row for row in arch.parameters(model)}
        for name, parameter in engine.model.named_parameters():
            replicated = rows[name].tensors[0].split is arch.Split.REPLICATED
            slots = 1 if replicated else parts
            if slots:
                self._compared[name] = parameter
                self._slots.append(self._size if replicated else self._size + tensor_rank)
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
        self._checked_step = -1

    def _check_once(self, step: int) -> None:
        if self._checked_step != step:
            self.check(step)
            self._checked_step = step

    def check(self, step: int) -> None:
        """Compare the replicas; a collective.

        Raises:
            EngineError: on every rank, if replicas differ. It names the parameters, and the ranks
                that differ from the majority.
        """
        if not self._compared:
            return
        # under ZeRO-3, ds_tensor is this rank's part (runtime/zero/partition_parameters.py)
        local = [getattr(p, "ds_tensor", p).detach() for p in self._compared.values()]
        hashes = torch.stack([_hash(tensor) for tensor in local]).cpu()
        # one maximum gives the largest hash and the negative of the smallest
        both = torch.full((2, self._size), -_MASK - 1)
        both[0, self._slots] = hashes
        both[1, self._slots] = -hashes
        both = both.to(self._device)
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self._group)
        high, low = both.cpu()[:, self._slots]
        differing = (high != -low).nonzero().flatten().tolist()
        if not self._grid.all_true(not differing):
            self._raise(step, hashes, differing)

    def _raise(self, step: int, hashes: Tensor, differing: list[int]) -> None:
        """Raise EngineError with the ranks whose hashes differ from the majority."""
        names = list(self._compared)
        local = {names[i]: (self._slots[i], int(hashes[i])) for i in differing}
        by_rank = self._grid.all_gather_objects(local)
        lines = []
        for name in sorted({name for each in by_rank for name in each}):
            copies = [(rank, *each[name]) for rank, each in enumerate(by_rank) if name in each]
            lines.append(f"{name} {_describe(copies)}")
        shown = "\n".join(lines[:5]) + (f"\nand {len(lines) - 5} more" if len(lines) > 5 else "")
        raise EngineError(
            f"replicas differ at step {step}:\n{shown}\n"
            "checkpoints from before the last comparison are valid: resume from one of them, and "
            "check the hosts of these ranks"
        )


def _describe(copies: list[tuple[int, int, int]]) -> str:
    """Return the ranks that differ from the majority, or all ranks if there is no majority.

    Args:
        copies: (rank, slot, hash) of each rank that saw a difference.
    """
    minority = list[int]()
    undecided = list[int]()
    for slot in {slot for _, slot, _ in copies}:
        by_rank = {rank: value for rank, at, value in copies if at == slot}
        values = list(by_rank.values())
        most = max(values, key=values.count)
        others = [rank for rank, value in by_rank.items() if value != most]
        if others and 2 * values.count(most) <= len(values):
            undecided += by_rank
        minority += others
    if undecided:
        return f"differs between ranks {', '.join(map(str, sorted(undecided)))}"
    return f"on rank {', '.join(map(str, sorted(minority)))} differs from that of other ranks"


def _hash(tensor: Tensor) -> Tensor:
    """Return a hash of all bits and their positions: int64 [], on the tensor's device."""
    bits = tensor.reshape(-1).view(torch.int32 if tensor.element_size() == 4 else torch.int16)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for number, chunk in enumerate(bits.split(_CHUNK)):
        mixed = torch.arange(len(chunk), dtype=torch.int32, device=tensor.device)
        mixed.add_(chunk).mul_(-1640531527)  # 2^32 / golden ratio (Knuth, TAOCP 6.4)
        mixed.bitwise_xor_(mixed >> 15).mul_(0x2C1B3C6D)
        total = total * 31 + mixed.sum(dtype=torch.int64) + number
    return total & _MASK
