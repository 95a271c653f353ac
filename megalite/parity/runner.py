"""Runs layouts, each in processes of its own, and holds them against each other."""

from __future__ import annotations

import math
import multiprocessing as mp
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from megalite import env, files
from megalite.errors import MegaLiteError, UserError
from megalite.formats.checkpoint import folder_name
from megalite.log import logger
from megalite.parity.layouts import REFERENCE, Layout, Resume
from megalite.parity.trial import SAVED, STEPS, Trial
from megalite.parity.worker import work

LOSS, NORM, PARAMETER = 1e-5, 1e-4, 1e-4  # relative tolerances against the reference
# Where weights and activations have 8 bits. A gradient that nearly cancels (a bias's, a query's
# through the softmax) keeps fewer of them: 1e-2 at the first step, up to 3.1e-2 seen after 20. A
# sum over ranks that is missing is off by a third and more.
BF16 = (2e-2, 2e-2, 5e-2)
RESUMED = 1e-5  # of loss and norm against the same run, uninterrupted

Worker = Callable[[str], None]  # a rank: given a job's path, ends the process by itself

_TIMEOUT = 900.0  # seconds a layout may take
_LAST_WORDS = 5.0  # seconds the other ranks have once one has failed

# by step: loss, gradient norm, and the loss of the validation after it (1 where there is none)
Curve = dict[int, tuple[float, float, float]]


@dataclass(frozen=True)
class Finding:
    """A row of the report. Errors are relative; None where there is no number to compare.

    parameter: the tensor that differs most; on a miss the one in which the fault begins.
    """

    name: str
    loss_error: float | None
    grad_norm_error: float | None
    parameter: str | None
    parameter_error: float | None
    ok: bool


class _Failed(Exception):
    """Ranks ended without a result; holds the first one's exit code."""

    def __init__(self, code: int | None, message: str) -> None:
        super().__init__(message)
        self.code = code


class Proof:
    """The layouts of one trial as they are tried; the reference is tried first.

    Args:
        worker: what each rank of a layout runs.
    """

    def __init__(self, trial: Trial, *, worker: Worker = work, timeout: float = _TIMEOUT) -> None:
        self._trial, self.worker, self._timeout = trial, worker, timeout
        self._curves: dict[Layout, Curve] = {}
        self._saved: dict[Layout, Path] = {}
        self._count = 0

    def run_reference(self, reference: Layout = REFERENCE, *, resumes: bool = False) -> None:
        """Train what layouts are compared with.

        Raises:
            UserError: the run file cannot be trained here.
            MegaLiteError: it failed otherwise.
        """
        try:
            self._train(reference, save=resumes)
        except _Failed as error:
            kind = UserError if error.code == UserError.exit_code else MegaLiteError
            hint = "\n--scale proves a scaled-down copy of it" if "memory: " in str(error) else ""
            raise kind(f"the reference cannot be trained:\n{error}{hint}") from None

    def try_layout(self, layout: Layout, *, save: bool = False) -> Finding:
        """Train under a layout and compare with the reference; `save` for `try_resume`."""
        reference = layout.reference
        if reference not in self._curves:
            self.run_reference(reference, resumes=True)
        if layout == reference:
            return Finding(layout.name, 0.0, 0.0, None, 0.0, True)
        return self._compare(layout.name, layout, reference, save=save)

    def try_resume(self, pair: Resume) -> Finding:
        """Go on from a saved run's middle; compare with the same steps of the run that went on."""
        if pair.saved not in self._saved:
            return _failure(pair.name, "there is no checkpoint to go on from: its layout failed")
        checkpoint = str(self._saved[pair.saved] / "checkpoints" / folder_name(SAVED))
        return self._compare(pair.name, pair.resumed, pair.saved, resume=checkpoint)

    def _compare(
        self, name: str, layout: Layout, others: Layout, *, save: bool = False, resume: str = ""
    ) -> Finding:
        """A layout's run held against that of others, step by step."""
        try:
            found, differences = self._train(layout, others, save=save, resume=resume)
        except _Failed as error:
            return _failure(name, error)
        tolerances, before = _tolerances(layout, bool(resume)), SAVED if resume else 0
        expected = {n: row for n, row in self._curves[others].items() if n > before}
        both = [(found[n], row) for n, row in expected.items() if n in found]
        errors = [[_relative(x, y) for x, y in zip(*rows, strict=True)] for rows in both]
        loss = max((max(row[0], row[2]) for row in errors), default=math.inf)
        norm = max((row[1] for row in errors), default=math.inf)
        over = [d for d in differences if d["error"] > tolerances[2]]
        gradients = [d for d in differences if d["kind"] == "gradient"]
        shown = over[0] if over else max(gradients, key=lambda d: d["error"])
        parameter = shown["name"]
        if shown["kind"] != "gradient":
            parameter += f" ({shown['kind']}, step {shown['step']})"
        whole = found.keys() == expected.keys()
        ok = whole and not over and loss <= tolerances[0] and norm <= tolerances[1]
        return Finding(name, _finite(loss), _finite(norm), parameter, _finite(shown["error"]), ok)

    def _train(
        self, layout: Layout, others: Layout | None = None, *, save: bool = False, resume: str = ""
    ) -> tuple[Curve, list[dict[str, Any]]]:
        """A layout's run, and how its tensors differ from the others'.

        Args:
            save: whether others will go on from it, or for a reference, be compared with those.
            resume: the checkpoint to go on from.
        """
        self._count += 1
        folder, name = self._trial.folder, f"run_{self._count:02d}"
        is_reference, first = layout == layout.reference, SAVED + 1 if resume else 1
        saved = save and not is_reference
        config = self._trial.config(layout, name, save=saved)
        run = Path(config["logging"]["directory"]) / name
        keep = None
        if save or (is_reference and not resume):
            keep = str(self._seen(layout))
            self._seen(layout).mkdir()
        report = folder / f"{name}.report.json"
        # looked into: the first two of a process, the last, and those a resume compares with
        steps = [first, first + 1, *([SAVED + 1, SAVED + 2] if save else []), STEPS]
        job = {
            "config": config,
            "engine": layout.engine,
            "resume": resume or "never",
            "steps": steps,
            "others": str(self._seen(others)) if others else None,
            "keep": keep,
            "tolerance": _tolerances(layout)[2],
            "report": str(report),
        }
        path = folder / f"{name}.job.json"
        files.write_json(path, job)
        start = time.monotonic()
        _run_ranks(self.worker, path, layout.ranks, self._timeout)
        after = ", resumed" if resume else ""
        logger.info("%-44s %5.1f s", layout.name + after, time.monotonic() - start)
        curve = _read_curve(run)
        if not resume:
            self._curves[layout] = curve
        if saved:
            self._saved[layout] = run
        return curve, files.read_json(report)

    def _seen(self, layout: Layout) -> Path:
        """Where the tensors are that a run keeps for others to be compared with."""
        return self._trial.folder / f"seen_{layout.name}"


def _tolerances(layout: Layout, resumed: bool = False) -> tuple[float, float, float]:
    """Of loss, gradient norm and parameters."""
    if layout.precision == "bf16":
        return BF16
    return (RESUMED, RESUMED, PARAMETER) if resumed else (LOSS, NORM, PARAMETER)


def _failure(name: str, reason: object) -> Finding:
    logger.error("%s failed: %s", name, reason)
    return Finding(name, None, None, None, None, False)


def _relative(found: float, expected: float) -> float:
    error = abs(found - expected) / max(abs(expected), 1e-12)
    return error if error == error else math.inf


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _read_curve(folder: Path) -> Curve:
    rows = files.read_rows(folder / "metrics.jsonl")
    valid = {row["step"]: _number(row["loss"]) for row in rows if row["kind"] == "valid"}
    return {
        n: (_number(row["loss"]), _number(row["grad_norm"]), valid.get(n, 1.0))
        for row in rows
        if row["kind"] == "train" and (n := row["step"])
    }


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _run_ranks(worker: Worker, job: Path, count: int, timeout: float) -> None:
    """Run `worker(job)` as each of `count` ranks.

    Raises:
        _Failed: a rank failed, or not all were done in time; none is left running.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    context = _context()
    logs = [job.with_name(f"rank_{rank}.log") for rank in range(count)]
    ranks = []
    for rank, log in enumerate(logs):
        given = (worker, str(job), env.rank_environment(rank, count, port), str(log))
        ranks.append(context.Process(target=_be_rank, args=given, daemon=True))
    try:
        for process in ranks:
            process.start()
        _wait(ranks, logs, timeout)
    finally:
        for process in ranks:
            if process.pid is not None:
                process.kill()
                process.join()


def _context() -> SpawnContext | ForkServerContext:
    """How ranks begin: as forks of a server that only imports, since that takes most of their time.

    A process that has counted GPUs cannot be forked, and DeepSpeed's import counts them.
    """
    if torch.cuda.device_count():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([work.__module__, "megalite.engine.preload"])
    return context


def _be_rank(worker: Worker, job: str, environ: dict[str, str], log: str) -> None:
    env.replace(environ)
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    worker(job)


def _wait(ranks: Sequence[BaseProcess], logs: Sequence[Path], timeout: float) -> None:
    deadline, first = time.monotonic() + timeout, None
    running = list(range(len(ranks)))
    while running and time.monotonic() < deadline:
        time.sleep(0.02)
        running = [i for i, process in enumerate(ranks) if process.exitcode is None]
        failed = [i for i, process in enumerate(ranks) if process.exitcode]
        if failed and first is None:
            first = failed[0]
            deadline = min(deadline, time.monotonic() + _LAST_WORDS)
    if first is not None:
        words = logs[first].read_text(errors="replace").strip().splitlines()
        code, told = ranks[first].exitcode, "\n".join(words[-8:]) or "it said nothing"
        raise _Failed(code, f"rank {first} ended with exit code {code}:\n{told}")
    if running:
        raise _Failed(None, f"ranks {running} were not done after {timeout:.0f} s")
