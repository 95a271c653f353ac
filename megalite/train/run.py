"""A run from its request to its end: check everything, open the run folder, train, say how it went.

Every fault that the user can repair is found before the run folder is opened, on all ranks.
"""

from __future__ import annotations

import socket
import threading
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from megalite import checkpoint
from megalite.checkpoint import Lease, Place, Saver
from megalite.data import Dataset, ExampleSet, Loader, Samples
from megalite.engine import Engine
from megalite.env import Launch
from megalite.errors import MegaLiteError, Stopped, UserError
from megalite.evaluate import Prompts, Writer
from megalite.log import logger
from megalite.observe import (
    Recorder,
    Sections,
    Stragglers,
    Trace,
    Watchdog,
    restate,
)
from megalite.parallel import Grid, start, stop
from megalite.plan import Plan
from megalite.train.announce import announce
from megalite.train.changes import flat
from megalite.train.claim import claim, find_for
from megalite.train.drift import DriftGuard
from megalite.train.feed import Feed, StopRequest
from megalite.train.folder import opened
from megalite.train.foresight import Foresight
from megalite.train.judge import Judge, Jump
from megalite.train.ledger import IN_CHECKPOINT, Ledger, order_id
from megalite.train.loop import Trainer
from megalite.train.outcome import lost_rank, verdict
from megalite.train.precision import settle_precision
from megalite.train.request import Request, Settings, check, check_command, settings_of
from megalite.train.resume import Origin, load, samples_at
from megalite.train.tuning import Tuning, complete, open_examples


def run(request: Request, launch: Launch) -> None:
    """Train as requested.

    Raises:
        UserError: the start was refused. Nothing was written, and a start that runs goes on.
        MegaLiteError: of another kind afterwards; status.json says what happened.
    """
    sections = Sections()
    with StopRequest() as stop_request:
        grid = None
        if request.config.finetune is not None:
            check_command(request)
            grid = start(launch, tensor=request.config.parallel.tensor)
        try:
            if grid is not None:
                request = complete(request, grid)
            plan, train, valid, prompts = check(request, launch)
            grid = grid or start(launch, tensor=plan.tensor_parallel)
            request, plan = settle_precision(request, launch, grid)
            settings = settings_of(request, plan, grid)
            lease, origin = claim(request, grid, train, settings)
            if origin is not None and origin.config is not None:
                request = replace(request, config=origin.config)
            folder, config = request.folder, request.config
            with opened(folder, config, grid, settings.full, train, origin, lease) as recorder:
                _Run(
                    request,
                    plan,
                    grid,
                    settings,
                    train,
                    valid,
                    prompts,
                    origin,
                    recorder,
                    stop_request,
                    sections,
                    lease,
                )()
        finally:
            stop()


@dataclass
class _Run:
    """One start of a run, from an open folder to its end."""

    request: Request
    plan: Plan
    grid: Grid
    settings: Settings
    train: Samples
    valid: Dataset | None
    prompts: Prompts | None
    origin: Origin | None
    recorder: Recorder
    stop_request: StopRequest
    sections: Sections
    lease: Lease | None

    def __call__(self) -> None:
        """Train; however it ends, status.json says so."""
        self.place = self.origin.place if self.origin else Place()
        self._say_running()
        watchdog = self._watchdog()
        try:
            self._train()
            if self.tuning is not None:
                self.tuning.conclude(self.place)
            self.recorder.event(self.place.step, "end", seconds=self.sections.totals())
            self.recorder.status("done", step=self.place.step)
            self.grid.barrier()
        except BaseException as caught:
            error = lost_rank(caught) or caught
            state, reason = verdict(error)
            # an event of what ended the start: the cause of the next one
            self.recorder.event(
                self.place.step, state, reason=reason, seconds=self.sections.totals()
            )
            self.recorder.status(state, step=self.place.step, reason=reason)
            if isinstance(error, UserError):  # found too late to be exit code 2
                raise MegaLiteError(str(error)) from error
            raise error from caught.__cause__
        finally:
            watchdog.close()

    def _watchdog(self) -> Watchdog:
        folder = self.request.folder

        def report(found: str) -> None:
            logger.error("%s", found)
            self.recorder.append("hang", self.place.step, reason=found)
            restate(folder, "failed", reason=found, attempt=self.recorder.attempt)

        return Watchdog(
            self.sections,
            self.request.config.guards,
            folder=folder,
            attempt=self.recorder.attempt,
            rank=self.grid.rank,
            hosts=self.grid.all_gather_objects(socket.gethostname()),
            report=report,
        )

    def _train(self) -> None:
        request, config, grid = self.request, self.request.config, self.grid
        self.ledger = Ledger(request.folder, grid, config.guards.spike_window)
        host = socket.gethostname()
        longest = self.train.longest if isinstance(self.train, ExampleSet) else None
        foresight = Foresight(config, self.plan, grid, host, grid.all_gather_objects(host), longest)
        self.engine = _make_engine(request, self.plan, grid, self.settings)
        guard = _guard(request, self.plan, grid, self.engine)
        if self.origin is not None:
            self._load(self.origin, guard)
            request, config = self.request, self.request.config
        resumed = self.origin is not None and not self.origin.weights_only
        self._begin_ledger(self.origin.folder if self.origin and resumed else None)
        announce(request, self.plan, grid, self.train, self.origin, self.place, self.recorder)
        self.saver = self._make_saver()
        self.tuning = self._make_tuning()
        self.trainer = Trainer(
            config,
            self.plan,
            grid,
            self.engine,
            self._feed(),
            self.valid,
            self.recorder,
            self.stop_request,
            self.place,
            self.saver,
            partial(_retain, request, grid, self.lease),
            Trace(request.folder / "profile", grid.rank, config.training.profile),
            Judge(config, self.ledger, scaled=self.plan.precision == "fp16"),
            self.sections,
            Stragglers(self.engine.model, grid),
            guard,
            request.inspect,
            self.tuning,
            Writer(config, self.engine, grid, self.prompts) if self.prompts else None,
        )
        going_on = True
        while going_on:
            try:
                self.trainer.run()
                going_on = False
            except Jump as jump:
                self._go_back(jump)
            except Stopped:  # by agreement: every rank is here
                self.trainer.feed.close()
                raise
            finally:
                self.place = self.trainer.place
        self.trainer.feed.close()
        foresight.conclude(self.recorder)

    def _make_tuning(self) -> Tuning | None:
        request = self.request
        if request.examples is None:
            return None
        sets = open_examples(request.config, request.examples)
        return Tuning(
            request.config,
            self.engine,
            self.grid,
            sets,
            self.ledger,
            self.recorder,
            request.root,
        )

    def _load(self, origin: Origin, guard: DriftGuard | None) -> None:
        request = self.request
        again = partial(find_for, request, self.grid, self.train, self.settings, lease=self.lease)
        self.origin, self.place = load(
            origin, again, self.engine, request.config, self.grid, request.root, self.lease
        )
        if self.origin.config is not None:  # of an earlier checkpoint, if the newest was damaged
            self.request = replace(request, config=self.origin.config)
        self._say_running()
        if guard is not None:  # each rank may have read for itself
            guard.check(self.place.step)

    def _go_back(self, jump: Jump) -> None:
        """Return to the newest checkpoint, and leave out the data around the jump from there on."""
        trainer, grid, config = self.trainer, self.grid, self.request.config
        before = trainer.place
        trainer.settle()
        found, damaged = checkpoint.find_newest(self.request.root, grid)
        checkpoint.set_aside_damaged(damaged, grid, self.lease)
        if found is None:
            logger.warning("step %d: %s; no checkpoint to go back to", jump.step, jump.reason)
            trainer.leave_out(jump)
            return
        folder, manifest = found
        samples = samples_at(self.origin, folder, manifest, config)
        size, around = self.plan.global_batch_size, config.guards.skip_window
        first = max(samples, before.samples - around // 2 * size)
        entry = {
            "kind": "rollback",
            "step": jump.step,
            "samples": before.samples,
            "reason": jump.reason,
            "to": manifest.step,
            "gap": [first, before.samples + (around - around // 2) * size],
        }
        self.ledger.add(entry)
        trainer.feed.close()
        place = checkpoint.restore(self.engine, config, grid=grid, folder=folder, manifest=manifest)
        self._begin_ledger(folder)
        self.place = place = replace(place, samples=samples)
        trainer.go_back(place, self._feed())
        logger.warning("step %d: %s; back to %s", jump.step, jump.reason, folder.name)
        self.recorder.event(jump.step, "rollback", **{k: entry[k] for k in ("to", "gap", "reason")})
        self._say_running()

    def _begin_ledger(self, folder: Path | None) -> None:
        before, now = self.origin.orders if self.origin else (None, None)
        self.ledger.begin(folder, order=now or self._order(), before=before or self._order())

    def _order(self) -> str:
        return order_id(self.train.content_fingerprint, self.request.config.data)

    def _feed(self) -> Feed:
        plan, grid = self.plan, self.grid
        loader = Loader(
            self.train,
            global_batch_size=plan.global_batch_size,
            micro_batch_size=plan.micro_batch_size,
            data_rank=grid.at.data_rank,
            data_size=plan.data_parallel,
            start=self.place.samples,
            gaps=self.ledger.gaps,
            pin_memory=grid.device.type == "cuda",
            count=self.engine.objective.count,
        )
        lease = self.lease
        return Feed(
            loader,
            grid,
            self.stop_request,
            lambda: self.saver.written,
            lambda: lease is not None and lease.is_lost(),
        )

    def _make_saver(self) -> Saver:
        request, train = self.request, self.train
        return Saver(
            self.engine,
            request.config,
            grid=self.grid,
            root=request.root,
            data_fingerprint=train.content_fingerprint,
            tokenizer=request.folder / "tokenizer",
            tokenizer_sha256=train.tokenizer_sha256,
            lease=self.lease,
            deepspeed=flat(self.settings.defaults),
            notes=lambda: {IN_CHECKPOINT: self.ledger.content()},
        )

    def _say_running(self) -> None:
        """With the checkpoint of this run that training goes on from, where there is one."""
        origin, root = self.origin, self.request.root
        own = origin.folder.name if origin and origin.folder.parent == root else None
        self.recorder.status("running", step=self.place.step, last_checkpoint=own)


def _make_engine(request: Request, plan: Plan, grid: Grid, settings: Settings) -> Engine:
    if request.engine == "reference":
        from megalite.engine.reference import ReferenceEngine

        return ReferenceEngine(request.config, grid=grid)
    from megalite.engine.deepspeed.engine import DeepSpeedEngine

    return DeepSpeedEngine(
        request.config, grid=grid, precision=plan.precision, settings=settings.full
    )


def _guard(request: Request, plan: Plan, grid: Grid, engine: Engine) -> DriftGuard | None:
    if request.config.training.drift_every == 0:
        return None
    return DriftGuard(engine, request.config.model, grid, stage=plan.zero_stage)


def _retain(request: Request, grid: Grid, lease: Lease | None) -> threading.Thread | None:
    if grid.rank != 0:
        return None
    return checkpoint.retain(request.root, request.config.checkpoint, lease)
