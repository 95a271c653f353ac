"""Peak FLOP/s of a device, and peak memory of this rank."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from megalite.plan.devices import by_driver_name


def peak_flops(device_name: str, precision: str, memory: int | None = None) -> float | None:
    """Return the device's dense peak in FLOP/s in "bf16", "fp16" or "fp32". None if unknown.

    Args:
        device_name: as `torch.cuda.get_device_name` returns it, such as "NVIDIA H100 80GB HBM3".
        memory: bytes that the driver reports.
    """
    device = by_driver_name(device_name, memory)
    return device.peak(precision) if device else None


def mfu_warnings(device: torch.device, precision: str) -> list[str]:
    """Return the reason why rows will have no MFU, or an empty list if they will have one."""
    if device.type != "cuda":
        return ["MFU is not reported: the peak of a CPU depends on its clock"]
    if model_flops_utilization(device, precision, 0.0) is not None:
        return []
    return [
        f"MFU is not reported: the {precision} peak of {torch.cuda.get_device_name(device)} is "
        "unknown; megalite/plan/devices.py lists the known devices"
    ]


def model_flops_utilization(
    device: torch.device, precision: str, flops_per_second: float
) -> float | None:
    """Return the MFU of one GPU, 0 to 1. None if its peak is unknown.

    Args:
        flops_per_second: model FLOPs per second of one device.
    """
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    peak = peak_flops(properties.name, precision, properties.total_memory)
    return None if peak is None else flops_per_second / peak


def peak_memory_bytes(device: torch.device) -> int:
    """Return this rank's peak memory so far: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # exec resets VmHWM, but not ru_maxrss, which would include the launcher's peak
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
