"""Steps that the commands of launcher/ and the library (megalite/api.py) share.

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
        sets: overrides of keys, each `a.b=c`.
        resume, init_from, allow_change: see `RunOptions`.
    Raises:
        ConfigError: faults of the run file, or a run file that fine-tunes.
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

    Without a model section in the run file, the model is that of the run's checkpoints, or that of
    `init_from`.

    Args:
        sets: overrides of keys, each `a.b=c`.
        resume, init_from, allow_change: see `RunOptions`.
    Raises:
        ConfigError: faults of the run file, or a run file without a finetune section.
        CommandError: `init_from` names no model, or one that the task cannot use.
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
        require_head(Path(str(start)))  # before the examples are made
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
    """Return what answers conversations with a chat model, by the template of its folder.

    Args:
        stop: strings that end an answer, besides the template's own end of a turn.
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
    """Measure a model on shards, or a fine-tuned one on labelled rows; a collective.

    Args:
        data: a folder of shards, or a file of rows. None means the run's own held-out data.
        micro_batch_size: samples of a batch. None means those of the run.
        predictions: where rank 0 writes a classifier's answers.
    Returns:
        see `score_data` and `score_examples`.
    Raises:
        CommandError, DataError: data that the model cannot be measured on.
    """
    from megalite.evaluate import score_data

    run = loaded.run
    size = micro_batch_size or loaded.micro_batch_size
    if predictions is not None and not loaded.config.num_labels:
        raise CommandError("--predictions are a classifier's, and this model is none: remove it")
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
