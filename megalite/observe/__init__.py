"""Reports of a run: its records, TensorBoard, the console, the device."""

from megalite.observe.device import (
    mfu_warnings,
    model_flops_utilization,
    peak_flops,
    peak_memory_bytes,
)
from megalite.observe.metrics import Recorder
from megalite.observe.status import (
    has_resumed,
    last_layout,
    overwrite_status,
    previous_attempts,
    started_from,
)
from megalite.observe.stragglers import Stragglers
from megalite.observe.trace import Trace
from megalite.observe.watch import PhaseTimer, Watchdog

__all__ = [
    "PhaseTimer",
    "Recorder",
    "Stragglers",
    "Trace",
    "Watchdog",
    "has_resumed",
    "last_layout",
    "mfu_warnings",
    "model_flops_utilization",
    "overwrite_status",
    "peak_flops",
    "peak_memory_bytes",
    "previous_attempts",
    "started_from",
]
