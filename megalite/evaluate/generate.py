"""Text generation, token by token.

`generate` maps token ids to token ids. `stream_texts` maps prompts to pieces of text. It yields a
piece when all its characters are complete and no stop string can begin in it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megalite.errors import CommandError, MegaLiteError
from megalite.tokenizers.tokenizer import Tokenizer, encode_text

# B prompts   T tokens so far   V vocabulary   K candidate ids
LogitsFn = Callable[[Tensor], Tensor]  # ids [1, T] on the CPU -> last logits [1, V]


class Decoder(Protocol):
    """Interface of a model that generates: logits of the token after each text.

    Attributes:
        continues: whether a text continues its prompt. If false, the text is a separate answer.
        suffix_ids: ids that end a prompt if the model does not continue it.
    """

    continues: bool
    suffix_ids: Sequence[int]

    def begin(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Tensor:
        """Return the logits after each prompt: fp32 [B, V]. At most `new_tokens` will follow."""

    def next(self, tokens: Sequence[int]) -> Tensor:
        """Return the logits after one more token of each text: fp32 [B, V]."""


class UncachedDecoder:
    """Decoder without a cache, which runs the whole text for every token. Tests compare with it."""

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
    """Settings for the choice of the next token.

    The same seed gives the same choices on every device. A text does not depend on the other texts
    of its batch.

    Attributes:
        temperature: divides the logits. 0 means the likeliest id.
        top_k: number of likeliest ids to choose from. None means all.
        top_p: after `top_k`, choose from the fewest likeliest ids whose probabilities reach p
            (nucleus sampling, arXiv:1904.09751). None means all.
        seed: seed of the choices.
        repetition_penalty: divides positive logits of ids in the text so far, and multiplies
            negative ones (arXiv:1909.05858). 1 has no effect.
    Raises:
        CommandError: a number is out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise CommandError(
                f"temperature is {self.temperature}; give 0 (always the likeliest token) or more"
            )
        if not 0 <= self.seed < 2**63:
            raise CommandError(f"seed is {self.seed}; give a number from 0 to 2^63 - 1")
        if self.top_k is not None and self.top_k < 1:
            raise CommandError(f"top_k is {self.top_k}; give 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise CommandError(f"top_p is {self.top_p}; give a number over 0 and at most 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise CommandError(
                f"repetition_penalty is {self.repetition_penalty}; give a number over 0 (1 has no "
                "effect)"
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
        settings: attributes of `Sampling`.
    Raises:
        CommandError: the prompt is empty, or a number is out of its range (see `Sampling`).
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
    """Yield pieces of the text that follows a single prompt. See `stream_texts`."""
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
    """Yield (number of the prompt, piece of text) for the texts that follow `prompts`.

    A text ends at a stop string, at any of the `end_ids` of the tokenizer or the model, or after
    `max_new_tokens`. The stop string is not part of the text; it may span several tokens. A prompt
    starts with the tokenizer's prefix. If there is none, an empty prompt becomes the id that ends a
    document. Ids outside of the tokenizer's vocabulary have no text.

    Args:
        prompts: texts, or ids from a chat template.
        controls: if true, a stop string that names a control token means that token, as in a chat.
    Raises:
        CommandError: a stop string is empty, or a prompt is empty and the tokenizer has neither BOS
            nor EOS.
    """
    if "" in stop:
        raise CommandError("an empty stop string would end every text at once; remove it")
    ends = list(tokenizer.end_ids)
    continues = getattr(model, "continues", True)
    ends += getattr(model, "end_ids", ())
    if controls:
        # a control token has no text, so its id ends the text
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
    """Yield the first text's pieces at once, and then each other text on a new line.

    Args:
        pieces: (number of the text, piece).
        starts: beginning of each text.
    """
    texts = list(starts)
    yield texts[0]
    for number, piece in pieces:
        if number == 0:
            yield piece
        else:
            texts[number] += piece
    yield "".join(f"\n{text}" for text in texts[1:]) + "\n"


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
        CommandError: a prompt is empty, or `max_new_tokens` is negative.
    """
    if not all(prompts):
        raise CommandError("the prompt has no tokens; give a prompt with text")
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
            logits_BV = logits_BV.clone()  # inference tensors cannot be changed in place
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
    # subtract the maximum first, so that a tiny temperature does not cause infinities
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
    """A text during its generation, and the part of it that is certain.

    The text of a token depends on the tokens before it (a leading space, the bytes of a character).
    So new text is the difference of two decodings that begin at the same id.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._stop = stop
        self._start = 0  # first id of the decodings
        self._done = len(self._ids)  # ids whose text was returned
        self._before = tokenizer.decode(self._ids)
        self._pending = ""  # text that may be the beginning of a stop string
        self.ended = False

    def add(self, token: int) -> str:
        """Return the text that is certain with one more token."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids[self._start :])
        if text.endswith("\ufffd"):  # U+FFFD: an invalid or incomplete character
            return ""
        piece = text[len(self._before) :]
        self._start = self._done
        self._done = len(self._ids)
        self._before = self._tokenizer.decode(self._ids[self._start : self._done])
        return self._release(piece)

    def end(self) -> str:
        """Return the pending text at the end of the generation."""
        rest = ""
        if self._done < len(self._ids):
            rest = self._tokenizer.decode(self._ids[self._start :])[len(self._before) :]
        text = self._release(rest)
        if not self.ended:
            text = text + self._pending
            self._pending = ""
            self.ended = True
        return text

    def _release(self, piece: str) -> str:
        pending = self._pending + piece
        ends = [pending.find(text) for text in self._stop if text in pending]
        if ends:
            self.ended = True
            return pending[: min(ends)]
        safe = len(pending) - _open_length(pending, self._stop)
        self._pending = pending[safe:]
        return pending[:safe]


def _open_length(text: str, stop: Sequence[str]) -> int:
    """Return how many characters at the end of `text` may be the beginning of a stop string."""
    lengths = [
        length
        for end in stop
        for length in range(1, min(len(end) - 1, len(text)) + 1)
        if text.endswith(end[:length])
    ]
    return max(lengths, default=0)
