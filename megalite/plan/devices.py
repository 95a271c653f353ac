"""The devices that are known: dense peaks, memory and links, from their makers' data sheets.

Peaks are of matrix products without sparsity, in 16 bits with fp32 sums; a fp32 peak is of plain
fp32, for PyTorch leaves TF32 off. The first row whose words all occur in a device's name is it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from megalite import files
from megalite.errors import CommandError, nearest

_TERA, _GIGA, _MIB = 1e12, 1e9, 1 << 20


@dataclass(frozen=True)
class Efficiencies:
    """What of a device's peaks a run reaches. Fitted to published runs (benchmarks/plan.py), or to
    a machine's own (`--calibrate`).

    Attributes:
        matmul, attention: shares of the FLOP/s that the device's own large products reach, and its
            attention. bandwidth: of the memory's.
        link, network: of the bytes/s between the ranks of a host, and between hosts.
        hidden: share of the forward and backward behind which ZeRO's messages can hide, where an
            engine overlaps them.
        launch: seconds to start a kernel. latency: seconds of a message, whatever its size.
    """

    matmul: float = 0.97
    attention: float = 0.55
    bandwidth: float = 0.75
    link: float = 0.74
    network: float = 0.65
    hidden: float = 0.35
    launch: float = 4e-6
    latency: float = 2.9e-5


@dataclass(frozen=True)
class Device:
    """What a planner needs to know of one device.

    Attributes:
        bf16, fp16, fp32: dense peaks, FLOP/s; None: no such unit.
        reached: share of the bf16 peak that large matrix products were measured to reach.
        attention: share of it that flash attention was.
        memory: bytes that a program may have. bandwidth: of that memory, bytes/s.
        link: bytes/s to the devices of the same host, in one direction.
        network: bytes/s to other hosts, a device, in one direction.
        host_link: bytes/s to the memory of its host.
    """

    name: str
    bf16: float | None
    fp16: float | None
    fp32: float | None
    reached: float
    attention: float
    memory: int
    bandwidth: float
    link: float
    network: float
    host_link: float
    source: str
    efficiencies: Efficiencies = Efficiencies()

    def peak(self, precision: str) -> float | None:
        """FLOP/s in "bf16", "fp16" or "fp32"."""
        return {"bf16": self.bf16, "fp16": self.fp16, "fp32": self.fp32}[precision]


# TFLOP/s in bf16, fp16, fp32; what is reached of them: by products, by Bekman's MAMF table (0.8 if
# it has no row), and by FlashAttention-2 (Dao 2023 on the A100, both directions; Shah et al. 2024
# on the H100; neighbours by likeness); MiB as the driver tells it; GB/s of memory, of the links to
# the neighbours (NVLink and Infinity Fabric: half of what both directions have; else PCIe), of the
# network as such hosts are commonly built, and to the host.
_Row = tuple[
    str, float | None, float | None, float, float, float, int, float, float, float, float, str
]
# fmt: off
_TABLE: tuple[_Row, ...] = (
    ("b200", 2250.0, 2250.0, 75.0, 0.776, 0.35, 183359, 8000, 900, 50, 64, "HGX B200 sheet"),
    ("gh200", 989.4, 989.4, 66.9, 0.83, 0.35, 97871, 4000, 450, 50, 450, "data sheet"),
    ("h200 nvl", 835.5, 835.5, 60.0, 0.8, 0.35, 143771, 4800, 450, 25, 64, "data sheet"),
    ("h200", 989.4, 989.4, 66.9, 0.803, 0.35, 143771, 4800, 450, 50, 64, "data sheet"),
    ("h100 nvl", 835.5, 835.5, 60.0, 0.8, 0.35, 95830, 3900, 300, 25, 64, "data sheet"),
    ("h100 pcie", 756.5, 756.5, 51.2, 0.8, 0.35, 81559, 2000, 64, 25, 64, "data sheet"),
    ("h100 80gb", 989.4, 989.4, 66.9, 0.801, 0.35, 81559, 3350, 450, 50, 64, "white paper, SXM5"),
    ("h100", 989.4, 989.4, 66.9, 0.801, 0.35, 81559, 3350, 450, 50, 64, "white paper, SXM5"),
    ("a100 80gb", 312.0, 312.0, 19.5, 0.859, 0.6, 81920, 2039, 300, 25, 32, "data sheet"),
    ("a100 40gb", 312.0, 312.0, 19.5, 0.859, 0.6, 40960, 1555, 300, 25, 32, "data sheet"),
    ("a100", 312.0, 312.0, 19.5, 0.859, 0.6, 40960, 1555, 300, 25, 32, "data sheet"),
    ("h800 pcie", 756.5, 756.5, 51.2, 0.8, 0.35, 81559, 2000, 64, 25, 64, "as an H100"),
    ("h800", 989.4, 989.4, 66.9, 0.8, 0.35, 81559, 3350, 200, 50, 64, "as an H100"),
    ("h20", 148.0, 148.0, 44.0, 0.8, 0.35, 97871, 4000, 450, 50, 64, "data sheet"),
    ("a800", 312.0, 312.0, 19.5, 0.8, 0.5, 81920, 2039, 200, 25, 32, "as an A100"),
    ("l40s", 362.05, 362.05, 91.6, 0.8, 0.5, 46068, 864, 32, 12.5, 32, "data sheet"),
    ("l4", 121.0, 121.0, 30.3, 0.8, 0.5, 23034, 300, 32, 12.5, 32, "data sheet"),
    ("a10", 125.0, 125.0, 31.2, 0.8, 0.5, 23028, 600, 32, 12.5, 32, "data sheet"),
    ("rtx 4090", 165.2, 165.2, 82.6, 0.8, 0.5, 24564, 1008, 32, 12.5, 32, "Ada white paper"),
    ("rtx 3090", 71.0, 71.0, 35.6, 0.8, 0.5, 24576, 936, 32, 12.5, 32, "GA102 white paper"),
    ("v100 sxm2", None, 125.0, 15.7, 0.8, 0.5, 32768, 900, 150, 12.5, 16, "data sheet"),
    ("v100 pcie", None, 112.0, 14.0, 0.8, 0.5, 32768, 900, 16, 12.5, 16, "data sheet"),
    ("t4", None, 65.0, 8.1, 0.8, 0.5, 15360, 320, 16, 6.25, 16, "data sheet"),
    ("mi300x", 1307.4, 1307.4, 163.4, 0.601, 0.35, 196592, 5300, 448, 50, 64, "AMD data sheet"),
)
# fmt: on

# a core of a server's processor: what a plan for a CPU starts from until it is calibrated
CPU = Device(
    "cpu",
    50e9,
    None,
    50e9,
    1.0,
    1.0,
    8 << 30,
    10e9,
    5e9,
    1e9,
    10e9,
    "a guess: calibrate it by a run",
)


def _device(row: _Row) -> Device:
    name, bf16, fp16, fp32, reached, attention, memory, bandwidth, link, network, host, source = row
    return Device(
        name=name.replace(" ", "-"),
        bf16=None if bf16 is None else bf16 * _TERA,
        fp16=None if fp16 is None else fp16 * _TERA,
        fp32=fp32 * _TERA,
        reached=reached,
        attention=attention,
        memory=memory * _MIB,
        bandwidth=bandwidth * _GIGA,
        link=link * _GIGA,
        network=network * _GIGA,
        host_link=host * _GIGA,
        source=f"{name.upper()}: {source}",
    )


_GPUS = tuple(map(_device, _TABLE))
DEVICES = {device.name: device for device in (*_GPUS, CPU)}


def find_device(told: str) -> Device:
    """A device by its name here, by that of its driver, or a JSON file that describes one.

    A file holds any of `Device`'s fields in plain units (FLOP/s, bytes, bytes/s), over those of the
    device that its "extends" names.

    Raises:
        CommandError: an unknown device, or a file that describes none.
    """
    plain = told.lower().replace("-", "")
    for name, device in DEVICES.items():
        if name.replace("-", "") == plain:
            return device
    if told.endswith(".json"):
        return _read(Path(told))
    found = by_driver_name(told)
    if found is None:
        names = ", ".join(DEVICES)
        raise CommandError(
            f"--gpu {told!r}: no such device{nearest(told.lower(), list(DEVICES))}; it is one of "
            f"{names}, or a JSON file"
        )
    return found


def by_driver_name(name: str) -> Device | None:
    """The device that its driver calls `name`, such as "H100 80GB HBM3"; None: unknown.

    A name is matched by whole words: an A10G, an RTX 3090 Ti or a MIG slice is not the device it
    resembles.
    """
    words = set(name.lower().replace("-", " ").split())
    if {"ti", "d", "laptop", "mig"} & words:
        return None
    return next((d for d in _GPUS if set(d.name.split("-")) <= words), None)


def _read(path: Path) -> Device:
    try:
        raw: Any = files.read_json(path)
        if not isinstance(raw, Mapping):
            raise ValueError("not a JSON object")
        known = {field.name for field in fields(Device)}
        if unknown := sorted({*raw} - known - {"extends"}):
            raise ValueError(f"unknown key {unknown[0]!r}; it is one of {', '.join(sorted(known))}")
        base = DEVICES[str(raw.get("extends", "cpu"))]
        own = {key: value for key, value in raw.items() if key != "extends"}
        if "efficiencies" in own:
            own["efficiencies"] = _efficiencies(own["efficiencies"])
        for key, value in own.items():
            if key == "efficiencies":
                continue
            wrong = not isinstance(value, str) if key in ("name", "source") else not _is_size(value)
            if wrong:
                raise ValueError(f"{key} is {json.dumps(value)}, not a number over 0")
        return replace(base, **own)
    except (OSError, ValueError, KeyError) as error:
        raise CommandError(f"--gpu {path}: describes no device: {error}") from None


def _efficiencies(raw: Any) -> Efficiencies:
    known = {field.name for field in fields(Efficiencies)}
    if not isinstance(raw, Mapping) or {*raw} - known or not all(map(_is_size, raw.values())):
        raise ValueError(f"efficiencies is not an object of numbers over 0 by {', '.join(known)}")
    return Efficiencies(**raw)


def _is_size(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
