"""Conversations with a chat model: answers to complete conversations, and interactive chats."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol, TextIO, TypeAlias

from megalite.errors import DataError
from megalite.evaluate.generate import Decoder, Sampling, stream_texts
from megalite.log import logger
from megalite.tokenizers.tokenizer import Tokenizer

Messages: TypeAlias = "list[dict[str, Any]]"
# (turns so far, tools) -> (ids of the prompt, text that ends the answer)
AskTurns: TypeAlias = "Callable[[Messages, list[Any] | None], tuple[list[int], str]]"

_BATCH = 8  # conversations that are answered in one batch


def json_lines(pieces: Iterable[tuple[int, str]], rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield a line of JSON for each row, in order: the row, and the generated `text`."""
    texts = [""] * len(rows)
    for number, piece in pieces:
        texts[number] += piece
    for row, text in zip(rows, texts, strict=True):
        yield json.dumps({**row, "text": text}, allow_nan=False) + "\n"


def read_turns(
    source: TextIO, out: TextIO, *, first: bool, share: Callable[[Any], Any] | None
) -> Iterator[str]:
    """Yield the lines of standard input that are not blank, on every rank.

    On a terminal, print `> ` before each line. There `exit` ends the input, too.

    Args:
        first: whether this is rank 0, which reads.
        share: returns rank 0's value on every rank; a collective. None means a single rank.
    """
    terminal = first and source.isatty()
    while True:
        line: str | None = ""
        while first and line is not None and not line.strip():
            if terminal:
                out.write("> ")
                out.flush()
            line = source.readline() or None
            if any("\ud800" <= character <= "\udfff" for character in line or ""):
                raise DataError("a line of standard input is not UTF-8; send text in UTF-8")
        if terminal and (line is None or line.strip() in ("exit", "/exit")):
            out.write("\n" if line is None else "")
            line = None
        line = line if share is None else share(line)
        if line is None:
            return
        yield line.rstrip("\r\n")


class Question(Protocol):
    """The turns before an answer, and the tools that may be called."""

    @property
    def messages(self) -> Messages: ...

    @property
    def tools(self) -> list[Any] | None: ...

    @property
    def place(self) -> str: ...


class Answerer:
    """A chat model with its settings for generation.

    Args:
        ask: renders turns by the model's chat template.
        window: maximum number of tokens that the model reads.
        stop: strings that end an answer, in addition to the template's end of a turn.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        ask: AskTurns,
        *,
        window: int,
        max_new_tokens: int,
        sampling: Sampling,
        stop: Sequence[str] = (),
    ) -> None:
        self._decoder = decoder
        self._tokenizer = tokenizer
        self._ask = ask
        self._window = window
        self._max_new_tokens = max_new_tokens
        self._sampling = sampling
        self._stop = stop

    def answers(self, questions: Iterable[Question]) -> Iterator[tuple[int, str]]:
        """Yield the pieces of all answers as they are generated, with the question's number."""
        remaining = iter(questions)
        first = 0
        while batch := list(islice(remaining, _BATCH)):
            prompts = [self._render(question) for question in batch]
            for ids, _ in prompts:
                if len(ids) > self._window:
                    logger.warning(
                        "a conversation of %d tokens: the model reads the last %d",
                        len(ids),
                        self._window,
                    )
            ids_only, ends = [ids for ids, _ in prompts], [end for _, end in prompts]
            for number, piece in self._write(ids_only, ends):
                yield first + number, piece
            first += len(batch)

    def _render(self, question: Question) -> tuple[list[int], str]:
        try:
            return self._ask(question.messages, question.tools)
        except DataError as error:
            raise DataError(
                f"{question.place}: {error}" if question.place else str(error)
            ) from None

    def talk(self, turns: Iterable[str], system: Messages) -> Iterator[tuple[str, Iterator[str]]]:
        """Yield each turn of the user with the pieces of its answer, in one conversation.

        Read all pieces of an answer before the next turn. If the conversation leaves no room for an
        answer in the window, the oldest turns are dropped with a warning.

        Args:
            system: the system turn, which is never dropped, or an empty list.
        """
        history: Messages = []
        for text in turns:
            history.append({"role": "user", "content": text})
            ids, end = self._fit(system, history)
            answer: list[str] = []
            yield text, self._record(self._write([ids], [end]), answer)
            history.append({"role": "assistant", "content": "".join(answer)})

    def _fit(self, system: Messages, history: Messages) -> tuple[list[int], str]:
        """Remove turns that do not fit from `history`. Return the ids of the rest."""
        dropped = 0
        ids, end = self._ask([*system, *history], None)
        while len(ids) + self._max_new_tokens > self._window and len(history) > 1:
            del history[:2]  # a user's turn and its answer
            dropped += 2
            ids, end = self._ask([*system, *history], None)
        if dropped:
            logger.warning(
                "the conversation is longer than the model's window of %d tokens: its %d oldest "
                "turns are no longer read",
                self._window,
                dropped,
            )
        if len(ids) > self._window:
            logger.warning(
                "a turn of %d tokens: the model reads the last %d", len(ids), self._window
            )
        return ids, end

    def _record(self, pieces: Iterator[tuple[int, str]], answer: list[str]) -> Iterator[str]:
        for _, piece in pieces:
            answer.append(piece)
            yield piece

    def _write(
        self, prompts: Sequence[list[int]], ends: Sequence[str]
    ) -> Iterator[tuple[int, str]]:
        return stream_texts(
            self._decoder,
            self._tokenizer,
            prompts,
            max_new_tokens=self._max_new_tokens,
            sampling=self._sampling,
            stop=list(dict.fromkeys([*self._stop, *filter(None, ends)])),
            controls=True,
        )
