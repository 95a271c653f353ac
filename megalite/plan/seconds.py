"""How long a step takes: a roofline of what a rank computes, moves and sends.

Each part's time is its FLOPs over a share of the peak plus its bytes over a share of the bandwidth
(a sum rather than the larger of the two: small products then fall short of the peak by themselves),
but no less than its kernels take to be started. What ranks send is added where nothing hides it.

B samples of a micro-batch   T tokens of a sample   and the letters of `megalite.arch.part`
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megalite import arch
from megalite.config import RunConfig, target_fraction
from megalite.plan.devices import Device
from megalite.plan.flops import run_flops
from megalite.plan.gradients import gradients
from megalite.plan.sizes import Plan
from megalite.plan.traffic import Collective, data_collectives, tensor_collectives
from megalite.plan.zero import local_elements


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
        forward, backward: of all micro-batches, recomputation included. The gradients of the fused
            head count as backward, although its forward makes them.
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
        document_tokens: see `window_flops`.
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
        self._element = plan.precision.bytes
        # the cores of a CPU are shared by the ranks of its host; a GPU is a rank's own
        share = layout.per_host if layout.device.kind == "cpu" else 1
        peak = layout.device.peak(plan.precision)
        if peak is None:
            raise ValueError(f"{layout.device.name} has no units for {plan.precision}")
        self._peak, self._bandwidth = peak / share, layout.device.bandwidth / share

    def seconds(self) -> Seconds:
        forward, head, backward = self._compute()
        times = self._plan.accumulation_steps
        return Seconds(
            forward=times * forward,
            backward=times * (head + backward),
            tensor=self._tensor(),
            # no message hides behind the head's gradients: the forward makes them
            data=self._data(times * (forward + head), times * backward, backward),
            optimizer=self._optimizer(),
        )

    # ---- what a rank computes

    def _compute(self) -> tuple[float, float, float]:
        """Return seconds of a micro-batch: forward, gradients of the head, rest of the backward."""
        config, plan, eff = self._config, self._plan, self._eff
        model, device = config.model, self._layout.device
        forward_of, backward_of = run_flops(config, self._document)
        made = gradients(model, config.finetune)
        share = plan.micro_batch_size / plan.tensor_parallel  # of the FLOPs of a window
        products = self._peak * device.reached * eff.matmul / share
        seen = self._peak * device.attention * eff.attention / share
        rate = self._bandwidth * eff.bandwidth
        moved = self._moved_bytes(config.training.compile) / rate
        weights = self._element * self._held / rate
        # kernels: products, attention, and what compilation leaves of the rest
        launches = self._branches * (6 if config.training.compile else 13) * eff.launch
        one = forward_of.blocks / products + forward_of.attention / seen + moved + weights
        forward = max(one, launches)
        again = {"none": 0.0, "selective": moved, "full": forward}
        recompute = again[config.training.activation_checkpointing]
        # attention's backward computes its scores again: 2.5 times its forward, not twice
        two = backward_of.blocks / products + 1.25 * backward_of.attention / seen
        # weights are read for the inputs' gradients; of those that learn a gradient comes and goes
        two += weights + 2 * self._element * self._trained / rate
        accumulation = (8 + self._element) * self._trained / rate  # in fp32
        reached = made.share(model)
        backward = max(two + 2 * reached * moved + accumulation, 2 * reached * launches)
        # of six passes over the logits, two make the loss and four turn it into gradients
        logits = self._logit_bytes / rate
        forward += forward_of.head / products + logits / 3
        return forward, backward_of.head / products + 2 / 3 * logits, backward + reached * recompute

    @cached_property
    def _held(self) -> int:
        return local_elements(self._config, self._plan.tensor_parallel)

    @cached_property
    def _trained(self) -> int:
        return local_elements(self._config, self._plan.tensor_parallel, trained=True)

    @property
    def _branches(self) -> int:
        """Attention, attention to what is read, and the MLP, of all blocks."""
        stacks = arch.stacks(self._config.model)
        return sum((3 if name == "model.decoder" else 2) * n for name, n in stacks.items())

    @property
    def _logit_bytes(self) -> float:
        """Bytes of a vocabulary's logits that pass through memory, made and turned into gradients:
        of a micro-batch; a label's scores are none to speak of.
        """
        config, plan = self._config, self._plan
        if config.model.num_labels:
            return 0.0
        *_, length = arch.lengths(config).values()
        places = target_fraction(config) * plan.micro_batch_size * length
        return 6 * 4 * places * config.model.vocab_size / plan.tensor_parallel

    def _moved_bytes(self, compiled: bool) -> int:
        """Bytes that the blocks' forward moves beside its products' weights: of a micro-batch."""
        config, plan, t = self._config, self._plan, self._plan.tensor_parallel
        model, lengths = config.model, arch.lengths(config)
        own = model.hidden_size // t if config.parallel.sequence else model.hidden_size
        q = model.num_attention_heads * model.head_dim // t
        k = model.num_key_value_heads * model.head_dim // t
        f = model.intermediate_size // t
        # read and written: norms, residuals, rotation, activation; then what the products do
        fused, plain = 6 * own + 3 * (q + k), 14 * own + 10 * (q + k)
        inner = (3 if model.gated else 2) * f
        rest = (fused + inner) if compiled else (plain + 2 * inner)
        block = rest + 2 * model.hidden_size + 2 * q + 2 * k + inner
        total = 0
        for stack, layers in arch.stacks(model).items():
            total += layers * lengths[stack] * block
            if stack == "model.decoder":  # a third norm and residual, and its products
                cross = (3 if compiled else 7) * own + model.hidden_size + 2 * q
                read = model.hidden_size + 2 * k
                total += layers * (lengths[stack] * cross + lengths["model.encoder"] * read)
        return self._element * plan.micro_batch_size * total

    def _optimizer(self) -> float:
        """AdamW reads and writes weights and both moments, in fp32, and reads the gradient."""
        plan = self._plan
        own = self._trained / (plan.data_parallel if plan.zero_stage else 1)
        moved = own * (28 + self._element)
        if self._plan.zero.offloads_optimizer and self._layout.device.kind != "cpu":
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
        if not plan.zero.overlap_comm:
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
