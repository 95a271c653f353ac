"""Forecasts as text."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

from megalite.config import RunConfig
from megalite.plan.forecast import Forecast
from megalite.plan.search import Candidate, Ranking

_ROW = "{:>5} {:>10} {:>6} {:>8}  {:<8} {:<4} {:>5}  {:<9}  {:<9} {:>8} {:>8} {:>8}"
_MIB, _GIB = 1 << 20, 1 << 30
_BAR = 40  # characters of a full bar
_BEFORE = 29  # characters to the left of a bar


def describe_forecast(config: RunConfig, result: Forecast) -> str:
    """Return a forecast as text: memory with bars, time, communication, and the whole run."""
    return "\n".join(_lines(config, result)) + "\n"


def _lines(config: RunConfig, result: Forecast) -> Iterator[str]:
    plan = result.plan
    cluster = result.cluster
    device = cluster.device
    sequence = " with sequence" if config.parallel.sequence else ""
    yield (
        f"{config.name}: {plan.parameters:,} parameters in {plan.precision} on {cluster.hosts} x "
        f"{cluster.per_host} {device.name}: tensor {plan.mesh.tensor}{sequence}, data "
        f"{plan.data_parallel}, ZeRO {plan.zero_stage}, micro-batch {plan.micro_batch_size} x "
        f"{plan.accumulation_steps}, recompute {config.training.activation_checkpointing}"
    )
    yield ""
    small = plan.memory_bytes["total"] < _GIB
    unit, digits, name = (_MIB, 0, "MiB") if small else (_GIB, 2, "GiB")
    yield f"{'memory per rank':<18} {name:>8}"
    for name, size in plan.memory_bytes.items():
        if name != "total":
            yield f"  {name:<16} {size / unit:8,.{digits}f}  {_bar(size / device.memory)}"
    yield f"  {'total at the peak':<17}{plan.memory_bytes['total'] / unit:8,.{digits}f}"
    if result.overhead:
        overhead = "process overhead" if device.kind == "cpu" else "driver overhead"
        yield f"  {overhead:<17}{result.overhead / unit:8,.{digits}f}"
    verdict = "free: it fits" if result.fits else "missing: it does not fit"
    free = f"{abs(result.free) / unit:,.{digits}f}"
    yield f"  {'device':<16} {device.memory / unit:8,.{digits}f}  {free} {verdict}"
    for name, size in result.host_bytes.items():
        if size:
            yield f"  in host memory: {name} {size / unit:,.{digits}f}"
    yield ""
    yield from _time(config, result)
    if result.collectives:
        yield ""
        link, network = (f"{rate / 1e9:,g} GB/s" for rate in (device.link, device.network))
        yield f"links per device, one way: {link} within a host, {network} between hosts"
        yield f"{'messages per step':<31} {'calls':>8} {'tensors, GiB':>12}"
        sent: dict[str, tuple[int, int]] = {}
        for call in result.collectives:  # one row for each kind, whatever the sizes
            name = f"{call.group} {call.kind} {call.dtype}"
            count, size = sent.get(name, (0, 0))
            sent[name] = count + call.count, size + call.bytes
        for name, (count, size) in sent.items():
            yield f"  {name:<29} {count:8,} {size / _GIB:12.3f}"


def _bar(share: float) -> str:
    """Return a bar, cut at the width of the terminal."""
    room = max(1, shutil.get_terminal_size().columns - _BEFORE)
    length = round(_BAR * min(share, room))
    return "#" * length if length <= room else "#" * (room - 1) + ">"


def _time(config: RunConfig, result: Forecast) -> Iterator[str]:
    plan, seconds = result.plan, result.seconds
    yield f"{'time per step':<18} {'seconds':>8}"
    for name, value in vars(seconds).items():
        label = {"tensor": "tensor messages", "data": "ZeRO messages"}.get(name, name)
        if value:
            yield f"  {label:<16} {value:8.3f}  {_bar(value / seconds.total)}"
    rate = result.tokens_per_second
    yield f"  {'total':<16} {seconds.total:8.3f}"
    yield (
        f"  {rate:,.0f} tokens/s, {rate / plan.world_size:,.0f} per device; MFU "
        f"{100 * result.mfu:.1f} %; {_flops(plan.flops_per_token)} per token, "
        f"{_flops(result.hardware_flops_per_token)} with recompute"
    )
    steps = config.training.steps
    if steps == 0:  # depends on the examples and epochs
        return
    run = steps * seconds.total
    yield (
        f"the run: {steps:,} steps, {_count(steps * plan.tokens_per_step)} tokens, "
        f"{_duration(run)}, {_duration(run * plan.world_size, largest='hours', prefix='device ')}"
    )


def _flops(number: int) -> str:
    return f"{number / 1e9:,.2f} GFLOPs" if number >= 1e8 else f"{number / 1e6:,.2f} MFLOPs"


def _count(number: int) -> str:
    """Format a count with a word, such as "614.4 thousand" or "1,048.58 billion"."""
    for word, size, digits in (("billion", 1e9, 2), ("million", 1e6, 2), ("thousand", 1e3, 1)):
        if number >= size:
            return f"{number / size:,.{digits}f} {word}"
    return f"{number:,}"


def _duration(seconds: float, *, largest: str = "days", prefix: str = "") -> str:
    """Format a time in the largest unit that it fills.

    Args:
        largest: largest unit to use.
        prefix: text before the unit, such as "device ".
    """
    units = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
    names = [*units][[*units].index(largest) :]
    name = next((name for name in names if seconds >= units[name]), "seconds")
    number = seconds / units[name]
    return f"{number:,.{0 if number >= 1000 else 1 if name != 'days' else 2}f} {prefix}{name}"


def describe_ranking(ranking: Ranking, limit: int = 10) -> str:
    """Return the best layouts of a search, one per line, then the current layout and its rank."""
    head = ("tokens/s", "MFU", "GiB free", "tensor", "ZeRO", "micro", "recompute", "optimizer")
    seconds = ("compute", "messages", "update")
    lines = [f"{'':73}seconds per step"]
    lines += [_ROW.format("rank", *head, *seconds).rstrip()]
    for number, candidate in enumerate(ranking.candidates[:limit], 1):
        lines.append(_row(str(number), candidate))
    if ranking.current is not None:
        lines.append(_row("yours", ranking.current))
    return "\n".join([*lines, *_current_rank(ranking)]) + "\n"


def _row(name: str, candidate: Candidate) -> str:
    result, changes = candidate.forecast, candidate.changes
    zero = changes["deepspeed"]["zero_optimization"]
    return _ROW.format(
        name,
        f"{result.tokens_per_second:,.0f}",
        f"{result.mfu:.1%}",
        f"{result.free / _GIB:.1f}",
        f"{result.plan.mesh.tensor}{'+seq' * changes['parallel']['sequence']}",
        zero["stage"],
        result.plan.micro_batch_size,
        changes["training"]["activation_checkpointing"],
        "host" if zero["offload_optimizer"]["device"] == "cpu" else "device",
        *(f"{value:.3g}" for value in _phases(result).values()),
    ).rstrip()


def _phases(result: Forecast) -> dict[str, float]:
    """Return the seconds per step of compute, messages and update."""
    seconds = result.seconds
    return {
        "compute": seconds.forward + seconds.backward,
        "messages": seconds.tensor + seconds.data,
        "update": seconds.optimizer,
    }


def _current_rank(ranking: Ranking) -> Iterator[str]:
    """Yield lines with the rank of the current layout and why it is slower than rank 1."""
    current = ranking.current
    if current is None:
        yield f"your layout cannot be planned: {ranking.fault}"
    elif ranking.current_rank is None:
        yield f"your layout does not fit: {-current.forecast.free / _GIB:.1f} GiB missing"
    else:
        yield f"your layout: rank {ranking.current_rank} of {ranking.fitting} that fit"
    if current is not None and ranking.current_rank != 1 and ranking.candidates:
        best = ranking.candidates[0].forecast
        slower = current.forecast.seconds.total - best.seconds.total
        phases = _phases(current.forecast)
        fastest = _phases(best)
        parts = ", ".join(f"{name} {phases[name] - fastest[name]:+.3g}" for name in phases)
        yield f"compared with rank 1, its step takes {slower:+.3g} s: {parts}"
