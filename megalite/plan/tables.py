"""A forecast as lines to read."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence

from megalite.config import RunConfig
from megalite.plan.forecast import Forecast
from megalite.plan.search import Candidate

_GIB = 1 << 30
_BAR, _BEFORE = 40, 29  # characters of a bar as long as the device's memory, and of what leads it


def describe(config: RunConfig, found: Forecast) -> str:
    """Memory with bars, time, traffic, and the whole run."""
    return "\n".join(_lines(config, found)) + "\n"


def _lines(config: RunConfig, found: Forecast) -> Iterator[str]:
    plan, layout, device = found.plan, found.layout, found.layout.device
    sequence = " with sequence" if config.parallel.sequence else ""
    yield (
        f"{config.name}: {plan.parameters:,} parameters in {plan.precision} on {layout.hosts} x "
        f"{layout.per_host} {device.name}: tensor {plan.tensor_parallel}{sequence}, data "
        f"{plan.data_parallel}, ZeRO {plan.zero_stage}, micro-batch {plan.micro_batch_size} x "
        f"{plan.accumulation_steps}, recompute {config.training.activation_checkpointing}"
    )
    yield ""
    yield f"{'memory of a rank':<18} {'GiB':>8}"
    for name, size in plan.memory_bytes.items():
        if name != "total":
            yield f"  {name:<16} {size / _GIB:8.2f}  {_bar(size / device.memory)}"
    yield f"  {'total at the peak':<16}{plan.memory_bytes['total'] / _GIB:8.2f}"
    if found.margin:
        yield f"  {'driver and waste':<16} {found.margin / _GIB:8.2f}"
    verdict = "left: it fits" if found.fits else "too much: it does not fit"
    yield f"  {'device':<16} {device.memory / _GIB:8.2f}  {abs(found.free) / _GIB:.2f} {verdict}"
    for name, size in found.host_bytes.items():
        if size:
            yield f"  on the host: {name} {size / _GIB:.2f}"
    yield ""
    yield from _time(config, found)
    if found.collectives:
        yield ""
        link, network = (f"{rate / 1e9:,g} GB/s" for rate in (device.link, device.network))
        yield f"links of a device, one way: {link} within a host, {network} to others"
        yield f"{'a step sends':<8} {'':22} {'calls':>8} {'GiB, whole':>12}"
        sent: dict[str, tuple[int, int]] = {}
        for call in found.collectives:  # those of a kind, whatever their sizes
            name = f"{call.group} {call.kind} {call.dtype}"
            count, size = sent.get(name, (0, 0))
            sent[name] = count + call.count, size + call.bytes
        for name, (count, size) in sent.items():
            yield f"  {name:<29} {count:8,} {size / _GIB:12.3f}"


def _bar(share: float) -> str:
    """A bar, cut where the terminal ends."""
    room = max(1, shutil.get_terminal_size().columns - _BEFORE)
    length = round(_BAR * min(share, room))
    return "#" * length if length <= room else "#" * (room - 1) + ">"


def _time(config: RunConfig, found: Forecast) -> Iterator[str]:
    plan, seconds = found.plan, found.seconds
    yield f"{'a step':<18} {'seconds':>8}"
    for name, value in vars(seconds).items():
        told = {"tensor": "tensor messages", "data": "ZeRO's messages"}.get(name, name)
        if value:
            yield f"  {told:<16} {value:8.3f}  {_bar(value / seconds.total)}"
    rate = found.tokens_per_second
    yield f"  {'in all':<16} {seconds.total:8.3f}"
    yield (
        f"  {rate:,.0f} tokens/s, {rate / plan.world_size:,.0f} a device; MFU "
        f"{100 * found.mfu:.1f} %; {plan.flops_per_token / 1e9:,.2f} GFLOPs a token, "
        f"{found.hardware_flops_per_token / 1e9:,.2f} with recompute"
    )
    steps = config.training.steps
    if steps == 0:  # the examples and their epochs tell
        return
    run = steps * seconds.total
    yield (
        f"the run: {steps:,} steps, {steps * plan.tokens_per_step / 1e9:,.2f} billion tokens, "
        f"{run / 86400:,.2f} days, {run * plan.world_size / 3600:,.0f} device hours"
    )


def compare(candidates: Sequence[Candidate], most: int = 10) -> str:
    """The best of a search, a line each."""
    head = ("tokens/s", "MFU", "GiB left", "tensor", "ZeRO", "micro", "recompute", "optimizer")
    lines = ["{:>10} {:>6} {:>8}  {:<8} {:<4} {:>5}  {:<9}  {}".format(*head)]
    for candidate in candidates[:most]:
        found, changes = candidate.forecast, candidate.changes
        zero = changes["deepspeed"]["zero_optimization"]
        tensor = f"{found.plan.tensor_parallel}{'+seq' * changes['parallel']['sequence']}"
        again = changes["training"]["activation_checkpointing"]
        place = "host" if zero["offload_optimizer"]["device"] == "cpu" else "device"
        lines.append(
            f"{found.tokens_per_second:10,.0f} {found.mfu:6.1%} {found.free / _GIB:8.1f}  "
            f"{tensor:<8} {zero['stage']:<4} {found.plan.micro_batch_size:>5}  {again:<9}  {place}"
        )
    return "\n".join(lines) + "\n"
