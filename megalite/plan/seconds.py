"""How long a step takes: a roofline of what a rank computes, moves and sends.

Each part's time is its FLOPs over a share of the peak plus its bytes over a share of the bandwidth
(a sum rather than the larger of the two: small products then fall short of the peak by themselves),
but no less than its kernels take to be started. What ranks send is added where nothing hides it.

B samples of a micro-batch   T tokens of a sample   and the letters of `megalite.shapes`
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megalite import shapes
from megalite.config import RunConfig, source_length, target_length
from megalite.plan.devices import Device
from megalite.plan.flops import forward_flops
from megalite.plan.memory import local_elements, offloads
from megalite.plan.sizes import Plan
from megalite.plan.traffic import Collective, data_collectives, tensor_collectives


@dataclass(frozen=True)
class Layout:
    """Where the ranks are: hosts of `per_host` devices each."""

    device: Device
    hosts: int
    per_host: int


@dataclass(frozen=True)
class Seconds:
    """Of one optimizer step on one rank; `tensor` and `data` are what is not hidden.

    Attributes:
        forward, backward: of all micro-batches, recomputation included.
    """

    forward: float
    backward: float
    tensor: float
    data: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.tensor + self.data + self.optimizer


def step_seconds(
    config: RunConfig,
    plan: Plan,
    layout: Layout,
    *,
    document_tokens: float | None = None,
) -> Seconds:
    """Seconds of a step's parts.

    Args:
        document_tokens: see `forward_flops`.
    Raises:
        ValueError: a device without units for the run's precision.
    """
    return _Clock(config, plan, layout, document_tokens).seconds()


class _Clock:
    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        layout: Layout,
        document_tokens: float | None,
    ) -> None:
        self._config, self._plan, self._layout = config, plan, layout
        self._eff, self._document = layout.device.efficiencies, document_tokens
        self._element = 4 if plan.precision == "fp32" else 2
        # the cores of a CPU are shared by the ranks of its host; a GPU is a rank's own
        share = layout.per_host if layout.device.kind == "cpu" else 1
        peak = layout.device.peak(plan.precision)
        if peak is None:
            raise ValueError(f"{layout.device.name} has no units for {plan.precision}")
        self._peak, self._bandwidth = peak / share, layout.device.bandwidth / share

    def seconds(self) -> Seconds:
        forward, backward = self._compute()
        times = self._plan.accumulation_steps
        return Seconds(
            forward=times * forward,
            backward=times * backward,
            tensor=self._tensor(),
            data=self._data(times * forward, times * backward, backward),
            optimizer=self._optimizer(),
        )

    # ---- what a rank computes

    def _compute(self) -> tuple[float, float]:
        """Seconds of a micro-batch's forward, and of its backward."""
        config, plan, eff = self._config, self._plan, self._eff
        t, T, device = plan.tensor_parallel, plan.sequence_length, self._layout.device
        flops = forward_flops(
            config.model,
            T,
            read=source_length(config),
            written=target_length(config),
            document_tokens=self._document,
            counted=(counted := shapes.counted_share(config)),
        )
        B = plan.micro_batch_size
        blocks = B * flops.blocks / t / (self._peak * device.reached * eff.matmul)
        attention = B * flops.attention / t / (self._peak * device.attention * eff.attention)
        head = B * flops.head / t / (self._peak * device.reached * eff.matmul)
        rate = self._bandwidth * eff.bandwidth
        layers = sum(shapes.stacks(config.model).values())
        compiled = config.training.compile
        moved = layers * self._block_bytes(compiled) / rate
        weights = self._element * self._matrices / rate
        logits = 6 * 4 * counted * B * T * config.model.vocab_size / t / rate
        # kernels: products, attention, and what compilation leaves of the rest
        launches = layers * (12 if compiled else 26) * eff.launch
        one = blocks + attention + moved + weights
        forward = max(one, launches)
        again = {"none": 0.0, "selective": moved, "full": forward}
        recompute = again[config.training.activation_checkpointing]
        # twice the products; attention's backward computes its scores again: 2.5 times
        two = 2 * blocks + 2.5 * attention + 2 * moved + 3 * weights
        backward = max(two + self._accumulation / rate, 2 * launches) + recompute
        # the head's gradients are made in the forward
        return forward + 3 * head + logits, backward

    @cached_property
    def _matrices(self) -> int:
        return local_elements(self._config, self._plan.tensor_parallel)

    @property
    def _accumulation(self) -> int:
        """Bytes of adding a micro-batch's gradients to those before it, in fp32."""
        return (8 + self._element) * local_elements(
            self._config, self._plan.tensor_parallel, trained=True
        )

    def _block_bytes(self, compiled: bool) -> int:
        """Bytes that a block's forward moves beside its products' weights: of a micro-batch."""
        model, plan, t = self._config.model, self._plan, self._plan.tensor_parallel
        own = model.hidden_size // t if self._config.parallel.sequence else model.hidden_size
        q = model.num_attention_heads * model.head_dim // t
        k = model.num_key_value_heads * model.head_dim // t
        f = model.intermediate_size // t
        # read and written: norms, residuals, rotation, activation; then what the products do
        fused, plain = 6 * own + 3 * (q + k), 14 * own + 10 * (q + k)
        inner = (3 if model.gated else 2) * f
        rest = (fused + inner) if compiled else (plain + 2 * inner)
        products = 2 * model.hidden_size + 2 * q + 2 * k + (3 if model.gated else 2) * f
        tokens = plan.micro_batch_size * plan.sequence_length
        return self._element * tokens * (rest + products)

    def _optimizer(self) -> float:
        """AdamW reads and writes weights and both moments, in fp32, and reads the gradient."""
        config, plan = self._config, self._plan
        n = local_elements(config, plan.tensor_parallel, trained=True)
        own = n / (plan.data_parallel if plan.zero_stage else 1)
        moved = own * (28 + self._element)
        if offloads(config) and self._layout.device.kind != "cpu":
            return moved / (self._layout.device.host_link * self._eff.bandwidth)
        return moved / (self._bandwidth * self._eff.bandwidth)

    # ---- what ranks send

    def _tensor(self) -> float:
        calls, ranks = tensor_collectives(self._config, self._plan), self._plan.tensor_parallel
        return self._send(calls, ranks, self._rate(ranks, ranks))

    def _data(self, forward: float, backward: float, last: float) -> float:
        """What ZeRO's messages take beyond what hides them."""
        plan, ranks = self._plan, self._plan.data_parallel
        calls = data_collectives(self._config, plan)
        near = max(1, self._layout.per_host // plan.tensor_parallel)
        sent = self._send(calls, ranks, self._rate(ranks, min(near, ranks)))
        section = self._config.deepspeed.get("zero_optimization", {})
        if section.get("overlap_comm", plan.zero_stage == 3) is not True:
            return sent
        room = {3: forward + backward, 2: backward}.get(plan.zero_stage, last)
        return max(0.0, sent - self._eff.hidden * room)

    def _rate(self, ranks: int, near: int) -> float:
        """Bytes/s that each rank of a ring sends, `near` of whose members share a host."""
        device, eff = self._layout.device, self._eff
        share = self._layout.per_host if device.kind == "cpu" else 1
        link = device.link * eff.link / share
        if ranks <= near:
            return link
        return min(link, device.network * eff.network * near)

    def _send(self, calls: tuple[Collective, ...], ranks: int, rate: float) -> float:
        latency = self._eff.latency
        return sum(call.sent_bytes(ranks) / rate + call.count * latency for call in calls)
