"""Text samples of a model during training.

Rank 0 chooses the tokens and broadcasts the texts. All ranks take part in each forward, because
they share matrices (tensor parallelism) or weights (ZeRO-3). The engine has no KV cache, so each
token costs a forward over all texts so far.

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

# (tokenizer folder, tokenizer, user's turn) -> (ids of the prompt, text that ends the answer)
Ask = Callable[[Path, Tokenizer, str], "tuple[list[int], str]"]

# ids of the texts; with two stacks, those of the encoder and of the decoder
_Texts = tuple[list[list[int]], "list[list[int]] | None"]


@dataclass(frozen=True)
class Prompts:
    """The prompts that a model continues during training.

    Attributes:
        shown: the prompts as they are reported.
        texts: the prompts for the model; ids if they are turns of a chat.
        turns: whether the prompts are turns of a chat, so that stop strings name control tokens.
        stop: strings that end a text.
    """

    tokenizer: Tokenizer
    shown: Sequence[str]
    texts: Sequence[str | Sequence[int]]
    turns: bool = False
    stop: Sequence[str] = ()


def open_prompts(config: RunConfig, folder: Path | None, ask: Ask | None) -> Prompts | None:
    """Return the prompts of a run file, or None if it has none.

    Args:
        folder: folder of the data's tokenizer.
        ask: turns a prompt into a user's turn, if the run trains on conversations.
    Raises:
        DataError: there is no tokenizer, or the chat template refuses a single user turn.
    """
    if config.logging.samples is None:
        return None
    texts = config.logging.samples.prompts
    if folder is None:
        raise DataError(
            "logging.samples: the shards have no tokenizer to encode the prompts; put it next to "
            "the shards as tokenizer/, or remove logging.samples"
        )
    tokenizer = load_tokenizer(folder)
    chats = config.finetune is not None and find_task(config.finetune.task).uses_template
    if ask is None or not chats:
        return Prompts(tokenizer, texts, texts)
    turns = [ask(folder, tokenizer, prompt) for prompt in texts]
    ends = {end for _, end in turns if end}
    return Prompts(tokenizer, texts, [text for text, _ in turns], True, list(ends))


class Writer:
    """Generator of continuations of a run's prompts. On rank 0 it is the decoder of `stream_texts`.

    It does not change the numbers of the training: it has its own random generators, and causes no
    recompilation for other shapes.
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
        eos_ids = [] if finetune is None or eos is None else [eos]  # as in the examples
        self.suffix_ids: Sequence[int] = prompts.tokenizer.suffix_ids or eos_ids
        self._failed = False
        self._in_pass = False
        # Ids beyond the tokenizer's vocabulary are padding and never chosen. The last ids of an
        # encoder_decoder stand for spans.
        self._chosen = slice(prompts.tokenizer.vocab_size if self.continues else None)
        self._round = config.parallel.tensor if config.parallel.sequence else 1

    def __call__(self, stopping: Callable[[], bool]) -> list[tuple[str, str]]:
        """Return each prompt with its continuation, on rank 0; a collective.

        The list is empty if the generation was given up, or if the model's logits are not finite.

        Args:
            stopping: called before each token. It returns whether to give up, the same on every
                rank.
        Raises:
            Exception: a forward that includes other ranks failed.
        """
        self._stopping = stopping
        try:
            if self._grid.rank == 0:
                samples = self._write()
                self._broadcast(None)
                return samples
            while (texts := self._broadcast(None)) is not None:
                self._read(*texts)
        except Stopped:  # raised on every rank
            pass
        return []

    def _write(self) -> list[tuple[str, str]]:
        prompts = self._prompts
        samples = self._samples
        texts = [""] * len(prompts.shown)
        try:
            pieces = stream_texts(
                self,
                prompts.tokenizer,
                prompts.texts,
                max_new_tokens=samples.max_new_tokens,
                sampling=Sampling(samples.temperature, seed=self._config.training.seed),
                stop=prompts.stop,
                controls=prompts.turns,
            )
            for number, piece in pieces:
                texts[number] += piece
        except Stopped:
            raise
        except Exception as error:  # no failure of a sample may end the training
            if self._in_pass:  # but other ranks take part in this forward
                raise
            if not self._failed or isinstance(error, MegaLiteError):
                kind = "" if isinstance(error, MegaLiteError) else f"{type(error).__name__}: "
                logger.warning("no samples: %s%s", kind, error)
            self._failed = True
            return []
        return list(zip(prompts.shown, texts, strict=True))

    def begin(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Tensor:
        del new_tokens
        sources = [list(prompt) for prompt in prompts]
        start = self._config.model.decoder_start_token_id
        self._texts = (sources, None) if self.continues else (sources, [[start] for _ in sources])
        return self._read_together()

    def next(self, tokens: Sequence[int]) -> Tensor:
        sources, targets = self._texts
        for text, token in zip(targets or sources, tokens, strict=True):
            text.append(token)
        return self._read_together()

    def _read_together(self) -> Tensor:
        """Return the logits of the next token on rank 0, [B, V]. Other ranks call `_read`."""
        self._in_pass = self._grid.world_size > 1
        scores = self._read(*self._broadcast(self._texts))
        self._in_pass = False
        return scores[:, self._chosen]

    def _broadcast(self, texts: _Texts | None) -> Any:
        """Broadcast rank 0's texts to every rank. None ends the generation."""
        message = [texts]
        dist.broadcast_object_list(message, src=0, group=self._grid.cpu_group)
        return message[0]

    @torch.inference_mode(False)  # training uses the weights that ZeRO-3 gathers here
    def _read(self, sources: list[list[int]], targets: list[list[int]] | None) -> Tensor:
        if self._stopping():
            raise Stopped("a stop was requested during a sample")
        ids_BT, lengths_B = self._pad_batch(sources)
        tensors = {"input_ids": ids_BT, "lengths": lengths_B}
        if targets is not None:
            tensors["attention_mask"] = torch.arange(ids_BT.shape[1]) < lengths_B[:, None]
            tensors["decoder_input_ids"], tensors["lengths"] = self._pad_batch(targets)
        compiled = self._config.training.compile
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            return self._engine.eval_scores(Batch(tensors, place=0, targets=0))

    def _pad_batch(self, texts: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Return the last `data.sequence_length` tokens of each text, padded with zeros."""
        texts = [text[-self._config.data.sequence_length :] for text in texts]
        lengths_B = torch.tensor([len(text) for text in texts])
        T = -(-int(lengths_B.max()) // self._round) * self._round
        ids_BT = torch.zeros(len(texts), T, dtype=torch.int64)
        for row_T, text in zip(ids_BT, texts, strict=True):
            row_T[: len(text)] = torch.tensor(text)
        return ids_BT, lengths_B

    @cached_property
    def end_ids(self) -> Sequence[int]:
        """Ids that end a text, according to the model that the run started from.

        The run folder's copy of the tokenizer has them. The data's tokenizer may lack them.
        """
        tokenizer = self._prompts.tokenizer
        try:
            copy = load_tokenizer(
                Path(self._config.logging.directory) / self._config.name / "tokenizer"
            )
        except DataError:
            return ()
        return copy.end_ids if copy.sha256 == tokenizer.sha256 else ()
