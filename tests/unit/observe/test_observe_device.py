# covers: megalite/observe/device.py
"""Peak FLOP/s by the driver's device name, and peak memory."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from megalite.observe import mfu_warnings, peak_flops, peak_memory_bytes

GROWTH = """
import torch
from megalite.observe import peak_memory_bytes
cpu = torch.device("cpu")
before = peak_memory_bytes(cpu)
block = torch.ones(200 * 2**18)
peak = peak_memory_bytes(cpu)
del block
assert peak - before > 190 * 2**20, (before, peak)
assert peak_memory_bytes(cpu) > peak - 2**20  # the kernel counts in batches
"""


@pytest.mark.parametrize(
    ("name", "precision", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 80GB HBM3", "fp32", 66.9),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H100 NVL", "fp16", 835.5),
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA GH200 480GB", "bf16", 989.4),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
        ("NVIDIA L40S", "bf16", 362.05),
        ("NVIDIA GeForce RTX 4090", "fp16", 165.2),
        ("Tesla V100-SXM2-32GB", "fp16", 125.0),
        ("Tesla V100-SXM2-16GB", "fp16", 125.0),
        ("AMD Instinct MI300X", "bf16", 1307.4),
    ],
)
def test_peak_flops_of_known_devices(name: str, precision: str, tera: float) -> None:
    assert peak_flops(name, precision) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("cpu", "fp32"),
        ("NVIDIA A10G", "bf16"),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16"),
        ("Tesla V100-SXM2-32GB", "bf16"),
        ("NVIDIA A100-SXM-64GB", "bf16"),
    ],
)
def test_peak_flops_of_unknown_devices_is_none(name: str, precision: str) -> None:
    assert peak_flops(name, precision) is None


def test_driver_memory_overrides_the_size_in_the_name() -> None:
    assert peak_flops("NVIDIA H100", "bf16", 95 << 30) is None
    assert peak_flops("NVIDIA GH200 480GB", "bf16", 95 << 30) == pytest.approx(989.4e12)
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bf16", 85_000_000_000) == pytest.approx(312e12)
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bf16", 20 << 30) is None


def test_peak_memory_stays_after_memory_is_freed() -> None:
    """It runs in a separate process, because this one has used more memory before."""
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert peak_memory_bytes(torch.device("cpu")) > 50 * 2**20


def test_mfu_warnings_state_why_there_is_no_mfu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mfu_warnings(torch.device("cpu"), "bf16") == [
        "MFU is not reported: the peak of a CPU depends on its clock"
    ]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: device_name)
    for device_name, reasons in {
        "NVIDIA H100 80GB HBM3": [],
        "NVIDIA A10G": ["NVIDIA A10G is unknown"],
    }.items():
        properties = SimpleNamespace(name=device_name, total_memory=80 * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, it=properties: it)
        warnings = mfu_warnings(torch.device("cuda"), "bf16")
        assert len(warnings) == len(reasons)
        assert all(reason in warnings[0] for reason in reasons)
