"""Run a case under each layout, in separate processes, and compare the runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalite import files
from megalite.env import Launch
from megalite.errors import MegaLiteError, UserError
from megalite.formats.checkpoint import folder_name
from megalite.log import logger
from megalite.parity.layouts import REFERENCE, ParityLayout, ParityResume
from megalite.parity.trial import SAVED_STEP, STEPS, ParityCase
from megalite.parity.worker import work
from megalite.spawn import RankError, run_ranks

# Relative tolerances of loss, gradient norm and parameters against the reference.
FP32 = (1e-5, 1e-4, 1e-4)
# bf16 rounds weights and activations to 8 bits. Gradients that nearly cancel (biases, queries
# through the softmax) have fewer correct bits. Their error is 1e-2 at the first step, and was up to
# 3.1e-2 after 20 steps. A missing sum over ranks causes an error of a third or more.
BF16 = (2e-2, 2e-2, 5e-2)
RESUMED = 1e-5  # tolerance of loss and norm against the same run without interruption

Worker = Callable[[Launch, str], None]  # runs a rank of the job at a path, and ends its process

_TIMEOUT = 900.0  # seconds for a layout

# by step: loss, gradient norm, and validation loss after the step (1 if there is none)
Curve = dict[int, tuple[float, float, float]]


@dataclass(frozen=True)
class ParityResult:
    """A row of the report. Errors are relative. None means that there is no number to compare.

    Attributes:
        parameter: the tensor that differs most; if not `ok`, the tensor in which the fault begins.
        ok: whether all errors are within their tolerances.
    """

    name: str
    loss_error: float | None
    grad_norm_error: float | None
    parameter: str | None
    parameter_error: float | None
    ok: bool


class ParityRunner:
    """Runner of a case under its layouts, starting with the reference.

    Args:
        worker: function that each rank of a layout runs.
        timeout: seconds for a layout.
    """

    def __init__(
        self, case: ParityCase, *, worker: Worker = work, timeout: float = _TIMEOUT
    ) -> None:
        self.worker = worker
        self._case = case
        self._timeout = timeout
        self._curves: dict[ParityLayout, Curve] = {}
        self._saved: dict[ParityLayout, Path] = {}
        self._count = 0

    def run_reference(self, reference: ParityLayout = REFERENCE, *, resumes: bool = False) -> None:
        """Train the reference run.

        Raises:
            UserError: the run file cannot be trained here.
            MegaLiteError: the run failed for another reason.
        """
        try:
            self._train(reference, save=resumes)
        except RankError as error:
            kind = UserError if error.code == UserError.exit_code else MegaLiteError
            hint = "\n--scale tests a scaled-down copy of it" if "memory: " in str(error) else ""
            raise kind(f"the reference cannot be trained:\n{error}{hint}") from None

    def try_layout(self, layout: ParityLayout, *, save: bool = False) -> ParityResult:
        """Train under a layout and compare the run with the reference.

        Args:
            save: if true, `try_resume` can resume the run.
        """
        reference = layout.reference
        if reference not in self._curves:
            self.run_reference(reference, resumes=True)
        if layout == reference:
            return ParityResult(layout.name, 0.0, 0.0, None, 0.0, ok=True)
        return self._compare(layout.name, layout, reference, save=save)

    def try_resume(self, pair: ParityResume) -> ParityResult:
        """Resume a saved run from its middle, and compare with that run's later steps."""
        if pair.saved not in self._saved:
            return _failure(pair.name, "there is no checkpoint to resume: its layout failed")
        checkpoint = str(self._saved[pair.saved] / "checkpoints" / folder_name(SAVED_STEP))
        return self._compare(pair.name, pair.resumed, pair.saved, resume=checkpoint)

    def _compare(
        self,
        name: str,
        layout: ParityLayout,
        others: ParityLayout,
        *,
        save: bool = False,
        resume: str = "",
    ) -> ParityResult:
        """Train under a layout and compare the run with that of `others`, step by step."""
        try:
            curve, differences = self._train(layout, others, save=save, resume=resume)
        except RankError as error:
            return _failure(name, error)
        tolerances = _tolerances(layout, resumed=bool(resume))
        before = SAVED_STEP if resume else 0
        expected = {n: row for n, row in self._curves[others].items() if n > before}
        both = [(curve[n], row) for n, row in expected.items() if n in curve]
        errors = [[_relative_error(x, y) for x, y in zip(*rows, strict=True)] for rows in both]
        loss = max((max(row[0], row[2]) for row in errors), default=math.inf)
        norm = max((row[1] for row in errors), default=math.inf)
        over = [d for d in differences if d["error"] > tolerances[2]]
        gradients = [d for d in differences if d["kind"] == "gradient"]
        shown = over[0] if over else max(gradients, key=lambda d: d["error"])
        parameter = shown["name"]
        if shown["kind"] != "gradient":
            parameter += f" ({shown['kind']}, step {shown['step']})"
        complete = curve.keys() == expected.keys()
        ok = complete and not over and loss <= tolerances[0] and norm <= tolerances[1]
        return ParityResult(
            name=name,
            loss_error=_finite(loss),
            grad_norm_error=_finite(norm),
            parameter=parameter,
            parameter_error=_finite(shown["error"]),
            ok=ok,
        )

    def _train(
        self,
        layout: ParityLayout,
        others: ParityLayout | None = None,
        *,
        save: bool = False,
        resume: str = "",
    ) -> tuple[Curve, list[dict[str, Any]]]:
        """Train a layout; return its curve, and the differences of its tensors from `others`.

        Args:
            save: if true, the run writes a checkpoint to resume. A reference also stores tensors
                to compare resumed runs with.
            resume: the checkpoint to resume; "" starts a new run.
        """
        self._count += 1
        folder = self._case.folder
        name = f"run_{self._count:02d}"
        is_reference = layout == layout.reference
        first = SAVED_STEP + 1 if resume else 1
        saved = save and not is_reference
        config = self._case.config(layout, name, save=saved)
        run = Path(config["logging"]["directory"]) / name
        keep = None
        if save or (is_reference and not resume):
            keep = str(self._tensors(layout))
            self._tensors(layout).mkdir()
        report = folder / f"{name}.report.json"
        # inspect the first two steps of a process, the last, and the first two after a resume
        steps = [first, first + 1, *([SAVED_STEP + 1, SAVED_STEP + 2] if save else []), STEPS]
        job = {
            "config": config,
            "engine": layout.engine,
            "resume": resume or "never",
            "steps": steps,
            "others": str(self._tensors(others)) if others else None,
            "keep": keep,
            "tolerance": _tolerances(layout)[2],
            "report": str(report),
        }
        path = folder / f"{name}.job.json"
        files.write_json(path, job)
        self._run(layout, path, note=", resumed" if resume else "")
        curve = _read_curve(run)
        if not resume:
            self._curves[layout] = curve
        if saved:
            self._saved[layout] = run
        return curve, files.read_json(report)

    def _run(self, layout: ParityLayout, job: Path, *, note: str) -> None:
        """Run a job on the ranks of its layout; `note` follows the layout's name in the log."""
        # CUDA cannot be forked after its initialisation, and DeepSpeed's import counts the GPUs
        preload = () if torch.cuda.device_count() else (work.__module__, "megalite.engine.preload")
        began = time.monotonic()
        run_ranks(
            self.worker,
            layout.ranks,
            str(job),
            timeout=self._timeout,
            preload=preload,
            logs=job.parent,
        )
        logger.info("%-44s %5.1f s", layout.name + note, time.monotonic() - began)

    def _tensors(self, layout: ParityLayout) -> Path:
        """Return the folder of tensors that a run stores for comparisons."""
        return self._case.folder / f"seen_{layout.name}"


def _tolerances(layout: ParityLayout, *, resumed: bool = False) -> tuple[float, float, float]:
    """Return the tolerances of loss, gradient norm and parameters."""
    if layout.precision == "bf16":
        return BF16
    return (RESUMED, RESUMED, FP32[2]) if resumed else FP32


def _failure(name: str, reason: object) -> ParityResult:
    logger.error("%s failed: %s", name, reason)
    return ParityResult(name, None, None, None, None, ok=False)


def _relative_error(value: float, expected: float) -> float:
    error = abs(value - expected) / max(abs(expected), 1e-12)
    return error if error == error else math.inf


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _read_curve(folder: Path) -> Curve:
    rows = files.read_rows(folder / "metrics.jsonl")
    valid = {row["step"]: _number(row["loss"]) for row in rows if row["kind"] == "valid"}
    return {
        row["step"]: (_number(row["loss"]), _number(row["grad_norm"]), valid.get(row["step"], 1.0))
        for row in rows
        if row["kind"] == "train"
    }


def _number(value: float | None) -> float:
    return math.nan if value is None else value
