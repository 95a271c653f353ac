"""What a run says about itself: its records, TensorBoard, the console, the device it runs on."""

from megalite.observe.device import peak_flops, peak_memory_bytes
from megalite.observe.metrics import Recorder, previous_attempts, restate, resumed_before
from megalite.observe.trace import Trace

__all__ = [
    "Recorder",
    "Trace",
    "peak_flops",
    "peak_memory_bytes",
    "previous_attempts",
    "restate",
    "resumed_before",
]
