"""Replicas that should be equal, compared while the run goes on.

Ranks hold the same numbers in two ways: under ZeRO 0 to 2 data-parallel ranks the same weights,
and tensor-parallel ranks the same norms and biases at every stage. Nothing in training compares
them again, so once they differ (a bit that flipped, a sum that one rank missed) they stay so, and
every checkpoint holds one rank's view.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalite import arch
from megalite.config import ModelConfig
from megalite.engine import Engine
from megalite.errors import EngineError
from megalite.parallel import Grid

_CHUNK = 1 << 20  # elements hashed at once, so that temporaries stay in a cache
_MASK = (1 << 62) - 1  # hashes are at least 0, and their negatives have room


class DriftGuard:
    """Compares by hashes in one small reduction.

    Args:
        stage: ZeRO's; at 3 data-parallel ranks hold different parts.
    """

    def __init__(self, engine: Engine, model: ModelConfig, grid: Grid, *, stage: int) -> None:
        self._grid = grid
        self._group = grid.tensor_group if stage == 3 else grid.cpu_group
        self._device = grid.device if stage == 3 else torch.device("cpu")
        # where tensor ranks hold different parts, each has a place of its own
        parts = grid.mesh.tensor if stage < 3 else 0
        self._compared: dict[str, nn.Parameter] = {}
        self._places: list[int] = []  # of each in the vector that is reduced
        self._size = 0
        rows = {row.name: row for row in arch.parameters(model)}
        for name, parameter in engine.model.named_parameters():
            alike = rows[name].tensors[0].split is arch.Split.REPLICATED
            places = 1 if alike else parts
            if places:
                self._compared[name] = parameter
                self._places.append(self._size if alike else self._size + grid.at.tensor_rank)
                self._size += places
        if dist.get_world_size(self._group) == 1:
            self._compared = {}

    def check(self, step: int) -> None:
        """Compare; a collective of all ranks.

        Raises:
            EngineError: on every rank, naming the parameters that differ and the ranks they
                differ on.
        """
        if not self._compared:
            return
        # what this rank keeps of a parameter: itself, or under ZeRO-3 its part
        kept = [getattr(p, "ds_tensor", p).detach() for p in self._compared.values()]
        own = torch.stack([_hash(tensor) for tensor in kept]).cpu()
        # the largest, and the negative of the smallest; what no rank has a part of stays equal
        both = torch.full((2, self._size), -_MASK - 1)
        both[0, self._places], both[1, self._places] = own, -own
        both = both.to(self._device)
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self._group)
        high, low = both.cpu()[:, self._places]
        differing = (high != -low).nonzero().flatten().tolist()
        if not self._grid.all_true(not differing):
            self._raise(step, own, differing)

    def _raise(self, step: int, own: Tensor, differing: list[int]) -> None:
        """Find the ranks whose hashes are not those of the most."""
        names = list(self._compared)
        found = {names[i]: (self._places[i], int(own[i])) for i in differing}
        every = self._grid.all_gather_objects(found)
        lines = []
        for name in sorted({name for one in every for name in one}):
            hashes = [(rank, *one[name]) for rank, one in enumerate(every) if name in one]
            lines.append(f"{name} {_describe(hashes)}")
        shown = "\n".join(lines[:5]) + (f"\nand {len(lines) - 5} more" if len(lines) > 5 else "")
        raise EngineError(
            f"replicas have drifted apart by step {step}:\n{shown}\n"
            "the checkpoints of the steps before the last comparison are sound: resume from one, "
            "and look at the hosts of the ranks named"
        )


def _describe(hashes: list[tuple[int, int, int]]) -> str:
    """Which ranks are odd, of (rank, place, hash); where copies disagree evenly, which ranks do."""
    odd, even = list[int](), list[int]()
    for place in {place for _, place, _ in hashes}:
        here = {rank: value for rank, at, value in hashes if at == place}
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
    """A number of every bit and its place: int64 [], on the tensor's device."""
    bits = tensor.reshape(-1).view(torch.int32 if tensor.element_size() == 4 else torch.int16)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for number, chunk in enumerate(bits.split(_CHUNK)):
        mixed = torch.arange(len(chunk), dtype=torch.int32, device=tensor.device)
        mixed.add_(chunk).mul_(-1640531527)  # 2^32 over the golden ratio, wrapping
        mixed.bitwise_xor_(mixed >> 15).mul_(0x2C1B3C6D)
        total = total * 31 + mixed.sum(dtype=torch.int64) + number
    return total & _MASK
