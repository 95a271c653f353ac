"""Public interface of `import megalite`. docs/api.md is generated from these docstrings.

Functions import other modules when they are called, so that a run file is checked before torch is
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
    """Result of a run that has ended.

    Attributes:
        directory: the run folder.
        state: "done", or "stopped" if a signal or a hook ended the run before its last step. The
            same call continues a stopped run.
        checkpoint: the folder of the newest checkpoint. None means that the run has no checkpoint.
    """

    directory: Path
    state: Literal["done", "stopped"]
    checkpoint: Path | None

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl`, in order. `kind` is train, valid, sample or event.

        A train row has `step`, `loss` (mean nats per target), `lr`, `grad_norm` (before clipping),
        `tokens` (total), `tokens_per_second`, `step_seconds`, `peak_memory_bytes` and more.
        """
        from megalite.files import read_rows

        return read_rows(self.directory / "metrics.jsonl")


def pretrain(
    config: ConfigSource, *, overrides: Overrides = (), hooks: Sequence[Hook] = ()
) -> RunResult:
    """Pretrain a model, as `megalite pretrain` does, and return when the run has ended.

    A run whose folder has checkpoints continues from the newest checkpoint. Ctrl-C, or interrupting
    the kernel, saves and stops the run. A run in a thread gets no signals, but a hook can stop the
    run. A process trains one run at a time. Consecutive runs give the numbers of fresh processes.

    Args:
        config: a dictionary, the path of a run file, or a `RunConfig`. Paths in it are relative to
            the working directory.
        overrides: changes of keys, in the form of `--set` (`["training.steps=10"]`), or a mapping
            of dotted keys to values (`{"training.steps": 10}`).
        hooks: objects that are called around steps and saves, after the built-in hooks.
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
        config: as for `pretrain`, with a finetune section. The model section is optional if
            `init_from` is given.
        init_from: the path or the hub name of the model to start from; see `load`.
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
        path: a step folder, a run folder, a Hugging Face model folder, or a model of the hub
            (ORG/NAME, ORG/NAME@REVISION). A run folder means its newest checkpoint. The folder of
            a fine-tuned run means its best checkpoint.
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
        gpu: the name of a device (see `megalite plan --gpu`), or the path of a device file.
        overrides: changes of keys; see `pretrain`.
    Returns:
        the object that `megalite plan --json` prints: `fits`, `memory_bytes` (per rank, by
        category), `step_seconds`, `tokens_per_second`, `mfu` (0 to 1), `run_seconds` and more.
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
    """Open a folder of shards that `megalite data tokenize` or Megatron-LM has written.

    Args:
        path: the folder, or the prefix of one pair of Megatron-LM files.
    Raises:
        DataError: there are no shards, or a shard is damaged.
    """
    from megalite.formats import shards

    with log.show_messages(rank=0):
        return Shards(shards.open_shards(path))


class Shards:
    """Sequence of the documents of a shard folder, each an int64 tensor [T] of token ids.

    `open_shards` creates it. A document is read from the disk when it is accessed.

    Attributes:
        tokens: total number of tokens.
        vocab_size: number of token ids of the tokenizer.
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
    """A trained model with its tokenizer. `load` creates it.

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

        The text ends where the model ends the document, or after `max_new_tokens`.

        Args:
            prompt: a text to continue, or the turns of a conversation. A turn has `role` and
                `content`. The chat template of the model renders the turns.
            max_new_tokens: maximum number of tokens to generate.
            temperature: divisor of the logits before sampling. 0 takes the most likely token.
            top_k: number of most likely tokens to sample among. None means all.
            top_p: sample among the fewest tokens whose probabilities sum to this value. None means
                all tokens.
            seed: seed of the sampling. The same seed gives the same text.
        Raises:
            CommandError: the model does not generate text, or a number is out of range.
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
        """Return the mean cross-entropy of a text in nats per target, like Hugging Face's `loss`.

        The targets are all tokens except the first.

        Raises:
            CommandError: the model is no decoder, or the text has fewer than two tokens or more
                tokens than the model reads at once.
        """
        import torch

        from megalite.data import Batch

        loaded = self._loaded
        if loaded.config.architecture != "decoder" or loaded.config.num_labels:
            raise CommandError(
                f"{loaded.folder} is no decoder, and only a decoder has a loss of a text; use "
                "evaluate"
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
        """Evaluate the model, as `megalite eval` does.

        Args:
            data: a folder of shards, or a file of labelled rows if the model is fine-tuned. None
                means the held-out data of the model's run.
        Returns:
            `loss` (mean nats per target), `perplexity`, `bits_per_byte` of text (None if the
            targets are not continued text) and `tokens`. A classifier returns `accuracy`, `f1` and
            other metrics.
        Raises:
            CommandError, DataError: the model cannot be evaluated on the data.
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
    """Return overrides as arguments of `--set`."""
    if isinstance(overrides, Mapping):
        return [f"{key}={json.dumps(value, default=str)}" for key, value in overrides.items()]
    return [overrides] if isinstance(overrides, str) else list(overrides)


def _check_hook(hook: object, kind: type) -> None:
    if not isinstance(hook, kind):
        raise CommandError(f"hooks: {hook!r} is no megalite.Hook; give instances of it")


def _run(make_options: Callable[[], RunOptions], hooks: Sequence[Hook]) -> RunResult:
    """Train a run, and return its result.

    Args:
        make_options: function that checks the configuration and returns the run's options.
    """
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
