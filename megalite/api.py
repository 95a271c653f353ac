"""The library: what `import megalite` offers. docs/api.md is made from these docstrings.

Functions import what they need when they are called: a run file is checked before torch is
imported.
"""

from __future__ import annotations

import json
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from megalite import env, log
from megalite.config import ConfigSource
from megalite.errors import CommandError, Stopped
from megalite.workflows import finetuning_options, make_answerer, measure, pretraining_options

if TYPE_CHECKING:
    from torch import Tensor

    from megalite.evaluate import LoadedModel, Sampling
    from megalite.formats.shards import ShardSet
    from megalite.train import RunOptions
    from megalite.train.hooks import Hook

Overrides: TypeAlias = "Sequence[str] | Mapping[str, Any]"
# Turns of a conversation, each with "role" and "content".
Messages: TypeAlias = "Sequence[Mapping[str, Any]]"


@dataclass(frozen=True)
class RunResult:
    """A run that has ended.

    Attributes:
        directory: the run folder.
        state: "done", or "stopped" if a signal or a hook ended the run before its last step. The
            same call continues a stopped run.
        checkpoint: the folder of the newest checkpoint. None if the run has published none.
    """

    directory: Path
    state: Literal["done", "stopped"]
    checkpoint: Path | None

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl`, in order. `kind` is train, valid, sample or event.

        A train row has `step`, `loss` (mean nats a target), `lr`, `grad_norm` (before clipping),
        `tokens` (total), `tokens_per_second`, `step_seconds`, `peak_memory_bytes` and more.
        """
        from megalite.files import read_rows

        return read_rows(self.directory / "metrics.jsonl")


def pretrain(
    config: ConfigSource, *, overrides: Overrides = (), hooks: Sequence[Hook] = ()
) -> RunResult:
    """Pretrain a model, as `megalite pretrain` does, and return when the run has ended.

    A run whose folder has checkpoints continues from the newest one. Interrupting the kernel, or
    Ctrl-C, saves and stops the run. A run in a thread gets no signals; a hook can stop it. A
    process trains one run at a time, and several runs give the numbers of fresh processes.

    Args:
        config: a dictionary, the path of a run file, or a `RunConfig`. Paths in it are relative to
            the working directory.
        overrides: changes of keys, as `--set` takes them (`["training.steps=10"]`), or a mapping
            of dotted keys to values (`{"training.steps": 10}`).
        hooks: objects that are called around steps and saves, after the run's own hooks.
    Raises:
        UserError: the configuration or the data cannot be used. Nothing was written.
        MegaLiteError: a later failure; the run's status.json states the reason.
    """
    return _run(lambda: pretraining_options(config, _sets(overrides)), hooks)


def finetune(
    config: ConfigSource,
    *,
    init_from: str | Path | None = None,
    overrides: Overrides = (),
    hooks: Sequence[Hook] = (),
) -> RunResult:
    """Fine-tune a model, as `megalite finetune` does, and return when the run has ended.

    See `pretrain` for runs that continue, signals and threads.

    Args:
        config: as for `pretrain`, with a finetune section. A model section may be missing if there
            is `init_from`.
        init_from: the model to start from, by a path or by a name of the hub; see `load`.
        overrides: changes of keys; see `pretrain`.
        hooks: objects that are called around steps and saves; see `pretrain`.
    Raises:
        UserError: the configuration, the model or the data cannot be used. Nothing was written.
        MegaLiteError: a later failure; the run's status.json states the reason.
    """
    start = None if init_from is None else str(init_from)
    return _run(lambda: finetuning_options(config, _sets(overrides), init_from=start), hooks)


def load(path: str | Path) -> Model:
    """Load a trained model with its tokenizer, in fp32, on the GPU if this host has one.

    Args:
        path: a step folder, a run folder, a model folder of Hugging Face's, or a model of the hub
            (ORG/NAME, ORG/NAME@REVISION). A run folder stands for its newest checkpoint, or for
            the best one of a fine-tuned run.
    Raises:
        CommandError: no such model.
        CheckpointError: a damaged checkpoint.
    """
    with log.show_messages(env.find_launch().rank):
        from megalite.hub import find_model

        folder = find_model(path, "path")  # before torch is imported
        from megalite.evaluate import open_model

        return Model(open_model(folder))


def make_plan(
    config: ConfigSource,
    *,
    nodes: int = 1,
    gpus_per_node: int = 8,
    gpu: str | Path = "h100-80gb",
    overrides: Overrides = (),
) -> dict[str, Any]:
    """Predict memory, time and traffic of a run, without a GPU and without torch.

    Args:
        config: a dictionary, the path of a run file, or a `RunConfig`.
        nodes: hosts.
        gpus_per_node: GPUs of each host.
        gpu: the name of a device of `megalite plan --gpu`, or the path of a device file.
        overrides: changes of keys; see `pretrain`.
    Returns:
        the object that `megalite plan --json` prints: `fits`, `memory_bytes` (a rank's, by
        kind), `step_seconds`, `tokens_per_second`, `mfu` (0 to 1), `run_seconds` and more.
    Raises:
        ConfigError: faults of the configuration, or a layout that is impossible on these devices.
        CommandError: an unknown device.
    """
    from megalite.plan.command import make_cluster, planned_config
    from megalite.plan.forecast import forecast

    with log.show_messages(rank=0):
        cluster = make_cluster(str(gpu), nodes, gpus_per_node)
        planned = planned_config(config, _sets(overrides))
        plan: dict[str, Any] = log.replace_nonfinite(
            forecast(planned, cluster).as_json(planned.training.steps)
        )
        return plan


def open_shards(path: str | Path) -> Shards:
    """Open a folder of shards that `python -m data_prep tokenize` or Megatron has made.

    Args:
        path: the folder, or the prefix of one pair of Megatron's files.
    Raises:
        DataError: no shards, or damaged ones.
    """
    from megalite.formats import shards

    with log.show_messages(rank=0):
        return Shards(shards.open_shards(path))


class Shards:
    """Documents of a shard folder: `len` of them, each an int64 tensor [T] of token ids.

    Made by `open_shards`. Tokens are read when a document is.

    Attributes:
        tokens: tokens of all documents.
        vocab_size: number of the tokenizer's ids.
    """

    def __init__(self, shards: ShardSet) -> None:
        self._shards = shards
        self.tokens = shards.tokens
        self.vocab_size = shards.vocab_size

    def __len__(self) -> int:
        """Return the number of documents."""
        return self._shards.documents

    def __getitem__(self, index: int) -> Tensor:
        """Return the token ids of a document: int64 [T]. A negative index counts from the end.

        Raises:
            IndexError: there is no such document.
            DataError: the shard is damaged.
        """
        import torch

        number = operator.index(index)
        number += len(self) if number < 0 else 0
        if not 0 <= number < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        return torch.from_numpy(self._shards.document(number).astype("int64"))


class Model:
    """A trained model with its tokenizer. Made by `load`.

    Attributes:
        directory: the folder of the model.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self.directory = loaded.folder

    def generate(
        self,
        prompt: str | Messages,
        max_new_tokens: int = 100,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> str:
        """Return the text that follows a prompt, or the answer to a conversation.

        The text ends with the document, or after `max_new_tokens`.

        Args:
            prompt: a text to continue, or the turns of a conversation. A turn has `role` and
                `content`. The chat template of the model renders the turns.
            max_new_tokens: most tokens to write.
            temperature: divisor of the scores before sampling. 0 takes the most likely token.
            top_k: number of tokens to sample among, the most likely ones. None means all.
            top_p: probability, in sum, of the fewest tokens to sample among. None means all.
            seed: seed of the sampling. The same seed gives the same text.
        Raises:
            CommandError: the model writes no text, or a number is out of range.
            DataError: the chat template refuses the turns.
        """
        from megalite.evaluate import Sampling, stream_texts

        sampling = Sampling(temperature, top_k, top_p, seed)
        loaded = self._loaded
        with log.show_messages(rank=0):
            if not isinstance(prompt, str):
                return self._answer(prompt, max_new_tokens, sampling)
            loaded.check_prompt(prompt)
            pieces = stream_texts(
                loaded.decoder(),
                loaded.tokenizer,
                [prompt],
                max_new_tokens=max_new_tokens,
                sampling=sampling,
            )
            return "".join(piece for _, piece in pieces)

    def _answer(self, messages: Messages, max_new_tokens: int, sampling: Sampling) -> str:
        from data_prep.conversations import Conversation

        answerer = make_answerer(self._loaded, max_new_tokens=max_new_tokens, sampling=sampling)
        question = Conversation([dict(message) for message in messages])
        return "".join(piece for _, piece in answerer.answers([question]))

    def loss(self, text: str) -> float:
        """Return the mean cross entropy of a text, in nats a target, as Hugging Face's `loss`.

        The targets are all tokens but the first.

        Raises:
            CommandError: the model is no decoder; or the text has under two tokens, or more tokens
                than the model reads at once.
        """
        import torch

        from megalite.data import Batch

        loaded = self._loaded
        if loaded.config.architecture != "decoder" or loaded.config.num_labels:
            raise CommandError(
                f"{loaded.folder} holds no decoder, and only a decoder has the loss of a text; "
                "measure the model with evaluate"
            )
        ids = torch.tensor([loaded.encode(text)])
        targets = ids.shape[1] - 1
        window = loaded.config.max_position_embeddings
        if not 0 < targets < window + 1:
            raise CommandError(
                f"the text has {targets + 1} tokens; give 2 to {window + 1}, which are the model's "
                "window and one target"
            )
        tensors = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
        mask = torch.ones(1, targets, dtype=torch.bool)
        batch = Batch(tensors | {"loss_mask": mask}, place=0, targets=targets)
        return float(loaded.loss(batch)) / targets

    def evaluate(self, data: str | Path | None = None) -> dict[str, Any]:
        """Measure the model, as `megalite eval` does.

        Args:
            data: a folder of shards; or, for a fine-tuned model, a file of labelled rows. None
                means the held-out data of the model's run.
        Returns:
            `loss` (mean nats a target), `perplexity`, `bits_per_byte` of text (None if the targets
            are not continued text) and `tokens`; for a classifier `accuracy`, `f1` and others.
        Raises:
            CommandError, DataError: the model cannot be measured on the data.
        """
        from megalite.isolation import isolated
        from megalite.parallel import start, stop

        launch = env.find_launch()
        with log.show_messages(launch.rank), isolated():
            grid = start(launch)
            try:
                return measure(self._loaded, grid, data=None if data is None else str(data))
            finally:
                stop()


def _sets(overrides: Overrides) -> list[str]:
    """Return overrides as `--set` takes them."""
    if isinstance(overrides, Mapping):
        return [f"{key}={json.dumps(value, default=str)}" for key, value in overrides.items()]
    return [overrides] if isinstance(overrides, str) else list(overrides)


def _check_hook(hook: object, kind: type) -> None:
    if not isinstance(hook, kind):
        raise CommandError(f"hooks: {hook!r} is no megalite.Hook; give objects of one")


def _run(make_options: Callable[[], RunOptions], hooks: Sequence[Hook]) -> RunResult:
    """Train by the options that a function makes, after it has checked the configuration."""
    began = time.monotonic()
    launch = env.find_launch()
    with log.show_messages(launch.rank):
        options = make_options()
        from dataclasses import replace

        from megalite.formats.checkpoint import published
        from megalite.isolation import isolated
        from megalite.train import run
        from megalite.train.hooks import Hook

        for hook in hooks:
            _check_hook(hook, Hook)
        state: Literal["done", "stopped"] = "done"
        with isolated():
            try:
                run(replace(options, hooks=tuple(hooks), began=began), launch)
            except Stopped as error:
                log.logger.info("%s", error)
                state = "stopped"
        newest = next(iter(published(options.root)), None)
        return RunResult(options.folder, state, newest)
