"""Conversations with a chat model: answers to given turns, and a talk that keeps its history."""

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
# from the turns so far, and the tools, to the ids up to the answer and the text that ends it
AskTurns: TypeAlias = "Callable[[Messages, list[Any] | None], tuple[list[int], str]]"

_TOGETHER = 8  # conversations that are answered at once


def json_lines(pieces: Iterable[tuple[int, str]], given: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield one line of JSON for each text, in order: what was given, and the `text` written."""
    texts = [""] * len(given)
    for number, piece in pieces:
        texts[number] += piece
    for row, text in zip(given, texts, strict=True):
        yield json.dumps({**row, "text": text}, allow_nan=False) + "\n"


def read_turns(
    source: TextIO, out: TextIO, *, first: bool, share: Callable[[Any], Any] | None
) -> Iterator[str]:
    """Yield the lines of standard input that are not blank, on every rank.

    On a terminal a `> ` is written before each, and `exit` ends them as the end of input does.

    Args:
        first: whether this is rank 0, which reads.
        share: returns rank 0's value on every rank; a collective. None: there is one rank.
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
    """A chat model with the way it writes.

    Args:
        ask: renders turns by the model's chat template.
        window: tokens that the model reads at most.
        stop: strings that end an answer, besides the template's own end of a turn.
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
        """Yield the pieces of every answer as they come, with the number of its question."""
        waiting = iter(questions)
        first = 0
        while batch := list(islice(waiting, _TOGETHER)):
            asked = [self._asked(question) for question in batch]
            for ids, _ in asked:
                if len(ids) > self._window:
                    logger.warning(
                        "a conversation of %d tokens: the model reads the last %d",
                        len(ids),
                        self._window,
                    )
            for number, piece in self._write([ids for ids, _ in asked], [end for _, end in asked]):
                yield first + number, piece
            first += len(batch)

    def _asked(self, question: Question) -> tuple[list[int], str]:
        try:
            return self._ask(question.messages, question.tools)
        except DataError as error:
            raise DataError(
                f"{question.place}: {error}" if question.place else str(error)
            ) from None

    def talk(self, turns: Iterable[str], system: Messages) -> Iterator[tuple[str, Iterator[str]]]:
        """Yield each of a user's turns with the pieces of its answer; earlier turns are read too.

        The pieces of one answer must be read before the next turn is requested. If the turns so
        far leave no room for an answer in the window, the oldest are dropped, which is logged.

        Args:
            system: the system turn, which is never dropped, or nothing.
        """
        history: Messages = []
        for text in turns:
            history.append({"role": "user", "content": text})
            ids, end = self._fit(system, history)
            answer: list[str] = []
            yield text, self._kept(self._write([ids], [end]), answer)
            history.append({"role": "assistant", "content": "".join(answer)})

    def _fit(self, system: Messages, history: Messages) -> tuple[list[int], str]:
        """Return the ids of the conversation. Turns that do not fit are removed from `history`."""
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

    def _kept(self, pieces: Iterator[tuple[int, str]], answer: list[str]) -> Iterator[str]:
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
