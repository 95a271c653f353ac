"""Which layouts are tried: the rows of the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megalite import shapes
from megalite.config import ModelConfig

# weights really leave a rank between uses, however small
_RELEASED = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 1000,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_reuse_distance": 0,
}


@dataclass(frozen=True)
class Layout:
    """One way to train the model: ranks that share it, ranks that share a batch, and options.

    micro_batch_size: samples; None: a rank's whole share of the batch at once.
    sequence: whether the ranks of `tensor` share the tokens too.
    """

    tensor: int = 1
    data: int = 1
    stage: int = 1
    micro_batch_size: int | None = None
    recompute: Literal["none", "selective", "full"] = "none"
    sequence: bool = False
    engine: Literal["deepspeed", "reference"] = "deepspeed"

    @property
    def ranks(self) -> int:
        return self.tensor * self.data

    @property
    def name(self) -> str:
        if self.engine == "reference":
            return "reference"
        notes = ", sequence" if self.sequence else ""
        notes += "" if self.recompute == "none" else f", {self.recompute} recompute"
        if self.micro_batch_size is not None:
            notes += f", micro-batch {self.micro_batch_size}"
        return f"TP {self.tensor} x DP {self.data} ZeRO {self.stage}{notes}"

    def sections(self, global_batch_size: int) -> dict[str, dict[str, Any]]:
        """What of a run file makes it this layout."""
        micro_batch_size = self.micro_batch_size or global_batch_size // self.data
        released = _RELEASED if self.stage == 3 else {}
        return {
            "parallel": {"tensor": self.tensor, "sequence": self.sequence},
            "training": {
                "micro_batch_size": micro_batch_size,
                "activation_checkpointing": self.recompute,
            },
            "deepspeed": {"zero_optimization": {"stage": self.stage, **released}},
        }


@dataclass(frozen=True)
class Resume:
    """A run saved under one layout that goes on under another."""

    saved: Layout
    resumed: Layout

    @property
    def name(self) -> str:
        return f"{self.saved.name} -> {self.resumed.name}"


REFERENCE = Layout(stage=0, engine="reference")


def layouts(model: ModelConfig, ranks: int) -> list[Layout]:
    """The layouts of a model that fit `ranks`, the reference first."""
    return list(dict.fromkeys([REFERENCE, *_layouts(model, ranks)]))


def _layouts(model: ModelConfig, ranks: int) -> Iterator[Layout]:
    sizes = [n for n in shapes.allowed_tensor_parallel(model) if 1 < n <= ranks]
    for stage in range(4):
        yield Layout(data=ranks, stage=stage)
    for index, size in enumerate(sizes):  # the norm is ours at stage 0, DeepSpeed's above
        yield Layout(tensor=size, stage=index % 2)
    pairs = 2 if ranks < 8 else ranks // 2  # replicas of a model that two ranks share
    if 2 in sizes and ranks >= 4:
        for stage in (1, 2, 3):
            yield Layout(tensor=2, data=pairs, stage=stage)
    yield Layout(data=min(2, ranks), stage=2, micro_batch_size=1)
    if 2 in sizes:
        yield Layout(tensor=2, stage=1, recompute="full")
        yield Layout(tensor=2, data=2 if ranks >= 4 else 1, stage=3, recompute="selective")
    else:
        yield Layout(data=min(2, ranks), stage=1, recompute="full")
        yield Layout(data=min(2, ranks), stage=3, recompute="selective")


def resumes(tried: Sequence[Layout]) -> list[Resume]:
    """Pairs of the layouts tried, their results known: save under one, go on under another.

    Two layouts save; every plain layout goes on from one of them, the reference from both.
    """
    plain = [x for x in tried if x.recompute == "none" and x.micro_batch_size is None]
    both = [x for x in plain if x.tensor > 1 and x.data > 1 and x.stage == 1]
    split = both or [x for x in plain if x.tensor > 1 and x.stage == 1]
    split = split or [x for x in plain if x.tensor > 1]
    whole = [x for x in plain if x.tensor == 1 and x.stage == 3]
    sources = (split or [x for x in plain if x.stage == 2])[:1] + whole[:1]
    pairs = []
    for index, layout in enumerate(plain):
        others = [x for x in sources if x != layout]
        chosen = others if layout == REFERENCE else [others[index % len(others)]]
        pairs += [Resume(saved, layout) for saved in chosen]
    return pairs
