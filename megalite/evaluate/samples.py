"""Texts that a model writes in the midst of its training.

Rank 0 chooses the tokens and says which texts are read next; all ranks read them, since they share
layers (tensor parallelism) or weights (ZeRO-3). Each token costs a forward pass over the texts so
far, in an engine without a cache.

B prompts   T tokens of the longest text, rounded up   V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.config import RunConfig
from megalite.config.tasks import find_task
from megalite.data import Batch
from megalite.engine import Engine
from megalite.errors import DataError, MegaLiteError, Stopped
from megalite.evaluate.generate import Sampling, stream_texts
from megalite.log import logger
from megalite.parallel import Grid
from megalite.tokenizers.tokenizer import Tokenizer, load_tokenizer

# from a user's single turn to the ids up to the answer, and the text that ends the answer
Ask = Callable[[Path, Tokenizer, str], "tuple[list[int], str]"]


_Texts = tuple[list[list[int]], "list[list[int]] | None"]  # ids of those that are read, and written


@dataclass(frozen=True)
class Prompts:
    """The prompts that a model continues during training.

    texts: the prompts as it reads them, ids for a chat. turns: whether they are those of a chat,
    whose stop strings name control tokens. stop: strings that end what it writes.
    """

    tokenizer: Tokenizer
    shown: Sequence[str]
    texts: Sequence[str | Sequence[int]]
    turns: bool = False
    stop: Sequence[str] = ()


def open_prompts(config: RunConfig, folder: Path | None, ask: Ask | None) -> Prompts | None:
    """Return the prompts of a run file; None if it has none.

    Args:
        folder: the folder of the data's tokenizer.
        ask: function that makes a user's turn of a prompt, if conversations are learned.
    Raises:
        DataError: no tokenizer, or a chat template that refuses a single turn of a user.
    """
    if config.logging.samples is None:
        return None
    texts = config.logging.samples.prompts
    if folder is None:
        raise DataError(
            "logging.samples: the shards do not name their tokenizer, which prompts are read with; "
            "put it next to them as tokenizer/, or leave logging.samples out"
        )
    tokenizer = load_tokenizer(folder)
    chats = config.finetune is not None and find_task(config.finetune.task).uses_template
    if ask is None or not chats:
        return Prompts(tokenizer, texts, texts)
    turns = [ask(folder, tokenizer, prompt) for prompt in texts]
    ends = {end for _, end in turns if end}
    return Prompts(tokenizer, texts, [text for text, _ in turns], True, list(ends))


class Writer:
    """Writes on from a run's prompts; on rank 0 it is the reader that `stream_texts` asks.

    Numbers of the training stay what they are: what is drawn comes from generators of its own, and
    nothing is compiled again for other shapes.
    """

    def __init__(self, config: RunConfig, engine: Engine, grid: Grid, prompts: Prompts) -> None:
        assert config.logging.samples is not None
        self._config = config
        self._samples = config.logging.samples
        self._engine = engine
        self._grid = grid
        self._prompts = prompts
        self.continues = config.model.architecture == "decoder"
        finetune = config.finetune
        eos = prompts.tokenizer.eos_id
        tuned = [] if finetune is None or eos is None else [eos]  # as its examples end
        self.suffix_ids: Sequence[int] = prompts.tokenizer.suffix_ids or tuned
        self._failed = False
        self._in_pass = False
        # padded rows of the vocabulary are never chosen; an encoder_decoder's last ids name spans
        self._chosen = slice(prompts.tokenizer.vocab_size if self.continues else None)
        self._round = config.parallel.tensor if config.parallel.sequence else 1

    def __call__(self, stopping: Callable[[], bool]) -> list[tuple[str, str]]:
        """Return each prompt with the text that follows it, on rank 0; a collective.

        The list is empty if it was given up, or if the model's scores are not finite.

        Args:
            stopping: called before each token; returns whether to give up, the same on every
                rank.
        Raises:
            Exception: a forward pass failed, and other ranks take part in it.
        """
        self._stopping = stopping
        try:
            if self._grid.rank == 0:
                found = self._write()
                self._broadcast(None)
                return found
            while (texts := self._broadcast(None)) is not None:
                self._read(*texts)
        except Stopped:  # every rank is here
            pass
        return []

    def _write(self) -> list[tuple[str, str]]:
        asked = self._prompts
        samples = self._samples
        written = [""] * len(asked.shown)
        try:
            pieces = stream_texts(
                self,
                asked.tokenizer,
                asked.texts,
                max_new_tokens=samples.max_new_tokens,
                sampling=Sampling(samples.temperature, seed=self._config.training.seed),
                stop=asked.stop,
                controls=asked.turns,
            )
            for number, piece in pieces:
                written[number] += piece
        except Stopped:
            raise
        except Exception as error:  # whatever it is, it must not end the training
            if self._in_pass:  # the other ranks are in this pass, or have failed in it
                raise
            if not self._failed or isinstance(error, MegaLiteError):
                kind = "" if isinstance(error, MegaLiteError) else f"{type(error).__name__}: "
                logger.warning("no samples: %s%s", kind, error)
            self._failed = True
            return []
        return list(zip(asked.shown, written, strict=True))

    def begin(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Tensor:
        del new_tokens
        given = [list(prompt) for prompt in prompts]
        start = self._config.model.decoder_start_token_id
        # what is read, and what is written after it, or apart from it
        self._texts = (given, None) if self.continues else (given, [[start] for _ in given])
        return self._read_together()

    def next(self, tokens: Sequence[int]) -> Tensor:
        given, written = self._texts
        for text, token in zip(written or given, tokens, strict=True):
            text.append(token)
        return self._read_together()

    def _read_together(self) -> Tensor:
        """Return the scores of the next token, [B, V], on rank 0; the other ranks read as well."""
        self._in_pass = self._grid.world_size > 1
        scores = self._read(*self._broadcast(self._texts))
        self._in_pass = False
        return scores[:, self._chosen]

    def _broadcast(self, texts: _Texts | None) -> Any:
        """Broadcast rank 0's texts to every rank. None means that nothing more is read."""
        message = [texts]
        dist.broadcast_object_list(message, src=0, group=self._grid.cpu_group)
        return message[0]

    @torch.inference_mode(False)  # the weights that ZeRO-3 gathers are trained with afterwards
    def _read(self, given: list[list[int]], written: list[list[int]] | None) -> Tensor:
        if self._stopping():
            raise Stopped("asked to, in the midst of a sample")
        ids_BT, lengths_B = self._pad_batch(given)
        tensors = {"input_ids": ids_BT, "lengths": lengths_B}
        if written is not None:
            tensors["attention_mask"] = torch.arange(ids_BT.shape[1]) < lengths_B[:, None]
            tensors["decoder_input_ids"], tensors["lengths"] = self._pad_batch(written)
        compiled = self._config.training.compile
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            return self._engine.eval_scores(Batch(tensors, place=0, targets=0))

    def _pad_batch(self, texts: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Return the last tokens of texts, as many as a training sample has, followed by zeros."""
        texts = [text[-self._config.data.sequence_length :] for text in texts]
        lengths_B = torch.tensor([len(text) for text in texts])
        T = -(-int(lengths_B.max()) // self._round) * self._round
        ids_BT = torch.zeros(len(texts), T, dtype=torch.int64)
        for row_T, text in zip(ids_BT, texts, strict=True):
            row_T[: len(text)] = torch.tensor(text)
        return ids_BT, lengths_B

    @cached_property
    def end_ids(self) -> Sequence[int]:
        """Ids that end a text by the model that the run started from.

        The run's folder keeps them with its copy of the tokenizer; the data's tokenizer may lack
        them.
        """
        tokenizer = self._prompts.tokenizer
        try:
            kept = load_tokenizer(
                Path(self._config.logging.directory) / self._config.name / "tokenizer"
            )
        except DataError:
            return ()
        return kept.end_ids if kept.sha256 == tokenizer.sha256 else ()
