"""A package with registry entries of several kinds, written to a folder as pip installs it."""

from __future__ import annotations

from pathlib import Path

_ENTRY_POINTS = """\
[megalite.plugins]
norm.scaled = toy_parts.norms:ScaledNorm
part.scaled = toy_parts.facts:SCALED
optimizer.lion = toy_parts.optimizers:lion
part.lion = toy_parts.facts:LION
reader.csvz = toy_parts.readers:CSVZ
sink.lines = toy_parts.sinks:Lines
"""

_FACTS = """\
LION = {"states": ("exp_avg",)}
SCALED = {"parameters": ("weight", "bias")}
"""

_NORMS = '''\
import torch
from torch import nn


class ScaledNorm(nn.Module):
    """Each row over its mean absolute value, with gain and bias."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x):
        scale = x.abs().mean(dim=-1, keepdim=True) + self.eps
        return x / scale * self.weight + self.bias
'''

_OPTIMIZERS = '''\
import torch


class Lion(torch.optim.Optimizer):
    """The sign of an average of gradients (Chen et al. 2023)."""

    def __init__(self, groups, lr, betas):
        super().__init__(groups, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                average = state["exp_avg"]
                update = (average * first + p.grad * (1 - first)).sign()
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
                average.mul_(second).add_(p.grad, alpha=1 - second)


def lion(section, groups):
    return Lion(groups, lr=section.lr, betas=section.betas)
'''

_READERS = '''\
import csv
import os

from data_prep.streams import ReaderSpec


class Table:
    """Rows of a table whose values are separated by the letter z."""

    def __init__(self, path):
        self._file = open(path, encoding="utf-8", newline="")
        self.size = os.stat(path).st_size

    def records(self, text_field):
        for row in csv.DictReader(self._file, delimiter="z"):
            yield row[text_field]

    def close(self):
        self._file.close()


CSVZ = ReaderSpec(open_file=Table)
'''

_SINKS = '''\
import json


class Lines:
    """Rows of a run in lines.txt of its folder."""

    def __init__(self, folder, *, attempt):
        self._path = folder / "lines.txt"

    def train(self, row):
        self._add("train", row)

    def valid(self, row, *, tokens):
        self._add("valid", row)

    def samples(self, step, texts):
        self._add("samples", {"step": step, "count": len(texts)})

    def picture(self, name, image, step):
        pass

    def event(self, step, name):
        self._add("event", {"step": step, "name": name})

    def close(self):
        self._add("close", {})

    def _add(self, kind, row):
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps([kind, row]) + "\\n")
'''


def install_package(folder: Path, *, package: str = "toy-parts", version: str = "1.2") -> None:
    """Write the package into a folder, which the caller adds to the module path."""
    home = folder / "toy_parts"
    home.mkdir(parents=True)
    for name, text in {
        "__init__": "",
        "facts": _FACTS,
        "norms": _NORMS,
        "optimizers": _OPTIMIZERS,
        "readers": _READERS,
        "sinks": _SINKS,
    }.items():
        (home / f"{name}.py").write_text(text)
    about = folder / f"{package.replace('-', '_')}-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    (about / "entry_points.txt").write_text(_ENTRY_POINTS)
