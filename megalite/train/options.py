"""Options of a run, and all checks that need no other rank."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megalite.config import RunConfig
from megalite.config.names import load_plugins
from megalite.data import Dataset, ExampleSet, Samples, open_data, set_corruption
from megalite.env import Launch
from megalite.errors import CommandError, DataError, UserError
from megalite.evaluate.samples import Ask, Prompts, open_prompts
from megalite.formats import checkpoint as disk
from megalite.formats.examples import read_examples_manifest
from megalite.parallel import Grid, start
from megalite.plan import Plan, deepspeed_dict, make_plan
from megalite.train.changes import ALLOWABLE, flat
from megalite.train.checks import hardware_faults
from megalite.train.hooks import Hook
from megalite.train.loop import Inspect
from megalite.train.resume import check_resume


@dataclass(frozen=True)
class RunOptions:
    """Options of a run, as a launcher passes them.

    Attributes:
        resume: "auto", "never", or a step or run folder.
        init_from: checkpoint whose weights a fresh run starts from.
        init_name: name of that checkpoint as the user wrote it.
        allow_change: keys that may differ from the checkpoint's.
        engine: "reference" is plain PyTorch on one rank in fp32.
        inspect: called with each step's gradients before the update.
        prepare: makes the examples of fine-tuning and returns their folder.
        examples: the folder of the examples, once it exists.
        ask: turns a prompt into a user's turn, for samples of conversations.
        precision_reason: reason for the precision, once "auto" is resolved.
        hooks: hooks of the caller, called after those of the session.
        began: time of `time.monotonic` at which the start began. None means the start of the
            process.
        total_samples: samples to train on in all, if the epochs of fine-tuning decide it. None
            means that training.steps decides.
    """

    config: RunConfig
    resume: str = "auto"
    init_from: str | None = None
    init_name: str | None = None
    allow_change: tuple[str, ...] = ()
    engine: Literal["deepspeed", "reference"] = "deepspeed"
    inspect: Inspect | None = None
    prepare: Callable[[RunConfig], Path] | None = None
    examples: Path | None = None
    ask: Ask | None = None
    precision_reason: str = ""
    hooks: tuple[Hook, ...] = ()
    began: float | None = None
    total_samples: int | None = None

    @property
    def folder(self) -> Path:
        """Run folder."""
        return Path(self.config.logging.directory) / self.config.name

    @property
    def named_precision(self) -> str:
        """Precision with its reason, for messages."""
        precision = self.config.training.precision
        reason = self.precision_reason
        return f"{precision} ({reason})" if reason else precision

    @property
    def root(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.folder / "checkpoints"


def check_command(options: RunOptions) -> None:
    """Raise CommandError for arguments that name an unknown key or a missing folder."""
    unknown = [key for key in options.allow_change if key not in ALLOWABLE]
    if unknown:
        raise CommandError(
            f"--allow-change {unknown[0]}: give one of {', '.join(ALLOWABLE)}; everything else may "
            "change without it"
        )
    check_resume(options.root, options.resume)
    if options.resume != "never" and disk.published(options.root):
        return  # the run resumes from its own checkpoint
    source = options.init_from
    if source is not None and not (source and Path(source).is_dir()):
        raise CommandError(
            f"--init-from {source!r}: no such folder; give a checkpoint, a run or a model folder"
        )


def check(
    options: RunOptions, launch: Launch
) -> tuple[Plan, Samples, Dataset | None, Prompts | None]:
    """Check everything that needs no other rank.

    Returns:
        plan, training data, held-out shards, and prompts for text samples.
    Raises:
        UserError: with all faults.
    """
    check_command(options)
    config = options.config
    plan = plan_of(options, launch)
    faults = hardware_faults(config, plan, launch, device_kind())
    try:
        load_plugins(config)  # before the claim: a broken package must not end a running start
    except UserError as error:
        faults.append(str(error))
    train: Samples
    valid: Dataset | None
    try:
        if options.examples is not None:
            train = _open_examples(config, options.examples)
            valid = None
        else:
            train, valid = open_shards(config)
        prompts = _prompts(options, train)
    except UserError as error:
        raise type(error)("\n".join([*faults, str(error)])) from None
    if faults:
        raise UserError("\n".join(faults))
    return plan, train, valid, prompts


def plan_of(options: RunOptions, launch: Launch) -> Plan:
    """Return the plan of a run on the ranks that were started.

    Raises:
        ConfigError: see `make_plan`.
    """
    return make_plan(options.config, world_size=launch.world_size, device=device_kind())


def device_kind() -> Literal["cpu", "cuda"]:
    """Return the kind of device that the ranks of this host compute on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _prompts(options: RunOptions, train: Samples) -> Prompts | None:
    return open_prompts(options.config, train.tokenizer_folder, options.ask)


def open_shards(config: RunConfig) -> tuple[Dataset, Dataset | None]:
    """Return the training data and held-out shards of a pretraining run file.

    Raises:
        DataError: with all faults of the data.
    """
    train, valid = open_data(config.data, vocab_size=config.model.vocab_size)
    for dataset in filter(None, (train, valid)):
        set_corruption(dataset, config)
    if config.training.global_batch_size > train.num_samples:
        raise DataError(
            f"training.global_batch_size {config.training.global_batch_size}, but data.train "
            f"has {train.num_samples} samples; lower it, or give more data"
        )
    return train, valid


def _open_examples(config: RunConfig, folder: Path) -> ExampleSet:
    train = ExampleSet(folder, read_examples_manifest(folder), "train", config)
    size = config.training.global_batch_size
    if size > train.num_samples:
        raise DataError(
            f"training.global_batch_size {size}, but the training split has {train.num_samples} "
            "samples; lower it, or give more data"
        )
    return train


def join(options: RunOptions, launch: Launch) -> Grid:
    """Import the engine and connect to the other ranks. See `start`."""
    if options.engine == "deepspeed":
        importlib.import_module("megalite.engine.deepspeed")  # before groups exist
    return start(launch, tensor=options.config.parallel.tensor)


@dataclass(frozen=True)
class Settings:
    """DeepSpeed's complete configuration of this run, and the installed version's defaults."""

    full: dict[str, Any]
    defaults: dict[str, Any]

    @property
    def effective_defaults(self) -> dict[str, Any]:
        """DeepSpeed's defaults that are in effect in this run, by dotted key."""
        full = flat(self.full)
        return {key: value for key, value in flat(self.defaults).items() if full.get(key) == value}


def settings_of(options: RunOptions, plan: Plan, grid: Grid) -> Settings:
    """Return DeepSpeed's settings of a run; empty for the reference engine."""
    if options.engine == "reference":
        return Settings({}, {})
    from megalite.engine.deepspeed import settings as deepspeed_settings  # imports DeepSpeed

    full = deepspeed_settings.fill_defaults(deepspeed_dict(options.config, plan), grid)
    return Settings(full, deepspeed_settings.defaults(grid))
