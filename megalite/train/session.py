"""One start of a run: check everything, open the run folder, train, and record the end.

All ranks raise user errors before the run folder is opened.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from megalite import checkpoint
from megalite.checkpoint import Lease, Progress, Saver
from megalite.config import Precision
from megalite.data import Dataset, ExampleSet, Loader, Samples
from megalite.engine import Engine
from megalite.env import Launch
from megalite.errors import MegaLiteError, UserError
from megalite.evaluate import Prompts, Writer
from megalite.log import logger
from megalite.observe import PhaseTimer, Recorder, Stragglers, Trace, Watchdog, overwrite_status
from megalite.parallel import Grid, stop
from megalite.plan import Plan
from megalite.train.announce import announce
from megalite.train.changes import flat
from megalite.train.claim import claim, find_for
from megalite.train.evaluator import Evaluator
from megalite.train.finetuning import FinetuneEvaluator, open_examples, resolve_examples
from megalite.train.hooks import Hook
from megalite.train.hooks.checkpoints import Checkpoints
from megalite.train.hooks.forecast import ForecastCheck
from megalite.train.hooks.logging import StepLogger
from megalite.train.hooks.replicas import ReplicaCheck
from megalite.train.hooks.rollback import Rollback
from megalite.train.hooks.samples import TextSamples
from megalite.train.hooks.validation import HeldOutLoss, Validation, is_evaluation_due
from megalite.train.interventions import IN_CHECKPOINT, InterventionLog, order_id
from megalite.train.loop import Trainer
from megalite.train.options import RunOptions, Settings, check, check_command, join, settings_of
from megalite.train.outcome import end_state, lost_rank
from megalite.train.precision import agree_on_precision
from megalite.train.restore import restore
from megalite.train.resume import ResumePoint
from megalite.train.run_folder import open_run_folder
from megalite.train.spikes import SpikeDetector
from megalite.train.steps import ShutdownSignal, StepIterator, StopPoll


def run(options: RunOptions, launch: Launch) -> None:
    """Train as requested.

    Raises:
        UserError: the start was refused. Nothing was written, and a running start continues.
        MegaLiteError: a later failure, with its reason in status.json.
    """
    phases = PhaseTimer(options.began)
    with ShutdownSignal() as shutdown:
        grid = None
        if options.config.finetune is not None:
            check_command(options)
            grid = join(options, launch)
        try:
            if grid is not None:
                options = resolve_examples(options, grid)
            plan, train, valid, prompts = check(options, launch)
            grid = grid or join(options, launch)
            options, plan = agree_on_precision(options, launch, grid)
            settings = settings_of(options, plan, grid)
            lease, resume_point = claim(options, grid, train, settings)
            if resume_point is not None and resume_point.config is not None:
                options = replace(options, config=resume_point.config)
            with open_run_folder(
                options.folder,
                config=options.config,
                grid=grid,
                settings=settings.full,
                train=train,
                resume_point=resume_point,
                lease=lease,
            ) as recorder:
                Session(
                    options=options,
                    plan=plan,
                    grid=grid,
                    settings=settings,
                    train=train,
                    valid=valid,
                    prompts=prompts,
                    resume_point=resume_point,
                    recorder=recorder,
                    shutdown=shutdown,
                    phases=phases,
                    lease=lease,
                ).run()
        finally:
            if grid is not None:
                stop()


@dataclass(kw_only=True)
class Session:
    """One start of a run, from the opened run folder to the end.

    Attributes:
        settings: DeepSpeed's configuration.
        valid: held-out shards of pretraining.
        prompts: prompts for text samples.
        resume_point: checkpoint to resume from. None means a fresh start.
        lease: right to write into the run folder, on rank 0.
    """

    options: RunOptions
    plan: Plan
    grid: Grid
    settings: Settings
    train: Samples
    valid: Dataset | None
    prompts: Prompts | None
    resume_point: ResumePoint | None
    recorder: Recorder
    shutdown: ShutdownSignal
    phases: PhaseTimer
    lease: Lease | None

    def run(self) -> None:
        """Train, and record the end in status.json in any case."""
        self.progress = self.resume_point.progress if self.resume_point else Progress()
        self._report_running(self.progress)
        watchdog = self._watchdog()
        try:
            with ExitStack() as self._opened:
                self._train()
                if self._finetune is not None:
                    self._finetune.evaluate_test_split(self.progress)
                self.recorder.event(self.progress.step, "end", seconds=self.phases.totals())
                self.recorder.status("done", step=self.progress.step)
                self.grid.barrier()
        except BaseException as caught:
            error = lost_rank(caught) or caught
            state, reason = end_state(error)
            # the event explains why the next start was needed
            self.recorder.event(
                self.progress.step, state, reason=reason, seconds=self.phases.totals()
            )
            self.recorder.status(state, step=self.progress.step, reason=reason)
            if isinstance(error, UserError):  # the folder has changed, so the exit code is not 2
                raise MegaLiteError(str(error)) from error
            raise error from caught.__cause__
        finally:
            watchdog.close()

    def _watchdog(self) -> Watchdog:
        folder = self.options.folder

        def report(reason: str) -> None:
            logger.error("%s", reason)
            self.recorder.append("hang", self.progress.step, reason=reason)
            overwrite_status(folder, "failed", reason=reason, attempt=self.recorder.attempt)

        return Watchdog(
            self.phases,
            self.options.config.guards,
            folder=folder,
            attempt=self.recorder.attempt,
            rank=self.grid.rank,
            hosts=self.grid.all_gather_objects(socket.gethostname()),
            report=report,
        )

    def _train(self) -> None:
        self.interventions = InterventionLog(
            self.options.folder, self.grid, self.options.config.guards.spike_window
        )
        forecast = ForecastCheck(
            self.options.config,
            plan=self.plan,
            grid=self.grid,
            recorder=self.recorder,
            longest=self.train.longest if isinstance(self.train, ExampleSet) else None,
        )
        self.engine = _make_engine(self.options, self.plan, self.grid, self.settings)
        self._opened.push(lambda kind, *_: self.engine.close(failed=kind is not None))
        replicas = _make_replica_check(self.options, self.plan, self.grid, self.engine)
        if self.resume_point is not None:
            self._load(self.resume_point, replicas)
        resumed = self.resume_point is not None and not self.resume_point.weights_only
        self._continue_log(self.resume_point.folder if self.resume_point and resumed else None)
        announce(
            self.options,
            plan=self.plan,
            grid=self.grid,
            train=self.train,
            resume_point=self.resume_point,
            progress=self.progress,
            recorder=self.recorder,
        )
        config = self.options.config
        self.saver = self._make_saver()
        self._finetune = self._make_finetune_evaluator()
        self.stop_poll = StopPoll(self.grid, self.shutdown)
        trainer = Trainer(
            config=config,
            grid=self.grid,
            engine=self.engine,
            recorder=self.recorder,
            progress=self.progress,
            make_steps=self._make_steps,
            shutdown=self.shutdown,
            stop_poll=self.stop_poll,
            saver=self.saver,
            detector=SpikeDetector(
                config, self.interventions, scaled=self.plan.precision is Precision.FP16
            ),
            phases=self.phases,
            trace=Trace(self.options.folder / "profile", self.grid.rank, config.training.profile),
            hooks=tuple(self._hooks(replicas, forecast)),
            inspect=self.options.inspect,
        )
        try:
            trainer.run()
        finally:
            self.progress = trainer.progress

    def _hooks(self, replicas: ReplicaCheck | None, forecast: ForecastCheck) -> Iterator[Hook]:
        """Yield the hooks in an order in which a step's score precedes its save."""
        config = self.options.config
        yield StepLogger(
            config.training,
            plan=self.plan,
            grid=self.grid,
            recorder=self.recorder,
            phases=self.phases,
            stragglers=Stragglers(self.engine.model, self.grid),
        )
        evaluator = self._finetune or self._make_evaluator()
        if evaluator is not None:
            yield Validation(evaluator, self.phases, self.stop_poll)
        if self.prompts is not None:
            yield self._make_samples(self.prompts, evaluator)
        if replicas is not None:
            yield replicas
        yield Checkpoints(
            config.checkpoint,
            follows=self._finetune.is_due if self._finetune else None,
            retain=partial(_retain, self.options, self.grid, self.lease),
            recorder=self.recorder,
            phases=self.phases,
        )
        yield Rollback(
            config,
            engine=self.engine,
            grid=self.grid,
            root=self.options.root,
            lease=self.lease,
            resume_point=self.resume_point,
            interventions=self.interventions,
            recorder=self.recorder,
            continue_log=self._continue_log,
            report_running=self._report_running,
        )
        yield from (forecast, *self.options.hooks)

    def _make_evaluator(self) -> Evaluator | None:
        if self.valid is None:
            return None
        return HeldOutLoss(
            self.options.config.training,
            engine=self.engine,
            grid=self.grid,
            dataset=self.valid,
            recorder=self.recorder,
        )

    def _make_finetune_evaluator(self) -> FinetuneEvaluator | None:
        if self.options.examples is None:
            return None
        return FinetuneEvaluator(
            config=self.options.config,
            engine=self.engine,
            grid=self.grid,
            splits=open_examples(self.options.config, self.options.examples),
            interventions=self.interventions,
            recorder=self.recorder,
            root=self.options.root,
        )

    def _make_samples(self, prompts: Prompts, evaluator: Evaluator | None) -> TextSamples:
        config = self.options.config
        section = config.logging.samples
        return TextSamples(
            Writer(config, self.engine, self.grid, prompts),
            every=(section.every if section else None) or 0,
            # without held-out shards, samples follow the steps at which they would be evaluated
            follows=evaluator.is_due
            if evaluator
            else lambda before, now: is_evaluation_due(config.training, now.step),
            recorder=self.recorder,
            phases=self.phases,
            should_stop=self.stop_poll,
        )

    def _load(self, resume_point: ResumePoint, replicas: ReplicaCheck | None) -> None:
        find_previous = partial(
            find_for, self.options, self.grid, self.train, self.settings, lease=self.lease
        )
        self.resume_point, self.progress = restore(
            resume_point,
            find_previous=find_previous,
            engine=self.engine,
            config=self.options.config,
            grid=self.grid,
            root=self.options.root,
            lease=self.lease,
        )
        if self.resume_point.config is not None:  # an earlier checkpoint, if one was damaged
            self.options = replace(self.options, config=self.resume_point.config)
        self._report_running(self.progress)
        if replicas is not None:  # each rank may have read other files
            replicas.check(self.progress.step)

    def _continue_log(self, folder: Path | None) -> None:
        """Continue the intervention log from a checkpoint."""
        before, now = self.resume_point.orders if self.resume_point else (None, None)
        self.interventions.begin(folder, order=now or self._order(), before=before or self._order())

    def _order(self) -> str:
        return order_id(self.train.content_fingerprint, self.options.config.data)

    def _make_steps(self, progress: Progress) -> StepIterator:
        loader = Loader(
            self.train,
            global_batch_size=self.plan.global_batch_size,
            micro_batch_size=self.plan.micro_batch_size,
            data_rank=self.grid.at.data_rank,
            data_size=self.grid.mesh.data,
            start=progress.samples,
            gaps=self.interventions.gaps,
            pin_memory=self.grid.device.type == "cuda",
            count=self.engine.objective.count,
        )
        lease = self.lease
        return StepIterator(
            loader,
            self.grid,
            self.shutdown,
            written=lambda: self.saver.written,
            superseded=lambda: lease is not None and lease.is_lost(),
        )

    def _make_saver(self) -> Saver:
        return Saver(
            self.engine,
            self.options.config,
            grid=self.grid,
            root=self.options.root,
            data_fingerprint=self.train.content_fingerprint,
            tokenizer=self.options.folder / "tokenizer",
            tokenizer_sha256=self.train.tokenizer_sha256,
            lease=self.lease,
            deepspeed=flat(self.settings.defaults),
            notes=lambda: {IN_CHECKPOINT: self.interventions.content()},
        )

    def _report_running(self, progress: Progress) -> None:
        """Record the state, and this run's checkpoint that training continues from, if any."""
        point = self.resume_point
        is_local = point is not None and point.folder.parent == self.options.root
        last = point.folder.name if point and is_local else None
        self.recorder.status("running", step=progress.step, last_checkpoint=last)


def _make_engine(options: RunOptions, plan: Plan, grid: Grid, settings: Settings) -> Engine:
    if options.engine == "reference":
        from megalite.engine.reference import ReferenceEngine

        return ReferenceEngine(options.config, grid=grid)
    from megalite.engine.deepspeed.engine import DeepSpeedEngine

    return DeepSpeedEngine(
        options.config, grid=grid, precision=plan.precision, settings=settings.full
    )


def _make_replica_check(
    options: RunOptions, plan: Plan, grid: Grid, engine: Engine
) -> ReplicaCheck | None:
    every = options.config.training.replica_check_every
    if every == 0:
        return None
    return ReplicaCheck(engine, options.config.model, grid, every=every, stage=plan.zero_stage)


def _retain(options: RunOptions, grid: Grid, lease: Lease | None) -> threading.Thread | None:
    if grid.rank != 0:
        return None
    return checkpoint.retain(options.root, options.config.checkpoint, lease)
