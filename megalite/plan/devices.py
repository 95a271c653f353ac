"""Known devices: dense peaks, memory and links, from their vendors' data sheets.

16-bit peaks are for dense matrix products with fp32 accumulation. The fp32 peak is without TF32,
which PyTorch leaves off. A driver's name matches the first row whose words it contains.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from megalite.config import read_strict_object
from megalite.config.faults import show
from megalite.errors import CommandError, ConfigError, nearest

Kind = Literal["cpu", "cuda"]
PRECISIONS = ("bf16", "fp16", "fp32")
_TERA = 1e12
_GIGA = 1e9
_MIB = 1 << 20
_SIZE_TOLERANCE = 0.1  # data sheets and drivers count one memory in GiB, GB, or less a reserve


@dataclass(frozen=True)
class Efficiencies:
    """Shares of a device's rates that a run reaches.

    They are fitted to published runs (benchmarks/plan.py), or to runs of a machine (`--calibrate`).

    Attributes:
        matmul: share of the FLOP/s that the device reaches in large matrix products.
        attention: share of the FLOP/s that the device reaches in flash attention.
        bandwidth: share of the memory's bytes/s.
        link: share of the bytes/s between the ranks of a host.
        network: share of the bytes/s between hosts.
        hidden: share of the forward and backward that can overlap with ZeRO's messages, if the
            engine overlaps them.
        launch: seconds to launch a kernel.
        latency: seconds of a message, whatever its size.
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
    """The facts of a device that the planner needs.

    Attributes:
        kind: "cpu" if ranks share the cores and links of a host, "cuda" if each rank has a GPU.
        bf16, fp16, fp32: dense peaks, FLOP/s. None means that the device has no such unit.
        reached: measured share of the bf16 peak in large matrix products.
        attention: measured share of the bf16 peak in flash attention.
        memory: bytes that a program can allocate.
        bandwidth: bytes/s of that memory.
        link: bytes/s to other devices of the host, in one direction.
        network: bytes/s to other hosts per device, in one direction.
        host_link: bytes/s to the host's memory.
        native_bf16: whether `training.precision` "auto" means bf16. True on GPUs, and on CPUs with
            AMX or AVX512-BF16, whose bf16 products are faster than fp32.
    """

    name: str
    kind: Kind
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
    native_bf16: bool = True

    def peak(self, precision: str) -> float | None:
        """Return the FLOP/s in "bf16", "fp16" or "fp32". None means no such unit."""
        return {"bf16": self.bf16, "fp16": self.fp16, "fp32": self.fp32}[precision]


# Columns: name; TFLOP/s in bf16, fp16, fp32; reached; attention; memory in MiB, as the driver
# reports it; GB/s of memory, link, network and host_link; source.
# reached is from Bekman's MAMF table, or 0.8 if that has no row. attention is FlashAttention-2
# (Dao 2023 on the A100, both directions; Shah et al. 2024 on the H100; similar devices as these).
# link is one direction of NVLink or Infinity Fabric, else PCIe. network is the usual one of such
# hosts.
_Row = tuple[
    str, float | None, float | None, float, float, float, int, float, float, float, float, str
]
# fmt: off
_TABLE: tuple[_Row, ...] = (
    ("b200", 2250.0, 2250.0, 75.0, 0.776, 0.35, 183359, 8000, 900, 50, 64, "HGX B200 sheet"),
    ("gh200 480gb", 989.4, 989.4, 66.9, 0.83, 0.35, 97871, 4000, 450, 50, 450, "data sheet"),
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
    ("v100 sxm2 16gb", None, 125.0, 15.7, 0.8, 0.5, 16384, 900, 150, 12.5, 16, "data sheet"),
    ("v100 sxm2", None, 125.0, 15.7, 0.8, 0.5, 32768, 900, 150, 12.5, 16, "data sheet"),
    ("v100 pcie 16gb", None, 112.0, 14.0, 0.8, 0.5, 16384, 900, 16, 12.5, 16, "data sheet"),
    ("v100 pcie", None, 112.0, 14.0, 0.8, 0.5, 32768, 900, 16, 12.5, 16, "data sheet"),
    ("t4", None, 65.0, 8.1, 0.8, 0.5, 15360, 320, 16, 6.25, 16, "data sheet"),
    ("mi300x", 1307.4, 1307.4, 163.4, 0.601, 0.35, 196592, 5300, 448, 50, 64, "AMD data sheet"),
)
# fmt: on

# A guess, for two cores of a server. Without bf16 units, bf16 is half as fast as fp32. With
# AVX512-BF16 it is twice as fast.
CPU = Device(
    name="cpu",
    kind="cpu",
    bf16=100e9,
    fp16=None,
    fp32=200e9,
    reached=0.7,
    attention=0.4,
    memory=8 << 30,
    bandwidth=20e9,
    link=5e9,
    network=1e9,
    host_link=20e9,
    source="a guess; calibrate it with --calibrate RUN",
    native_bf16=False,
)
_CPU_WITH_BF16 = replace(CPU, bf16=400e9, native_bf16=True)


def guess_cpu(native_bf16: bool) -> Device:
    """Return the guess for a CPU with or without bf16 units."""
    return _CPU_WITH_BF16 if native_bf16 else CPU


def _device(row: _Row) -> Device:
    name, bf16, fp16, fp32, reached, attention, memory, bandwidth, link, network, host, source = row
    return Device(
        name=name.replace(" ", "-"),
        kind="cuda",
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


def find_device(name: str) -> Device:
    """Return a device by its name, its driver's name, or the path of its JSON file.

    Raises:
        CommandError: the device is unknown, or its file has faults.
    """
    device = _by_name(name)
    if device is None and name.endswith(".json"):
        return _read(Path(name))
    device = device or by_driver_name(name)
    if device is None:
        raise CommandError(f"--gpu {show(name)}: {_unknown(name)}, or a JSON file")
    return device


def by_driver_name(name: str, memory: int | None = None) -> Device | None:
    """Return the device that its driver calls `name`, such as "H100 80GB HBM3". None if unknown.

    Whole words must match: an A10G, an RTX 3090 Ti or a MIG slice is not the device it resembles.
    The memory size must match as well.

    Args:
        memory: bytes, as the driver reports them. None uses the size in the name.
    """
    words = set(name.lower().replace("-", " ").split())
    if {"ti", "d", "laptop", "mig"} & words:
        return None
    for device in _GPUS:
        device_words = set(device.name.split("-"))
        sizes_in_name = [
            int(word.rstrip("gb")) << 30
            for word in words - device_words
            if re.fullmatch(r"\d{1,4}gb?", word)
        ]
        sizes = sizes_in_name if memory is None else [memory]
        same_size = all(abs(size / device.memory - 1) < _SIZE_TOLERANCE for size in sizes)
        if device_words <= words and same_size:
            return device
    return None


def _by_name(name: str) -> Device | None:
    plain = name.lower().replace("-", "")
    return next((d for name, d in DEVICES.items() if name.replace("-", "") == plain), None)


def _unknown(name: str) -> str:
    names = list(DEVICES)
    return f"no such device{nearest(name.lower(), names)}; choose one of {', '.join(names)}"


# ---- files

# minimum, maximum and unit of the fields of a device file
_GIB = 1 << 30
_RANGES: dict[str, tuple[float, float, str]] = {
    **dict.fromkeys(PRECISIONS, (1e6, 1e18, "FLOP/s (or null: no such unit)")),
    **dict.fromkeys(("reached", "attention"), (1e-6, 1.0, "as a share of the peak")),
    "memory": (_GIB, 1 << 46, f"bytes (80 GiB are {80 * _GIB})"),
    **dict.fromkeys(("bandwidth", "link", "network", "host_link"), (1e6, 1e15, "bytes/s")),
}
_EFFICIENCIES: dict[str, tuple[float, float, str]] = {
    **dict.fromkeys(("matmul", "attention", "bandwidth", "link", "network"), (1e-6, 1.0, "")),
    "hidden": (0.0, 1.0, ""),
    **dict.fromkeys(("launch", "latency"), (0.0, 10.0, "seconds")),
}


def number_fault(key: str, value: Any, bounds: tuple[float, float, str]) -> str | None:
    """Return a message if `value` is not a number within bounds. None means that it is.

    Args:
        bounds: minimum, maximum and unit.
    """
    low, high, unit = bounds
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and low <= value <= high:
        return None
    return f"{key}: expected {low:.7g} to {high:.7g} {unit}".rstrip() + f", got {show(value)}"


def _read(path: Path) -> Device:
    try:
        return make_device(read_strict_object(path))
    except FileNotFoundError:
        raise CommandError(f"--gpu {path}: no such file; check the path") from None
    except ConfigError as error:
        raise CommandError("\n".join(f"--gpu {path}: {fault}" for fault in error.faults)) from None


def make_device(values: Mapping[str, Any]) -> Device:
    """Return the device that a file describes, in FLOP/s, bytes and bytes/s.

    The file has all fields of `Device`. With "extends" it has only those that differ from the named
    device.

    Raises:
        ConfigError: all faults of the file.
    """
    changes = {key: value for key, value in values.items() if key != "extends"}
    base = None
    faults = []
    known = [field.name for field in fields(Device)]
    if "extends" in values:
        known.remove("kind")  # the meaning of all other fields depends on it
        name = values["extends"]
        base = (_by_name(name) or by_driver_name(name)) if isinstance(name, str) else None
        if base is None:
            faults.append(f"extends: {show(name)}: {_unknown(str(name))}")
    elif absent := [key for key in known if key not in (*changes, "efficiencies", "native_bf16")]:
        faults.append(
            'extends: is missing; name the most similar device, such as "extends": "h100-80gb", '
            f"or add {', '.join(absent)}"
        )
    for key, value in changes.items():
        if key in known:
            faults += _value_faults(key, value)
        else:
            hint = nearest(key, known) or f"; choose one of {', '.join(known)}"
            faults.append(f"{show(key)}: unknown key{hint}")
    if not faults and all(changes.get(key, getattr(base, key, None)) is None for key in PRECISIONS):
        faults.append(f"{', '.join(PRECISIONS)}: all are null; set one to its FLOP/s")
    if faults:
        raise ConfigError(faults)
    if "memory" in changes:
        changes["memory"] = int(changes["memory"])
    default = base.efficiencies if base else Efficiencies()
    changes["efficiencies"] = replace(default, **changes.get("efficiencies", {}))
    if base:
        return replace(base, **changes)
    return Device(**{"native_bf16": changes["kind"] != "cpu"} | changes)


def _value_faults(key: str, value: Any) -> Iterator[str]:
    if key == "efficiencies":
        yield from _efficiency_faults(key, value)
    elif key in _RANGES:
        fault = number_fault(key, value, _RANGES[key])
        if fault and not (value is None and key in PRECISIONS):
            yield fault
    elif key == "native_bf16" and not isinstance(value, bool):
        yield f"{key}: expected true or false, got {show(value)}"
    elif key == "kind" and value not in ("cpu", "cuda"):
        yield f'{key}: expected "cpu" or "cuda", got {show(value)}'
    elif key in ("name", "source") and not isinstance(value, str):
        yield f"{key}: expected text in quotes, got {show(value)}"
    elif key == "name" and not _is_file_name(value):
        yield f"{key}: {show(value)} cannot be a file name; set it to a plain word"


def _efficiency_faults(key: str, value: Any) -> Iterator[str]:
    if not isinstance(value, Mapping):
        yield f"{key}: expected an object of shares, got {show(value)}"
        return
    for name, share in value.items():
        if name not in _EFFICIENCIES:
            hint = nearest(name, _EFFICIENCIES) or f"; choose one of {', '.join(_EFFICIENCIES)}"
            yield f"{key}.{show(name)}: unknown key{hint}"
            continue
        fault = number_fault(f"{key}.{name}", share, _EFFICIENCIES[name])
        if fault:
            yield fault


def _is_file_name(name: str) -> bool:
    plain = name.isprintable() and name == name.strip() and not {"/", "\\"} & set(name)
    return plain and name[:1] not in ("", ".", "-") and len(name.encode()) <= 100
