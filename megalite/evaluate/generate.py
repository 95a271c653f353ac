"""Text from a model, a token at a time.

`generate` turns token ids into token ids; `stream_texts` turns prompts into pieces of text as soon
as they are certain: a character's last byte has come, and no stop string can begin in them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megalite.errors import CommandError, MegaLiteError
from megalite.tokenizers.tokenizer import Tokenizer, encode_text

# B prompts   T tokens so far   V vocabulary   K the ids that a choice is made among
LogitsFn = Callable[[Tensor], Tensor]  # ids [1, T] on the CPU -> last logits [1, V]


class Decoder(Protocol):
    """Interface of a model that writes: scores of the token after each text, as the texts grow.

    Attributes:
        continues: whether a text continues its prompt. If false, it is an answer of its own.
        suffix_ids: ids that end a prompt which the model reads whole and answers.
    """

    continues: bool
    suffix_ids: Sequence[int]

    def begin(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Tensor:
        """Return the scores after each prompt, fp32 [B, V]; at most `new_tokens` will follow."""

    def next(self, tokens: Sequence[int]) -> Tensor:
        """Return the scores after one more token of each text, fp32 [B, V]."""


class UncachedDecoder:
    """Decoder without a cache: it runs each whole text again for every token. It serves as an
    oracle.
    """

    continues = True
    suffix_ids: Sequence[int] = ()

    def __init__(self, logits_fn: LogitsFn) -> None:
        self._logits_fn = logits_fn

    def begin(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Tensor:
        del new_tokens
        self._texts = [list(prompt) for prompt in prompts]
        return self._read()

    def next(self, tokens: Sequence[int]) -> Tensor:
        for text, token in zip(self._texts, tokens, strict=True):
            text.append(token)
        return self._read()

    def _read(self) -> Tensor:
        rows = [self._logits_fn(torch.tensor([text], dtype=torch.int64)) for text in self._texts]
        return torch.cat(rows).float()


@dataclass(frozen=True)
class Sampling:
    """Rule by which the next token is chosen.

    `temperature` 0 takes the likeliest id. Otherwise the scores are divided by it, `top_k` keeps
    the k likeliest ids, then `top_p` the fewest whose probabilities reach p (nucleus sampling,
    arXiv:1904.09751). `repetition_penalty` divides the positive scores of ids that were there
    before, and multiplies the negative ones (arXiv:1909.05858). The same seed gives the same
    choices on every device, and the same text whatever other texts the batch has.

    Raises:
        CommandError: a number out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise CommandError(
                f"temperature is {self.temperature}; it is 0 (always the likeliest token) or more"
            )
        if not 0 <= self.seed < 2**63:
            raise CommandError(f"seed is {self.seed}; it is 0 or more and under 2^63")
        if self.top_k is not None and self.top_k < 1:
            raise CommandError(f"top_k is {self.top_k}; keep 1 token or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise CommandError(f"top_p is {self.top_p}; a share is over 0 and at most 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise CommandError(
                f"repetition_penalty is {self.repetition_penalty}; 1 changes nothing"
            )


def generate(
    model: Decoder | LogitsFn,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    eos_id: int | None = None,
    **settings: float,
) -> list[int]:
    """Return the ids that follow `prompt_ids`, at most `max_new_tokens`, up to `eos_id`.

    Args:
        settings: those of `Sampling`.
    Raises:
        CommandError: an empty prompt, or a number out of its range (see `Sampling`).
    """
    sampling = Sampling(**settings)  # type: ignore[arg-type]
    ends = () if eos_id is None else (eos_id,)
    steps = sample_ids(model, [prompt_ids], max_new_tokens, ends, sampling)
    return [ids[0] for ids in steps if ids[0] is not None]


def stream_text(
    model: Decoder | LogitsFn,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """Yield pieces of the text that follows one prompt; see `stream_texts`."""
    pieces = stream_texts(
        model, tokenizer, [prompt], max_new_tokens=max_new_tokens, sampling=sampling, stop=stop
    )
    return (piece for _, piece in pieces)


def stream_texts(
    model: Decoder | LogitsFn,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str] = (),
    controls: bool = False,
) -> Iterator[tuple[int, str]]:
    """Yield pieces of the texts that follow `prompts`, with the prompt's number, as they come.

    A text ends with the document or a stop string, which is omitted, wherever token boundaries cut
    it. A document ends with any of the `end_ids` of the tokenizer or the model. A prompt begins
    with what the tokenizer begins texts with. If that is nothing, an empty prompt stands for the
    id that ended the document before. Ids outside the tokenizer's vocabulary have no text.

    Args:
        prompts: texts, or ids as a chat template gives them.
        controls: If true, a stop string that names a control token is that token, as in a chat.
    Raises:
        CommandError: an empty stop string; an empty prompt if the tokenizer has neither an end
            nor a beginning of document.
    """
    if "" in stop:
        raise CommandError("an empty stop string would end every text at once; remove it")
    ends = list(tokenizer.end_ids)
    continues = getattr(model, "continues", True)
    ends += getattr(model, "end_ids", ())
    if controls:
        # a control token has no text that would be found: its id ends what is written
        names = [tokenizer.encode_with_offsets(text)[0] for text in stop]
        ends += [tokens[0] for tokens in names if len(tokens) == 1]
    after = [] if continues else list(getattr(model, "suffix_ids", ()))
    ids = [
        encode_text(tokenizer, prompt) + after if isinstance(prompt, str) else list(prompt)
        for prompt in prompts
    ]
    first = tokenizer.bos_id if tokenizer.eos_id is None else tokenizer.eos_id
    ids = [tokens or ([] if first is None else [first]) for tokens in ids]
    steps = sample_ids(model, ids, max_new_tokens, ends, sampling)
    texts = [_Text(tokenizer, prompt if continues else [], stop) for prompt in ids]
    return _pieces(texts, steps)


def in_order(pieces: Iterable[tuple[int, str]], starts: Sequence[str]) -> Iterator[str]:
    """Yield numbered pieces as one text: the first text's at once, then each other text on a new
    line.

    Args:
        starts: what comes before the pieces of each.
    """
    held = list(starts)
    yield held[0]
    for number, piece in pieces:
        if number == 0:
            yield piece
        else:
            held[number] += piece
    yield "".join(f"\n{text}" for text in held[1:]) + "\n"


def _pieces(texts: Sequence[_Text], steps: Iterator[list[int | None]]) -> Iterator[tuple[int, str]]:
    for tokens in steps:
        for number, (text, token) in enumerate(zip(texts, tokens, strict=True)):
            if not text.ended and (piece := text.end() if token is None else text.add(token)):
                yield number, piece
        if all(text.ended for text in texts):
            return
    for number, text in enumerate(texts):
        if not text.ended and (piece := text.end()):
            yield number, piece


def sample_ids(
    model: Decoder | LogitsFn,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ends: Collection[int],
    sampling: Sampling,
) -> Iterator[list[int | None]]:
    """Yield the next id of every text, step by step. None means that the text has ended.

    Raises:
        CommandError: an empty prompt, or fewer than no tokens.
    """
    if not all(prompts):
        raise CommandError("the prompt has no tokens: a model continues what it is given")
    if max_new_tokens < 0:
        raise CommandError(f"max_new_tokens is {max_new_tokens}; give 0 or more")
    decoder: Any = model if hasattr(model, "begin") else UncachedDecoder(model)
    return _sample(decoder, prompts, max_new_tokens, ends, sampling)


def _sample(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ends: Collection[int],
    sampling: Sampling,
) -> Iterator[list[int | None]]:
    generators = [torch.Generator().manual_seed(sampling.seed) for _ in prompts]
    texts = [list(prompt) for prompt in prompts]
    running = [True] * len(prompts)
    tokens = list[int]()
    for step in range(max_new_tokens):
        with torch.inference_mode():
            logits_BV = decoder.next(tokens) if step else decoder.begin(prompts, max_new_tokens)
            logits_BV = logits_BV.cpu()
        if not torch.isfinite(logits_BV.amax(dim=1)).all():
            raise MegaLiteError(
                f"the model's scores after {len(texts[0])} tokens are not finite: its training "
                "has diverged; use an earlier checkpoint"
            )
        if sampling.repetition_penalty != 1:
            logits_BV = logits_BV.clone()  # out of inference mode
            _penalize(logits_BV, texts, sampling.repetition_penalty)
        if sampling.temperature == 0:
            tokens = logits_BV.argmax(dim=1).tolist()
        else:
            rows = zip(logits_BV, generators, strict=True)
            tokens = [_choose(logits_V, sampling, generator) for logits_V, generator in rows]
        running = [on and token not in ends for on, token in zip(running, tokens, strict=True)]
        yield [token if on else None for token, on in zip(tokens, running, strict=True)]
        if not any(running):
            return
        for text, token in zip(texts, tokens, strict=True):
            text.append(token)


def _penalize(logits_BV: Tensor, texts: Sequence[Sequence[int]], penalty: float) -> None:
    for logits_V, text in zip(logits_BV, texts, strict=True):
        ids = torch.tensor(sorted({id for id in text if id < len(logits_V)}), dtype=torch.int64)
        scores = logits_V[ids]
        logits_V[ids] = torch.where(scores > 0, scores / penalty, scores * penalty)


def _choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    # the maximum is taken out first: a tiny temperature must not divide into infinities
    scaled_V = (logits_V - logits_V.max()).double() / sampling.temperature
    scores_K, ids_K = torch.sort(scaled_V, descending=True, stable=True)
    scores_K = scores_K[: sampling.top_k]
    ids_K = ids_K[: sampling.top_k]
    probabilities_K = torch.softmax(scores_K, dim=0)
    if sampling.top_p is not None:
        before_K = probabilities_K.cumsum(0) - probabilities_K
        before_K[0] = 0.0  # the likeliest always stays
        probabilities_K = torch.where(before_K < sampling.top_p, probabilities_K, 0.0)
    chosen = torch.multinomial(probabilities_K, 1, generator=generator)
    return int(ids_K[chosen])


class _Text:
    """A text as its tokens come, and how much of it is certain.

    A piece's text depends on what stands before it (a leading space, the bytes of a character), so
    the new text is the difference of two decodings that begin at the same id.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._stop = stop
        # decoding begins at `start`; the text before `done` is given out
        self._start = 0
        self._done = len(self._ids)
        self._before = tokenizer.decode(self._ids)
        self._held = ""  # what may be the beginning of a stop string
        self.ended = False

    def add(self, token: int) -> str:
        """Return the text that is certain with one more token."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids[self._start :])
        if text.endswith("\ufffd"):  # U+FFFD stands for bytes that are no character, or not yet
            return ""
        piece = text[len(self._before) :]
        self._start = self._done
        self._done = len(self._ids)
        self._before = self._tokenizer.decode(self._ids[self._start : self._done])
        return self._release(piece)

    def end(self) -> str:
        """Return the text that was held back, when nothing more comes."""
        rest = ""
        if self._done < len(self._ids):
            rest = self._tokenizer.decode(self._ids[self._start :])[len(self._before) :]
        found = self._release(rest)
        if not self.ended:
            found = found + self._held
            self._held = ""
            self.ended = True
        return found

    def _release(self, piece: str) -> str:
        held = self._held + piece
        ends = [held.find(text) for text in self._stop if text in held]
        if ends:
            self.ended = True
            return held[: min(ends)]
        safe = len(held) - _open_length(held, self._stop)
        self._held = held[safe:]
        return held[:safe]


def _open_length(text: str, stop: Sequence[str]) -> int:
    """Return how many characters at the end of `text` may begin a stop string."""
    lengths = [
        length
        for end in stop
        for length in range(1, min(len(end) - 1, len(text)) + 1)
        if text.endswith(end[:length])
    ]
    return max(lengths, default=0)
