"""A run from its request to its end: check everything, open the run folder, train, say how it went.

Whatever the user can mend is found before the run folder is opened, on every rank alike.
"""

from __future__ import annotations

import re
import socket
import threading
from dataclasses import dataclass
from functools import partial
from typing import Any

from megalite import checkpoint, env
from megalite.checkpoint import Lease, Place, Saver
from megalite.data import Dataset, ExampleSet, Loader, Samples
from megalite.engine import Engine
from megalite.env import Launch
from megalite.errors import (
    CheckpointError,
    MegaLiteError,
    Stopped,
    Superseded,
    UserError,
)
from megalite.evaluate import Prompts, Writer
from megalite.log import logger
from megalite.observe import Recorder, Sections, Stragglers, Trace, Watchdog, restate
from megalite.parallel import Grid, start, stop
from megalite.plan import Plan
from megalite.train.checks import remarks
from megalite.train.drift import DriftGuard
from megalite.train.feed import Feed, StopRequest
from megalite.train.folder import opened
from megalite.train.foresight import Foresight
from megalite.train.judge import Judge
from megalite.train.ledger import IN_CHECKPOINT, Ledger
from megalite.train.loop import Jump, Trainer
from megalite.train.request import Request, Settings, check, check_command, settings_of
from megalite.train.resume import Origin, find_origin, flat, load
from megalite.train.tuning import Tuning, complete, open_examples

# what gloo and NCCL say of a rank that they have lost
_LOST = re.compile(r"gloo/|closed by peer|reset by peer|remote process|Broken pipe")


def run(request: Request, launch: Launch) -> None:
    """Train as requested.

    Raises:
        UserError: before anything was written.
        MegaLiteError: of another kind afterwards; status.json tells what happened.
    """
    sections = Sections()
    with StopRequest() as stop_request:
        grid = None
        if request.config.finetune is not None:
            check_command(request)
            grid = start(launch, tensor_parallel=request.config.parallel.tensor)
        try:
            if grid is not None:
                request = complete(request, grid)
            plan, train, valid, prompts = check(request, launch)
            grid = grid or start(launch, tensor_parallel=plan.tensor_parallel)
            settings = settings_of(request, plan, grid)
            origin = _origin(request, grid, train, settings)
            folder, config = request.folder, request.config
            with opened(folder, config, grid, settings.full, train, origin) as recorder:
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
                )()
        finally:
            stop()


def _origin(request: Request, grid: Grid, train: Samples, settings: Settings) -> Origin | None:
    try:
        return find_origin(
            request.config,
            grid=grid,
            root=request.root,
            resume=request.resume,
            init_from=request.init_from,
            allow=request.allow_change,
            data_fingerprint=train.content_fingerprint,
            tokenizer_sha256=train.tokenizer_sha256,
            deepspeed=settings.left_to_it,
        )
    except CheckpointError as error:  # the folder is there, and its last state is no longer true
        if grid.rank == 0:
            restate(request.folder, "failed", reason=_verdict(error)[1])
        raise


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

    def __call__(self) -> None:
        """Train; however it ends, status.json says so."""
        self.place = self.origin.place if self.origin else Place()
        self._say_running()
        watchdog = self._watchdog()
        try:
            self._train()
            if self.tuning is not None:
                self.tuning.conclude(self.place.step)
            self.recorder.event(self.place.step, "end", seconds=self.sections.totals())
            self.recorder.status("done", step=self.place.step)
            self.grid.barrier()
        except BaseException as caught:
            error = _lost_rank(caught) or caught
            state, reason = _verdict(error)
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
            restate(folder, "failed", reason=found)

        return Watchdog(
            self.sections,
            self.request.config.guards,
            folder=folder,
            attempt=self.recorder.attempt,
            rank=self.grid.rank,
            hosts=self.grid.gather(socket.gethostname()),
            report=report,
        )

    def _train(self) -> None:
        request, config, grid = self.request, self.request.config, self.grid
        self.ledger = Ledger(request.folder, grid, config.guards.spike_window)
        host = socket.gethostname()
        longest = self.train.longest if isinstance(self.train, ExampleSet) else None
        foresight = Foresight(config, self.plan, grid, host, grid.gather(host), longest)
        self.engine = _make_engine(request, self.plan, grid, self.settings)
        guard = _guard(request, self.plan, grid, self.engine)
        if self.origin is not None:
            self._load(self.origin, guard)
        resumed = self.origin is not None and not self.origin.weights_only
        self.ledger.begin(self.origin.folder if self.origin and resumed else None)
        self._announce()
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
            partial(_retain, request, grid),
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
        again = partial(_origin, request, self.grid, self.train, self.settings)
        self.origin, self.place = load(
            origin, again, self.engine, request.config, self.grid, request.root
        )
        self._say_running()
        if guard is not None:  # each rank may have read for itself
            guard.check(self.place.step)

    def _go_back(self, jump: Jump) -> None:
        """Return to the newest checkpoint, and leave out the data around the jump from there on."""
        trainer, grid, config = self.trainer, self.grid, self.request.config
        before = trainer.place
        trainer.settle()
        found, damaged = checkpoint.find_newest(self.request.root, grid)
        checkpoint.set_aside_damaged(damaged, grid)
        if found is None:
            logger.warning("step %d: %s; no checkpoint to go back to", jump.step, jump.reason)
            trainer.leave_out(jump)
            return
        folder, manifest = found
        size, around = self.plan.global_batch_size, config.guards.skip_window
        first = max(manifest.samples, before.samples - around // 2 * size)
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
        self.ledger.begin(folder)
        self.place = place
        trainer.go_back(place, self._feed())
        logger.warning("step %d: %s; back to %s", jump.step, jump.reason, folder.name)
        self.recorder.event(jump.step, "rollback", **{k: entry[k] for k in ("to", "gap", "reason")})
        self._say_running()

    def _feed(self) -> Feed:
        plan, grid = self.plan, self.grid
        loader = Loader(
            self.train,
            global_batch_size=plan.global_batch_size,
            micro_batch_size=plan.micro_batch_size,
            data_rank=grid.data_rank,
            data_size=plan.data_parallel,
            start=self.place.samples,
            gaps=self.ledger.gaps,
            pin_memory=grid.device.type == "cuda",
        )
        return Feed(loader, grid, self.stop_request, lambda: self.saver.written)

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
            lease=Lease(request.root) if self.grid.rank == 0 else None,
            deepspeed=flat(self.settings.defaults),
            notes=lambda: {IN_CHECKPOINT: self.ledger.content()},
        )

    def _say_running(self) -> None:
        """With the checkpoint of this run that training goes on from, where there is one."""
        origin, root = self.origin, self.request.root
        own = origin.folder.name if origin and origin.folder.parent == root else None
        self.recorder.status("running", step=self.place.step, last_checkpoint=own)

    def _announce(self) -> None:
        """Say what this start is: to the log, and as an event."""
        config, plan, origin = self.request.config, self.plan, self.origin
        logger.info(
            "%s: %.1f M parameters, %s, ZeRO-%d, %d x data, %d x tensor, %d x %d tokens a step, %s",
            config.name,
            plan.parameters / 1e6,
            plan.precision,
            plan.zero_stage,
            plan.data_parallel,
            plan.tensor_parallel,
            plan.global_batch_size,
            plan.sequence_length,
            self.grid.device.type,
        )
        for remark in remarks(config, plan):
            logger.info("%s", remark)
        facts = self.train.describe(plan.global_batch_size * config.training.steps)
        layout = {"world_size": plan.world_size, "zero_stage": plan.zero_stage, "data": facts}
        if origin is None or origin.weights_only:
            extra = {"init_from": str(origin.folder)} if origin else {}
            if origin:
                logger.info("a fresh run from the weights of %s", origin.folder)
            self.recorder.event(self.place.step, "start", **layout, **extra)
            return
        logger.info("resumed from %s", origin.folder)
        if self.place.step >= config.training.steps:
            more = "finetune.epochs" if config.finetune else "training.steps"
            logger.info("all of its steps are done: raise %s, or choose another name", more)
        for key, change in origin.changes.items():
            told = (
                f"{change['before']} -> {change['after']}" if isinstance(change, dict) else change
            )
            logger.info("changed since: %s: %s", key, told)
        self.recorder.event(
            self.place.step,
            "resume",
            path=str(origin.folder),
            job=env.job().id or None,
            changes=origin.changes,
            **layout,
        )


def _lost_rank(error: BaseException) -> MegaLiteError | None:
    """What a collective's failure means when it is another rank that has gone."""
    if not isinstance(error, RuntimeError) or not _LOST.search(str(error)):
        return None
    first = str(error).splitlines()[0]
    return MegaLiteError(
        "another rank no longer answers: see what ended it first, in its own output; the same "
        f"command goes on from the last checkpoint ({first})"
    )


def _verdict(error: BaseException) -> tuple[Any, str]:
    state = "failed"
    if isinstance(error, Stopped | Superseded):
        state = "stopped" if isinstance(error, Stopped) else "superseded"
    return state, f"{type(error).__name__}: {error}"


def _make_engine(request: Request, plan: Plan, grid: Grid, settings: Settings) -> Engine:
    if request.engine == "reference":
        from megalite.engine.reference import ReferenceEngine

        return ReferenceEngine(request.config, grid=grid)
    from megalite.engine.zero import DeepSpeedEngine

    return DeepSpeedEngine(
        request.config, grid=grid, precision=plan.precision, settings=settings.full
    )


def _guard(request: Request, plan: Plan, grid: Grid, engine: Engine) -> DriftGuard | None:
    if request.config.training.drift_every == 0:
        return None
    return DriftGuard(engine, request.config.model, grid, stage=plan.zero_stage)


def _retain(request: Request, grid: Grid) -> threading.Thread | None:
    if grid.rank != 0:
        return None
    return checkpoint.retain(request.root, request.config.checkpoint)
