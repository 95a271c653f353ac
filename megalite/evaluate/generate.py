"""Text from a model, a token at a time.

`generate` turns token ids into token ids; `stream_text` turns a prompt into pieces of text as soon
as they are certain: a character's last byte has come, and no stop string can begin in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from megalite.errors import CommandError, MegaLiteError
from megalite.formats.tokenizer import Tokenizer

# T tokens so far   V vocabulary   K the ids that a choice is made among
LogitsFn = Callable[[torch.Tensor], torch.Tensor]  # ids [1, T] on the CPU -> last logits [1, V]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    `temperature` 0 takes the likeliest id. Otherwise the scores are divided by it, `top_k` keeps
    the k likeliest ids, then `top_p` the fewest whose probabilities reach p (nucleus sampling,
    arXiv:1904.09751). The same seed gives the same choices on every device.

    Raises:
        CommandError: a number out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

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


def generate(
    logits_fn: LogitsFn,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    seed: int = 0,
) -> list[int]:
    """The ids that follow `prompt_ids`, at most `max_new_tokens`; `eos_id` ends them, left out.

    Raises:
        CommandError: an empty prompt, or a number out of its range (see `Sampling`).
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    return list(_stream_ids(logits_fn, prompt_ids, max_new_tokens, eos_id, sampling))


def stream_text(
    logits_fn: LogitsFn,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """Pieces of the text that follows `prompt`, up to the end of the document or a stop string.

    The stop string itself is left out, wherever token boundaries cut it. An empty prompt begins a
    document: it stands for the id that ended the one before.

    Raises:
        CommandError: an empty stop string; an empty prompt where the tokenizer has neither an end
            nor a beginning of document.
    """
    if "" in stop:
        raise CommandError("an empty stop string would end every text at once; leave it out")
    prompt_ids = tokenizer.encode(prompt)
    if not prompt_ids:
        first = tokenizer.bos_id if tokenizer.eos_id is None else tokenizer.eos_id
        prompt_ids = [] if first is None else [first]
    ids = _stream_ids(logits_fn, prompt_ids, max_new_tokens, tokenizer.eos_id, sampling)
    return _until_stop(_decode(tokenizer, prompt_ids, ids), stop)


def _stream_ids(
    logits_fn: LogitsFn,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    eos_id: int | None,
    sampling: Sampling,
) -> Iterator[int]:
    if not prompt_ids:
        raise CommandError("the prompt has no tokens: a model continues what it is given")
    if max_new_tokens < 0:
        raise CommandError(f"max_new_tokens is {max_new_tokens}; ask for 0 or more")
    return _sample_ids(logits_fn, prompt_ids, max_new_tokens, eos_id, sampling)


def _sample_ids(
    logits_fn: LogitsFn,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    eos_id: int | None,
    sampling: Sampling,
) -> Iterator[int]:
    generator = torch.Generator().manual_seed(sampling.seed)
    ids_1T = torch.tensor([list(prompt_ids)], dtype=torch.int64)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits_V = logits_fn(ids_1T)[0].float().cpu()
        if not torch.isfinite(logits_V.max()):
            raise MegaLiteError(
                f"the model's scores after {ids_1T.shape[1]} tokens are not finite: its training "
                "has diverged; use an earlier checkpoint"
            )
        token = _choose(logits_V, sampling, generator)
        if token == eos_id:
            return
        yield token
        ids_1T = torch.cat([ids_1T, torch.tensor([[token]])], dim=1)


def _choose(logits_V: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    # the maximum is taken out first: a tiny temperature must not divide into infinities
    scaled_V = (logits_V - logits_V.max()).double() / sampling.temperature
    scores_K, ids_K = torch.sort(scaled_V, descending=True, stable=True)
    scores_K, ids_K = scores_K[: sampling.top_k], ids_K[: sampling.top_k]
    probabilities_K = torch.softmax(scores_K, dim=0)
    if sampling.top_p is not None:
        before_K = probabilities_K.cumsum(0) - probabilities_K
        before_K[0] = 0.0  # the likeliest always stays
        probabilities_K = torch.where(before_K < sampling.top_p, probabilities_K, 0.0)
    chosen = torch.multinomial(probabilities_K, 1, generator=generator)
    return int(ids_K[chosen])


def _decode(tokenizer: Tokenizer, prompt_ids: Sequence[int], ids: Iterator[int]) -> Iterator[str]:
    """The text each id adds. Bytes of a character wait for its last one.

    A piece's text depends on what stands before it (a leading space, the bytes of a character), so
    the new text is the difference of two decodings that begin at the same id.
    """
    all_ids = list(prompt_ids)
    start, done = 0, len(all_ids)  # decoding begins at `start`; the text before `done` is given out
    before = tokenizer.decode(all_ids)
    for token in ids:
        all_ids.append(token)
        text = tokenizer.decode(all_ids[start:])
        if text.endswith("\ufffd"):  # U+FFFD stands for bytes that are no character, or not yet
            continue
        yield text[len(before) :]
        start, done = done, len(all_ids)
        before = tokenizer.decode(all_ids[start:done])
    if done < len(all_ids):
        yield tokenizer.decode(all_ids[start:])[len(before) :]


def _until_stop(pieces: Iterator[str], stop: Sequence[str]) -> Iterator[str]:
    """The pieces up to the first stop string; what may be the beginning of one is held back."""
    held = ""
    for piece in pieces:
        held += piece
        ends = [held.find(text) for text in stop if text in held]
        if ends:
            yield held[: min(ends)]
            return
        safe = len(held) - _open_length(held, stop)
        if safe:
            yield held[:safe]
            held = held[safe:]
    if held:
        yield held


def _open_length(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of `text` are the beginning of a stop string."""
    lengths = [
        length
        for end in stop
        for length in range(1, min(len(end) - 1, len(text)) + 1)
        if text.endswith(end[:length])
    ]
    return max(lengths, default=0)
