"""The layouts that parity compares: the rows of its report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from megalite import env
from megalite.config import ModelConfig, allowed_tensor_sizes

# under ZeRO-3, release even small weights between uses
_RELEASED = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 1000,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_reuse_distance": 0,
}


@dataclass(frozen=True)
class ParityLayout:
    """One way to train the model: the ranks of each axis, and options.

    Attributes:
        tensor: number of ranks that share a model.
        data: number of copies of the model.
        stage: ZeRO stage.
        micro_batch_size: samples per micro-batch. None means a rank's whole share of the batch.
        recompute: activation checkpointing.
        sequence: whether to use sequence parallelism over the tensor ranks.
        offload: whether to keep and update optimizer states on the host.
        optimizer: replaces the run file's optimizer. None keeps the run file's.
    """

    tensor: int = 1
    data: int = 1
    stage: int = 1
    micro_batch_size: int | None = None
    recompute: Literal["none", "selective", "full"] = "none"
    sequence: bool = False
    offload: bool = False
    compile: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    optimizer: Literal["muon"] | None = None
    engine: Literal["deepspeed", "reference"] = "deepspeed"

    @property
    def ranks(self) -> int:
        return self.tensor * self.data

    @property
    def reference(self) -> ParityLayout:
        """Layout whose run this layout's run must equal."""
        return replace(REFERENCE, optimizer=self.optimizer)

    @property
    def name(self) -> str:
        notes = f", {self.optimizer}" if self.optimizer else ""
        if self.engine == "reference":
            return f"reference{notes}"
        notes += "".join(f", {word}" for word in ("sequence", "offload") if getattr(self, word))
        notes += ", compiled" if self.compile else ""
        notes += "" if self.precision == "fp32" else f", {self.precision}"
        notes += "" if self.recompute == "none" else f", {self.recompute} recompute"
        if self.micro_batch_size is not None:
            notes += f", micro-batch {self.micro_batch_size}"
        return f"TP {self.tensor} x DP {self.data} ZeRO {self.stage}{notes}"

    def sections(self, global_batch_size: int) -> dict[str, dict[str, Any]]:
        """Return the sections of a run file that select this layout."""
        zero = {"stage": self.stage, **(_RELEASED if self.stage == 3 else {})}
        offload = {"offload_optimizer": {"device": "cpu"}} if self.offload else {}
        optimizer = {"optimizer": {"name": self.optimizer}} if self.optimizer else {}
        return optimizer | {
            "parallel": {"tensor": self.tensor, "sequence": self.sequence},
            "training": {
                "micro_batch_size": self.micro_batch_size or global_batch_size // self.data,
                "activation_checkpointing": self.recompute,
                "precision": self.precision,
                "compile": self.compile,
            },
            "deepspeed": {"zero_optimization": zero | offload},
        }


@dataclass(frozen=True)
class ParityResume:
    """A run saved under one layout and resumed under another."""

    saved: ParityLayout
    resumed: ParityLayout

    @property
    def name(self) -> str:
        return f"{self.saved.name} -> {self.resumed.name}"


REFERENCE = ParityLayout(stage=0, engine="reference")


def select_layouts(model: ModelConfig, ranks: int) -> list[ParityLayout]:
    """Return the layouts of a model that fit on `ranks`, the reference first."""
    return list(dict.fromkeys([REFERENCE, *_layouts(model, ranks)]))


def _layouts(model: ModelConfig, ranks: int) -> Iterator[ParityLayout]:
    sizes = [n for n in allowed_tensor_sizes(model) if 1 < n <= ranks]
    for stage in range(4):
        yield ParityLayout(data=ranks, stage=stage)
    for index, size in enumerate(sizes):  # stage 0: MegaLite's gradient norm; 1: DeepSpeed's
        yield ParityLayout(tensor=size, stage=index % 2)
    pairs = 2 if ranks < 8 else ranks // 2  # data-parallel copies, each on two tensor ranks
    if 2 in sizes and ranks >= 4:
        for stage in (1, 2, 3):
            yield ParityLayout(tensor=2, data=pairs, stage=stage)
    yield ParityLayout(data=min(2, ranks), stage=2, micro_batch_size=1)
    two = min(2, ranks)
    both = 2 if ranks >= 4 else 1
    if 2 in sizes:
        yield ParityLayout(tensor=2, stage=1, recompute="full")
        yield ParityLayout(tensor=2, data=both, stage=3, recompute="selective")
        yield ParityLayout(tensor=2, data=both, stage=1, sequence=True)
        yield ParityLayout(tensor=2, stage=3, sequence=True, recompute="selective")
        muons = ParityLayout(tensor=2, data=both, stage=2, optimizer="muon")
    else:
        yield ParityLayout(data=two, stage=1, recompute="full")
        yield ParityLayout(data=two, stage=3, recompute="selective")
        muons = ParityLayout(data=two, stage=1, optimizer="muon")
    if env.has_compiler():
        yield ParityLayout(data=two, stage=1, compile=True)
        if 2 in sizes:
            yield ParityLayout(tensor=2, stage=0, recompute="selective", compile=True)
    yield ParityLayout(data=two, stage=2, offload=True)
    yield ParityLayout(data=two, stage=1, precision="bf16")
    yield muons.reference
    yield muons
    yield ParityLayout(data=two, stage=3, optimizer="muon")


def resume_pairs(layouts: Sequence[ParityLayout]) -> list[ParityResume]:
    """Return pairs of layouts: a run is saved under the first and resumed under the second.

    Two plain layouts save. Every other plain layout resumes one of them, and the reference resumes
    both. Layouts with sequence parallelism or offload resume a plain one, and one of them saves.
    Layouts with bf16 or another optimizer are paired among themselves.
    """
    usual = [x for x in layouts if x.precision == "fp32" and x.optimizer is None]
    plain = [
        x
        for x in usual
        if x.recompute == "none"
        and x.micro_batch_size is None
        and not (x.sequence or x.offload or x.compile)
    ]
    both = [x for x in plain if x.tensor > 1 and x.data > 1 and x.stage == 1]
    split = both or [x for x in plain if x.tensor > 1 and x.stage == 1]
    split = split or [x for x in plain if x.tensor > 1]
    whole = [x for x in plain if x.tensor == 1 and x.stage == 3]
    sources = (split or [x for x in plain if x.stage == 2])[:1] + whole[:1]
    pairs = []
    for index, layout in enumerate(plain):
        others = [x for x in sources if x != layout]
        chosen = others if layout == REFERENCE else [others[index % len(others)]]
        pairs += [ParityResume(saved, layout) for saved in chosen]
    special = [x for x in usual if x.sequence or x.offload]
    pairs += [ParityResume(whole[0], x) for x in special] + [
        ParityResume(x, whole[0]) for x in special[:1]
    ]
    muons = [x for x in layouts if x.optimizer]
    pairs += [ParityResume(muons[1], muons[2]), ParityResume(muons[2], muons[0])]
    pairs += [ParityResume(x, replace(x, stage=3)) for x in layouts if x.precision == "bf16"]
    return pairs
