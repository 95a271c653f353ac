"""What a launcher asks for, and everything that can be known of it without the other ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megalite.config import RunConfig
from megalite.data import Dataset, ExampleSet, Samples, open_data, set_corruption
from megalite.env import Launch
from megalite.errors import CommandError, DataError, UserError
from megalite.evaluate.samples import Ask, Prompts, open_prompts
from megalite.formats import checkpoint as disk
from megalite.formats.examples import read_manifest
from megalite.parallel import Grid
from megalite.plan import Plan, deepspeed_dict, make_plan
from megalite.train.changes import ALLOWABLE, flat
from megalite.train.checks import hardware_faults
from megalite.train.loop import Inspect
from megalite.train.resume import check_request


@dataclass(frozen=True)
class Request:
    """What a launcher was asked for.

    resume: "auto", "never", or a step or run folder. init_from: a checkpoint whose weights a fresh
    run starts from; init_name: its name as the user gave it. engine: "reference" is the plain
    oracle, one rank in fp32. inspect: looks at each step's gradients before they are used. prepare:
    makes the examples of fine-tuning, in the folder that it returns; examples: that folder, once it
    is known. ask: makes a user's turn of a prompt that conversations are sampled with.
    precision_reason: why the run trains in its precision, once the ranks have agreed on "auto".
    total_samples: samples to train on in all, if the epochs of fine-tuning decide it; None leaves
    the length to training.steps.
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
    total_samples: int | None = None

    @property
    def folder(self) -> Path:
        return Path(self.config.logging.directory) / self.config.name

    @property
    def named_precision(self) -> str:
        """The precision with its reason, for people."""
        precision, reason = self.config.training.precision, self.precision_reason
        return f"{precision} ({reason})" if reason else precision

    @property
    def root(self) -> Path:
        return self.folder / "checkpoints"


def check_command(request: Request) -> None:
    """Refuse arguments that name nothing."""
    unknown = [key for key in request.allow_change if key not in ALLOWABLE]
    if unknown:
        raise CommandError(
            f"--allow-change {unknown[0]}: give one of {', '.join(ALLOWABLE)}; everything else may "
            "change without it"
        )
    check_request(request.root, request.resume)
    if request.resume != "never" and disk.published(request.root):
        return  # of no use any more
    if (source := request.init_from) is not None and not (source and Path(source).is_dir()):
        raise CommandError(f"--init-from {source!r}: no such folder")


def check(request: Request, launch: Launch) -> tuple[Plan, Samples, Dataset | None, Prompts | None]:
    """Everything that can be known without the other ranks; all faults at once."""
    check_command(request)
    config = request.config
    plan = plan_of(request, launch)
    faults = hardware_faults(config, plan, launch, device_kind())
    train: Samples
    valid: Dataset | None
    try:
        if request.examples is not None:
            train, valid = _open_examples(config, request.examples), None
        else:
            train, valid = open_shards(config)
        prompts = _prompts(request, train)
    except UserError as error:
        raise type(error)("\n".join([*faults, str(error)])) from None
    if faults:
        raise UserError("\n".join(faults))
    return plan, train, valid, prompts


def plan_of(request: Request, launch: Launch) -> Plan:
    """The plan of a request on the ranks that were started.

    Raises:
        ConfigError: as `make_plan`.
    """
    return make_plan(request.config, world_size=launch.world_size, device=device_kind())


def device_kind() -> Literal["cpu", "cuda"]:
    """What the ranks of this machine compute on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _prompts(request: Request, train: Samples) -> Prompts | None:
    return open_prompts(request.config, train.tokenizer_folder, request.ask)


def open_shards(config: RunConfig) -> tuple[Dataset, Dataset | None]:
    """What a run file of pretraining trains on, and is validated on.

    Raises:
        DataError: everything that is wrong with it.
    """
    train, valid = open_data(config.data, vocab_size=config.model.vocab_size)
    for dataset in filter(None, (train, valid)):
        set_corruption(dataset, config)
    if config.training.global_batch_size > train.num_samples:
        raise DataError(
            f"training.global_batch_size {config.training.global_batch_size}, but data.train "
            f"holds {train.num_samples} samples in all; lower it, or give more data"
        )
    return train, valid


def _open_examples(config: RunConfig, folder: Path) -> ExampleSet:
    train = ExampleSet(folder, read_manifest(folder), "train", config)
    size = config.training.global_batch_size
    if size > train.num_samples:
        raise DataError(
            f"training.global_batch_size {size}, but the training split holds {train.num_samples} "
            "samples in all; lower it, or give more data"
        )
    return train


@dataclass(frozen=True)
class Settings:
    """DeepSpeed's JSON for this run, and what the installed DeepSpeed assumes by itself."""

    full: dict[str, Any]
    defaults: dict[str, Any]

    @property
    def left_to_it(self) -> dict[str, Any]:
        """The defaults that hold in this run, by dotted key."""
        ours = flat(self.full)
        return {key: value for key, value in flat(self.defaults).items() if ours.get(key) == value}


def settings_of(request: Request, plan: Plan, grid: Grid) -> Settings:
    if request.engine == "reference":
        return Settings({}, {})
    from megalite.engine.deepspeed import settings as deepspeed_settings  # imports DeepSpeed

    full = deepspeed_settings.fill_defaults(deepspeed_dict(request.config, plan), grid)
    return Settings(full, deepspeed_settings.defaults(grid))
