"""A run from its request to its end: check everything, open the run folder, train, say how it went.

Whatever the user can mend is found before the run folder is opened, on every rank alike.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from megalite import checkpoint, env, files, log
from megalite.checkpoint import Lease, Place, Saver
from megalite.config import RunConfig
from megalite.data import Dataset, Loader, open_data
from megalite.engine import Engine
from megalite.env import Launch
from megalite.errors import (
    CheckpointError,
    CommandError,
    DataError,
    MegaLiteError,
    Stopped,
    Superseded,
    UserError,
)
from megalite.log import logger
from megalite.observe import Recorder, Trace, previous_attempts, restate
from megalite.parallel import Grid, start, stop
from megalite.plan import Plan, deepspeed_dict, make_plan
from megalite.train.checks import hardware_faults
from megalite.train.drift import DriftGuard
from megalite.train.feed import Feed, StopRequest
from megalite.train.loop import Inspect, Trainer
from megalite.train.resume import ALLOWABLE, Origin, check_request, find_origin, flat, load


@dataclass(frozen=True)
class Request:
    """What a launcher was asked for.

    resume: "auto", "never", or a step or run folder. init_from: a checkpoint whose weights a fresh
    run starts from. engine: "reference" is the plain oracle, one rank in fp32. inspect: looks at
    each step's gradients before they are used.
    """

    config: RunConfig
    resume: str = "auto"
    init_from: str | None = None
    allow_change: tuple[str, ...] = ()
    engine: Literal["deepspeed", "reference"] = "deepspeed"
    inspect: Inspect | None = None

    @property
    def folder(self) -> Path:
        return Path(self.config.logging.directory) / self.config.name

    @property
    def root(self) -> Path:
        return self.folder / "checkpoints"


def run(request: Request, launch: Launch) -> None:
    """Train as requested.

    Raises:
        UserError: before anything was written.
        MegaLiteError: of another kind afterwards; status.json tells what happened.
    """
    with StopRequest() as stop_request:
        plan, train, valid = _check(request, launch)
        grid = start(launch, tensor_parallel=plan.tensor_parallel)
        try:
            settings = _settings(request, plan, grid)
            origin = _origin(request, grid, train, settings)
            with _opened(request, plan, grid, settings, train, origin) as recorder:
                _train(
                    request,
                    plan,
                    grid,
                    settings,
                    train,
                    valid,
                    origin,
                    recorder,
                    stop_request,
                )
        finally:
            stop()


def _check(request: Request, launch: Launch) -> tuple[Plan, Dataset, Dataset | None]:
    """Everything that can be known without the other ranks; all faults at once."""
    config = request.config
    unknown = [key for key in request.allow_change if key not in ALLOWABLE]
    if unknown:
        raise CommandError(
            f"--allow-change {unknown[0]}: give one of {', '.join(ALLOWABLE)}; everything else may "
            "change without it"
        )
    check_request(request.root, request.resume)
    if request.init_from is not None and not Path(request.init_from).is_dir():
        raise CommandError(f"--init-from {request.init_from}: no such folder")
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    plan = make_plan(config, world_size=launch.world_size, device=device)
    faults = hardware_faults(config, plan, launch, device)
    try:
        train, valid = open_data(config.data, vocab_size=config.model.vocab_size)
        if config.training.global_batch_size > train.windows:
            raise DataError(
                f"training.global_batch_size {config.training.global_batch_size}, but data.train "
                f"holds {train.windows} samples in all; lower it, or give more data"
            )
    except UserError as error:
        raise type(error)("\n".join([*faults, str(error)])) from None
    if faults:
        raise UserError("\n".join(faults))
    return plan, train, valid


@dataclass(frozen=True)
class _Settings:
    """DeepSpeed's JSON for this run, and what the installed DeepSpeed assumes by itself."""

    full: dict[str, Any]
    defaults: dict[str, Any]

    @property
    def left_to_it(self) -> dict[str, Any]:
        """The defaults that hold in this run, by dotted key."""
        ours = flat(self.full)
        return {key: value for key, value in flat(self.defaults).items() if ours.get(key) == value}


def _settings(request: Request, plan: Plan, grid: Grid) -> _Settings:
    if request.engine == "reference":
        return _Settings({}, {})
    from megalite.engine import ds_config  # imports DeepSpeed

    full = ds_config.complete(deepspeed_dict(request.config, plan), grid)
    return _Settings(full, ds_config.defaults(grid))


def _origin(request: Request, grid: Grid, train: Dataset, settings: _Settings) -> Origin | None:
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


@contextmanager
def _opened(
    request: Request,
    plan: Plan,
    grid: Grid,
    settings: _Settings,
    train: Dataset,
    origin: Origin | None,
) -> Iterator[Recorder]:
    """The run folder, opened by rank 0; however the run ends, status.json says so."""
    folder, handler, attempt, fault = request.folder, None, 0, None
    if grid.rank == 0:
        try:
            attempt = _prepare(request, settings, train, origin)
            handler = log.add_file(folder / "log.txt")
        except (OSError, shutil.Error) as error:
            fault = f"the run folder {folder} cannot be written: {error}; name another directory"
    if fault := grid.gather(fault)[0]:
        raise CommandError(fault)
    recorder = Recorder(
        folder,
        rank=grid.rank,
        attempt=attempt,
        total_steps=request.config.training.steps,
        tensorboard=request.config.logging.tensorboard,
        tokens_per_step=plan.tokens_per_step,
    )
    try:
        yield recorder
    finally:
        recorder.close()
        log.remove(handler)


def _prepare(request: Request, settings: _Settings, train: Dataset, origin: Origin | None) -> int:
    """Write what a run folder holds from the start; returns the number of this attempt."""
    folder = request.folder
    attempt = previous_attempts(folder)
    request.root.mkdir(parents=True, exist_ok=True)
    checkpoint.clear_leftovers(request.root)
    files.clear_partials(folder)
    files.write_json(folder / "config.json", request.config.model_dump(mode="json"))
    files.write_json(folder / "deepspeed.json", settings.full)
    # nothing of another start's tokenizer may stay behind in it
    shutil.rmtree(folder / "tokenizer", ignore_errors=True)
    if train.tokenizer_folder is None:  # Megatron's shards do not tell it
        (folder / "tokenizer").mkdir()
    else:
        shutil.copytree(train.tokenizer_folder, folder / "tokenizer")
    left = []
    if origin is not None and not origin.weights_only:
        left = checkpoint.set_aside_later(request.root, origin.place.step)
    if left:
        logger.info("going on from an earlier step; set aside: %s", ", ".join(left))
    return attempt


def _train(
    request: Request,
    plan: Plan,
    grid: Grid,
    settings: _Settings,
    train: Dataset,
    valid: Dataset | None,
    origin: Origin | None,
    recorder: Recorder,
    stop_request: StopRequest,
) -> None:
    place = origin.place if origin else Place()
    recorder.status("running", step=place.step, last_checkpoint=_own_name(request, origin))
    trainer: Trainer | None = None
    try:
        engine = _make_engine(request, plan, grid, settings)
        if origin is not None:
            again = partial(_origin, request, grid, train, settings)
            origin, place = load(origin, again, engine, request.config, grid, request.root)
            recorder.status("running", step=place.step, last_checkpoint=_own_name(request, origin))
        guard = _guard(request, plan, grid, engine)
        if origin is not None and guard is not None:  # each rank may have read for itself
            guard.check(place.step)
        _announce(request, plan, grid, train, origin, place, recorder)
        loader = _loader(plan, grid, train, place)
        saver = _saver(request, grid, engine, train, settings)
        feed = Feed(loader, grid, stop_request, lambda: saver.written)
        trainer = Trainer(
            request.config,
            plan,
            grid,
            engine,
            feed,
            valid,
            recorder,
            stop_request,
            place,
            saver,
            _retainer(request, grid),
            Trace(request.folder / "profile", grid.rank, request.config.training.profile),
            guard,
            request.inspect,
        )
        try:
            trainer.run()
        except Stopped:  # by agreement: every rank is here
            feed.close()
            raise
        feed.close()
        recorder.event(trainer.place.step, "end")
        recorder.status("done", step=trainer.place.step)
        grid.barrier()
    except BaseException as error:
        state, reason = _verdict(error)
        recorder.status(state, step=trainer.place.step if trainer else place.step, reason=reason)
        if isinstance(error, UserError):  # found too late to be exit code 2
            raise MegaLiteError(str(error)) from error
        raise


def _verdict(error: BaseException) -> tuple[Any, str]:
    state = "failed"
    if isinstance(error, Stopped | Superseded):
        state = "stopped" if isinstance(error, Stopped) else "superseded"
    return state, f"{type(error).__name__}: {error}"


def _make_engine(request: Request, plan: Plan, grid: Grid, settings: _Settings) -> Engine:
    if request.engine == "reference":
        from megalite.engine.reference import ReferenceEngine

        return ReferenceEngine(request.config, grid=grid)
    from megalite.engine.zero import DeepSpeedEngine

    return DeepSpeedEngine(
        request.config, grid=grid, precision=plan.precision, settings=settings.full
    )


def _announce(
    request: Request,
    plan: Plan,
    grid: Grid,
    train: Dataset,
    origin: Origin | None,
    place: Place,
    recorder: Recorder,
) -> None:
    """Say what this start is: to the log, and as an event."""
    config = request.config
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
        grid.device.type,
    )
    facts = train.describe(plan.global_batch_size * config.training.steps)
    layout = {"world_size": plan.world_size, "zero_stage": plan.zero_stage, "data": facts}
    if origin is None or origin.weights_only:
        extra = {"init_from": str(origin.folder)} if origin else {}
        recorder.event(place.step, "start", **layout, **extra)
    else:
        logger.info("resumed from %s", origin.folder)
        for key, change in origin.changes.items():
            told = (
                f"{change['before']} -> {change['after']}" if isinstance(change, dict) else change
            )
            logger.info("changed since: %s: %s", key, told)
        recorder.event(
            place.step,
            "resume",
            path=str(origin.folder),
            job=env.job().id or None,
            changes=origin.changes,
            **layout,
        )


def _own_name(request: Request, origin: Origin | None) -> str | None:
    """The checkpoint of this run that training goes on from."""
    return origin.folder.name if origin and origin.folder.parent == request.root else None


def _loader(plan: Plan, grid: Grid, train: Dataset, place: Place) -> Loader:
    return Loader(
        train,
        global_batch_size=plan.global_batch_size,
        micro_batch_size=plan.micro_batch_size,
        data_rank=grid.data_rank,
        data_size=plan.data_parallel,
        start=place.samples,
        pin_memory=grid.device.type == "cuda",
    )


def _saver(
    request: Request, grid: Grid, engine: Engine, train: Dataset, settings: _Settings
) -> Saver:
    return Saver(
        engine,
        request.config,
        grid=grid,
        root=request.root,
        data_fingerprint=train.content_fingerprint,
        tokenizer=request.folder / "tokenizer",
        tokenizer_sha256=train.tokenizer_sha256,
        lease=Lease(request.root) if grid.rank == 0 else None,
        deepspeed=flat(settings.defaults),
    )


def _guard(request: Request, plan: Plan, grid: Grid, engine: Engine) -> DriftGuard | None:
    if request.config.training.drift_every == 0:
        return None
    return DriftGuard(engine, request.config.model, grid, stage=plan.zero_stage)


def _retainer(request: Request, grid: Grid) -> Callable[[], threading.Thread | None]:
    def retain() -> threading.Thread | None:
        if grid.rank != 0:
            return None
        return checkpoint.retain(request.root, request.config.checkpoint)

    return retain
