"""Reports of a run: its records, TensorBoard, the console, the device."""

from megalite.observe.device import (
    model_flops_utilization,
    peak_flops,
    peak_memory_bytes,
    unknown_utilization,
)
from megalite.observe.metrics import Recorder
from megalite.observe.status import (
    began_from,
    last_layout,
    previous_attempts,
    restate,
    resumed_before,
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
    "began_from",
    "last_layout",
    "model_flops_utilization",
    "peak_flops",
    "peak_memory_bytes",
    "previous_attempts",
    "restate",
    "resumed_before",
    "unknown_utilization",
]
