"""Steps that the commands and the library (megalite/api.py) share.

Everything that needs no torch is checked before torch is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalite.config import ConfigSource, find_run, load_config, source_name, stated_model
from megalite.config.tasks import find_task
from megalite.errors import CommandError, ConfigError

if TYPE_CHECKING:
    from megalite.evaluate import Answerer, LoadedModel, Sampling
    from megalite.parallel import Grid
    from megalite.train import RunOptions


def pretraining_options(
    source: ConfigSource,
    sets: Sequence[str] = (),
    *,
    resume: str = "auto",
    init_from: str | None = None,
    allow_change: Sequence[str] = (),
) -> RunOptions:
    """Return the options of a pretraining run.

    Args:
        sets: overrides of keys, in the form `a.b=c`.
        resume, init_from, allow_change: see `RunOptions`.
    Raises:
        ConfigError: the run file has faults, or a finetune section.
        CommandError: `init_from` names no model.
    """
    config = load_config(source, sets)
    if config.finetune is not None:
        raise ConfigError(
            f"{source_name(source)}: it has a finetune section; start megalite finetune with it"
        )
    from megalite.formats.start import find_start

    root = Path(config.logging.directory) / config.name / "checkpoints"
    start = find_start(init_from, None if resume == "never" else root)
    from megalite.train import RunOptions  # torch: after everything that needs no torch

    return RunOptions(
        config,
        resume=resume,
        init_from=start,
        init_name=init_from,
        allow_change=tuple(allow_change),
    )


def finetuning_options(
    source: ConfigSource,
    sets: Sequence[str] = (),
    *,
    resume: str = "auto",
    init_from: str | None = None,
    allow_change: Sequence[str] = (),
) -> RunOptions:
    """Return the options of a fine-tuning run.

    If the run file has no model section, the run's checkpoints define the model. If there are none,
    `init_from` does.

    Args:
        sets: overrides of keys, in the form `a.b=c`.
        resume, init_from, allow_change: see `RunOptions`.
    Raises:
        ConfigError: the run file has faults, or no finetune section.
        CommandError: `init_from` names no model, or a model that the task cannot use.
    """
    from megalite.formats.start import find_start
    from megalite.hub import find_model

    run = find_run(source, sets) if resume != "never" else None
    start = find_start(init_from, None if run is None else run / "checkpoints")
    from megalite.checkpoint import describe_run, describe_start, require_head  # torch

    description = None if run is None else describe_run(run, stated_model(source, sets))
    fresh = description is None and start is not None
    if fresh:
        start = str(find_model(str(start), "--init-from"))
        description = describe_start(Path(start))
    model, tokenizer = description or (None, None)
    config = load_config(source, sets, model=model)
    if config.finetune is None:
        raise ConfigError(
            f"{source_name(source)}: no finetune section; write one (configs/finetune has "
            "examples), or start megalite pretrain"
        )
    if fresh and not find_task(config.finetune.task).has_labels:
        require_head(Path(str(start)))  # before the examples are prepared
    from data_prep.chat import ask
    from data_prep.examples import prepare
    from megalite.train import RunOptions

    return RunOptions(
        config,
        resume=resume,
        init_from=start,
        init_name=init_from,
        allow_change=tuple(allow_change),
        prepare=partial(prepare, tokenizer=tokenizer),
        ask=ask,
    )


def make_answerer(
    loaded: LoadedModel, *, max_new_tokens: int, sampling: Sampling, stop: Sequence[str] = ()
) -> Answerer:
    """Return an `Answerer` for a chat model, with the chat template of the model's folder.

    Args:
        stop: strings that end an answer, in addition to the template's end of a turn.
    """
    from data_prep.chat import Chat, find_template
    from megalite.evaluate import Answerer

    chat = Chat(find_template(None, None, loaded.tokenizer_folder), loaded.tokenizer)
    return Answerer(
        loaded.decoder(),
        loaded.tokenizer,
        chat.ask,
        window=loaded.config.max_position_embeddings,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop,
    )


def measure(
    loaded: LoadedModel,
    grid: Grid,
    *,
    data: str | None,
    micro_batch_size: int | None = None,
    predictions: Path | None = None,
) -> dict[str, Any]:
    """Evaluate a model on shards, or a fine-tuned model on labelled rows. All ranks must call it.

    Args:
        data: a folder of shards, or a file of rows. None means the held-out data of the run.
        micro_batch_size: samples per batch. None means the run's micro-batch size.
        predictions: file that rank 0 writes the predictions of a classifier to.
    Returns:
        see `score_data` and `score_examples`.
    Raises:
        CommandError, DataError: the model cannot be evaluated on the data.
    """
    from megalite.evaluate import score_data

    run = loaded.run
    size = micro_batch_size or loaded.micro_batch_size
    if predictions is not None and not loaded.config.num_labels:
        raise CommandError("--predictions needs a classifier, and this model is none; remove it")
    if run is None or run.finetune is None:
        return dict(score_data(loaded, grid, data=data, micro_batch_size=size))
    from data_prep.eval_examples import prepare_again
    from megalite.evaluate.tasks.classification import score_examples

    folder, split = prepare_again(
        run,
        loaded.folder / "tokenizer",
        data,
        grid.rank == 0,
        grid.all_gather_objects,
        predictions=predictions,
    )
    return score_examples(
        loaded,
        folder,
        split,
        grid,
        micro_batch_size=size,
        own_rows=data is None,
        predictions=predictions,
    )
