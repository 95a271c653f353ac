"""What a device can do at best, and how much memory this rank took at most."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

# Dense peaks in TFLOP/s: tensor cores for bf16 and fp16 with fp32 accumulation, plain units for
# fp32 (PyTorch leaves TF32 off). Data sheets print twice these figures where they count sparsity.
# The first row whose words all occur in the device's name is the device.
_PEAKS: tuple[tuple[str, float | None, float, float, str], ...] = (
    # name                bf16    fp16    fp32   source
    ("b200", 2250.0, 2250.0, 75.0, "NVIDIA HGX B200 specifications, an eighth of the board"),
    ("gh200", 989.4, 989.4, 66.9, "NVIDIA GH200 Grace Hopper data sheet"),
    ("h200 nvl", 835.5, 835.5, 60.0, "NVIDIA H200 data sheet"),
    ("h200", 989.4, 989.4, 66.9, "NVIDIA H200 data sheet"),
    ("h100 nvl", 835.5, 835.5, 60.0, "NVIDIA H100 data sheet"),
    ("h100 pcie", 756.5, 756.5, 51.2, "NVIDIA H100 data sheet"),
    ("h100", 989.4, 989.4, 66.9, "NVIDIA H100 architecture white paper (SXM5)"),
    ("a100", 312.0, 312.0, 19.5, "NVIDIA A100 data sheet"),
    ("h800 pcie", 756.5, 756.5, 51.2, "NVIDIA H800: an H100 but for its links and fp64"),
    ("h800", 989.4, 989.4, 66.9, "NVIDIA H800: an H100 but for its links and fp64"),
    ("h20", 148.0, 148.0, 44.0, "NVIDIA H20 data sheet"),
    ("a800", 312.0, 312.0, 19.5, "NVIDIA A800: an A100 but for its links"),
    ("l40s", 362.05, 362.05, 91.6, "NVIDIA L40S data sheet"),
    ("l4", 121.0, 121.0, 30.3, "NVIDIA L4 data sheet"),
    ("a10", 125.0, 125.0, 31.2, "NVIDIA A10 data sheet"),
    ("rtx 4090", 165.2, 165.2, 82.6, "NVIDIA Ada GPU architecture white paper, appendix A"),
    ("rtx 3090", 71.0, 71.0, 35.6, "NVIDIA Ampere GA102 architecture white paper, appendix A"),
    ("v100 sxm2", None, 125.0, 15.7, "NVIDIA V100 data sheet"),
    ("v100 pcie", None, 112.0, 14.0, "NVIDIA V100 data sheet"),
    ("t4", None, 65.0, 8.1, "NVIDIA T4 data sheet"),
    ("mi300x", 1307.4, 1307.4, 163.4, "AMD Instinct MI300X data sheet"),
)


def peak_flops(device_name: str, precision: str) -> float | None:
    """The device's dense peak in FLOP/s at "bf16", "fp16" or "fp32"; None where it is unknown.

    `device_name` is what `torch.cuda.get_device_name` says, such as "NVIDIA H100 80GB HBM3". A
    name is matched by whole words: an A10G, an RTX 3090 Ti or a MIG slice is not the device it
    resembles.
    """
    words = device_name.lower().replace("-", " ").split()
    if {"ti", "d", "laptop", "mig"} & set(words):
        return None
    for name, bf16, fp16, fp32, _ in _PEAKS:
        if set(name.split()) <= set(words):
            peak = {"bf16": bf16, "fp16": fp16, "fp32": fp32}[precision]
            return None if peak is None else peak * 1e12
    return None


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this rank held so far: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # VmHWM begins anew at exec; ru_maxrss would carry over what the launcher's process once held.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
