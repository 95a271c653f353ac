"""Step time: a roofline model of what a rank computes, moves and sends.

A part takes its FLOPs over a share of the peak, plus its bytes over a share of the bandwidth. This
is a sum, not the larger of the two, so that small products stay below the peak. A part takes at
least as long as its kernels take to launch. Communication that does not overlap is added.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megalite.config import RunConfig
from megalite.plan.devices import Device
from megalite.plan.flops import run_flops
from megalite.plan.gradients import gradients
from megalite.plan.sizes import Plan
from megalite.plan.traffic import Collective, data_collectives, tensor_collectives
from megalite.plan.workloads import run_costs
from megalite.plan.zero import local_elements


@dataclass(frozen=True)
class Cluster:
    """The hardware of a run: hosts with `per_host` devices each."""

    device: Device
    hosts: int
    per_host: int


@dataclass(frozen=True)
class Seconds:
    """Seconds of one optimizer step on one rank.

    Attributes:
        forward: all micro-batches.
        backward: all micro-batches, with recomputation. The fused head's gradients count here,
            although its forward computes them.
        tensor: messages of tensor parallelism.
        data: ZeRO's messages that do not overlap with computation.
    """

    forward: float
    backward: float
    tensor: float
    data: float
    optimizer: float

    @property
    def total(self) -> float:
        """Return the seconds of the whole step."""
        return self.forward + self.backward + self.tensor + self.data + self.optimizer


def step_seconds(
    config: RunConfig,
    plan: Plan,
    cluster: Cluster,
    *,
    document_tokens: float | None = None,
) -> Seconds:
    """Return the seconds of a step.

    Args:
        document_tokens: see `window_flops`.
    Raises:
        ValueError: the device has no units for the run's precision.
    """
    return _Clock(config, plan, cluster, document_tokens).seconds()


class _Clock:
    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        cluster: Cluster,
        document_tokens: float | None,
    ) -> None:
        self._config, self._plan, self._cluster = config, plan, cluster
        self._eff = cluster.device.efficiencies
        self._document = document_tokens
        self._element = plan.precision.bytes
        # ranks of a host share the CPU's cores; each rank has its own GPU
        share = cluster.per_host if cluster.device.kind == "cpu" else 1
        peak = cluster.device.peak(plan.precision)
        if peak is None:
            raise ValueError(f"{cluster.device.name} has no units for {plan.precision}")
        self._peak = peak / share
        self._bandwidth = cluster.device.bandwidth / share

    def seconds(self) -> Seconds:
        forward, head, backward = self._compute()
        times = self._plan.accumulation_steps
        return Seconds(
            forward=times * forward,
            backward=times * (head + backward),
            tensor=self._tensor(),
            # the forward computes the head's gradients, so they overlap with no message
            data=self._data(times * (forward + head), times * backward, backward),
            optimizer=self._optimizer(),
        )

    # ---- what a rank computes

    def _compute(self) -> tuple[float, float, float]:
        """Return a micro-batch's seconds: forward, gradients of the head, rest of the backward."""
        config, plan, eff = self._config, self._plan, self._eff
        device = self._cluster.device
        forward_of, backward_of = run_flops(config, self._document)
        share = plan.micro_batch_size / plan.mesh.tensor  # of the FLOPs of a window
        product_rate = self._peak * device.reached * eff.matmul / share
        attention_rate = self._peak * device.attention * eff.attention / share
        rate = self._bandwidth * eff.bandwidth
        costs = run_costs(config, plan)
        moved = sum(count * part.moved for part, count in costs.kinds) / rate
        weights = self._element * self._local / rate
        launches = sum(count * part.kernels for part, count in costs.kinds) * eff.launch
        forward = forward_of.blocks / product_rate + forward_of.attention / attention_rate
        forward = max(forward + moved + weights, launches)
        by_mode = {"none": 0.0, "selective": moved, "full": forward}
        recompute = by_mode[config.training.activation_checkpointing]
        # attention's backward recomputes its scores (FlashAttention, Dao et al. 2022, algorithm 4):
        # 2.5 times its forward, not twice
        backward = backward_of.blocks / product_rate
        backward += 1.25 * backward_of.attention / attention_rate
        # input gradients read the weights; weight gradients are written and read
        backward += weights + 2 * self._element * self._trained / rate
        accumulation = (8 + self._element) * self._trained / rate  # in fp32
        reached = gradients(config.model, config.finetune).share
        backward = max(backward + 2 * reached * moved + accumulation, 2 * reached * launches)
        # of six passes over the logits, two compute the loss and four the gradients
        logits = costs.head.logits.traffic / rate
        forward += forward_of.head / product_rate + logits / 3
        head_gradients = backward_of.head / product_rate + 2 / 3 * logits
        return forward, head_gradients, backward + reached * recompute

    @cached_property
    def _local(self) -> int:
        return local_elements(self._config, self._plan.mesh.tensor)

    @cached_property
    def _trained(self) -> int:
        return local_elements(self._config, self._plan.mesh.tensor, trained=True)

    def _optimizer(self) -> float:
        """Return the seconds of an update.

        AdamW reads and writes weights and both moments in fp32, and reads the gradient.
        """
        plan = self._plan
        updated = self._trained / (plan.data_parallel if plan.zero_stage else 1)
        moved = updated * (28 + self._element)
        if self._plan.zero.offloads_optimizer and self._cluster.device.kind != "cpu":
            return moved / (self._cluster.device.host_link * self._eff.bandwidth)
        return moved / (self._bandwidth * self._eff.bandwidth)

    # ---- what ranks send

    def _tensor(self) -> float:
        calls = tensor_collectives(self._config, self._plan)
        ranks = self._plan.mesh.tensor
        return self._send(calls, ranks, self._rate(ranks, ranks))

    def _data(self, forward: float, backward: float, last: float) -> float:
        """Return the seconds of ZeRO's messages that do not overlap with computation."""
        plan = self._plan
        ranks = self._plan.data_parallel
        calls = data_collectives(self._config, plan)
        near = max(1, self._cluster.per_host // plan.mesh.tensor)
        sent = self._send(calls, ranks, self._rate(ranks, min(near, ranks)))
        if not plan.zero.overlap_comm:
            return sent
        overlapping = {3: forward + backward, 2: backward}.get(plan.zero_stage, last)
        return max(0.0, sent - self._eff.hidden * overlapping)

    def _rate(self, ranks: int, near: int) -> float:
        """Return the bytes/s that each rank of a ring sends.

        Args:
            near: ranks of the ring that share a host.
        """
        device = self._cluster.device
        eff = self._eff
        share = self._cluster.per_host if device.kind == "cpu" else 1
        link = device.link * eff.link / share
        if ranks <= near:
            return link
        return min(link, device.network * eff.network * near)

    def _send(self, calls: tuple[Collective, ...], ranks: int, rate: float) -> float:
        latency = self._eff.latency
        return sum(call.sent_bytes(ranks) / rate + call.count * latency for call in calls)
