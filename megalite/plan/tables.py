"""Forecasts as text."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

from megalite.config import RunConfig
from megalite.plan.forecast import Forecast
from megalite.plan.search import Candidate, Ranking

_ROW = "{:>5} {:>10} {:>6} {:>8}  {:<8} {:<4} {:>5}  {:<9}  {:<9} {:>8} {:>8} {:>8}"
_MIB, _GIB = 1 << 20, 1 << 30
_BAR, _BEFORE = 40, 29  # characters of a bar as long as the device's memory, and of what leads it


def describe_forecast(config: RunConfig, found: Forecast) -> str:
    """Return a forecast as text: memory with bars, time, traffic, and the whole run."""
    return "\n".join(_lines(config, found)) + "\n"


def _lines(config: RunConfig, found: Forecast) -> Iterator[str]:
    plan = found.plan
    cluster = found.cluster
    device = found.cluster.device
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
    yield f"{'memory of a rank':<18} {name:>8}"
    for name, size in plan.memory_bytes.items():
        if name != "total":
            yield f"  {name:<16} {size / unit:8,.{digits}f}  {_bar(size / device.memory)}"
    yield f"  {'total at the peak':<16}{plan.memory_bytes['total'] / unit:8,.{digits}f}"
    if found.overhead:
        waste = "process and waste" if device.kind == "cpu" else "driver and waste"
        yield f"  {waste:<17}{found.overhead / unit:8,.{digits}f}"
    verdict = "left: it fits" if found.fits else "too much: it does not fit"
    left = f"{abs(found.free) / unit:,.{digits}f}"
    yield f"  {'device':<16} {device.memory / unit:8,.{digits}f}  {left} {verdict}"
    for name, size in found.host_bytes.items():
        if size:
            yield f"  on the host: {name} {size / unit:,.{digits}f}"
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
    """Return a bar, cut at the width of the terminal."""
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
        f"{100 * found.mfu:.1f} %; {_flops(plan.flops_per_token)} a token, "
        f"{_flops(found.hardware_flops_per_token)} with recompute"
    )
    steps = config.training.steps
    if steps == 0:  # the examples and their epochs decide
        return
    run = steps * seconds.total
    yield (
        f"the run: {steps:,} steps, {_count(steps * plan.tokens_per_step)} tokens, "
        f"{_duration(run)}, {_duration(run * plan.world_size, most='hours', of='device ')}"
    )


def _flops(number: int) -> str:
    return f"{number / 1e9:,.2f} GFLOPs" if number >= 1e8 else f"{number / 1e6:,.2f} MFLOPs"


def _count(number: int) -> str:
    """Return a count in the largest word that it fills: "614.4 thousand", "1,048.58 billion"."""
    for word, size, digits in (("billion", 1e9, 2), ("million", 1e6, 2), ("thousand", 1e3, 1)):
        if number >= size:
            return f"{number / size:,.{digits}f} {word}"
    return f"{number:,}"


def _duration(seconds: float, *, most: str = "days", of: str = "") -> str:
    """Return a time in the largest unit that it fills, up to `most`; `of` precedes the unit."""
    units = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
    names = [*units][[*units].index(most) :]
    name = next((name for name in names if seconds >= units[name]), "seconds")
    number = seconds / units[name]
    return f"{number:,.{0 if number >= 1000 else 1 if name != 'days' else 2}f} {of}{name}"


def describe_ranking(ranking: Ranking, most: int = 10) -> str:
    """Return the best of a search, a line each, then the run file's own layout and its rank."""
    head = ("tokens/s", "MFU", "GiB left", "tensor", "ZeRO", "micro", "recompute", "optimizer")
    seconds = ("compute", "messages", "update")
    lines = [f"{'':73}seconds of a step"]
    lines += [_ROW.format("rank", *head, *seconds).rstrip()]
    for number, candidate in enumerate(ranking.candidates[:most], 1):
        lines.append(_row(str(number), candidate))
    if ranking.own is not None:
        lines.append(_row("yours", ranking.own))
    return "\n".join([*lines, *_own_place(ranking)]) + "\n"


def _row(name: str, candidate: Candidate) -> str:
    found, changes = candidate.forecast, candidate.changes
    zero = changes["deepspeed"]["zero_optimization"]
    return _ROW.format(
        name,
        f"{found.tokens_per_second:,.0f}",
        f"{found.mfu:.1%}",
        f"{found.free / _GIB:.1f}",
        f"{found.plan.mesh.tensor}{'+seq' * changes['parallel']['sequence']}",
        zero["stage"],
        found.plan.micro_batch_size,
        changes["training"]["activation_checkpointing"],
        "host" if zero["offload_optimizer"]["device"] == "cpu" else "device",
        *(f"{value:.3g}" for value in _phases(found).values()),
    ).rstrip()


def _phases(found: Forecast) -> dict[str, float]:
    took = found.seconds
    return {
        "compute": took.forward + took.backward,
        "messages": took.tensor + took.data,
        "update": took.optimizer,
    }


def _own_place(ranking: Ranking) -> Iterator[str]:
    """State the rank of the run file's own layout, and what makes it slower than the first."""
    own = ranking.own
    if own is None:
        yield f"your layout cannot be planned: {ranking.fault}"
    elif ranking.current_rank is None:
        yield f"your layout does not fit: {-own.forecast.free / _GIB:.1f} GiB too much"
    else:
        yield f"your layout: rank {ranking.current_rank} of {ranking.fitting} that fit"
    if own is not None and ranking.current_rank != 1 and ranking.candidates:
        best = ranking.candidates[0].forecast
        more = own.forecast.seconds.total - best.seconds.total
        mine = _phases(own.forecast)
        first = _phases(best)
        parts = ", ".join(f"{name} {mine[name] - first[name]:+.3g}" for name in mine)
        yield f"against rank 1 its step takes {more:+.3g} s: {parts}"
