"""Corruption of windows: masking of tokens (BERT), or removal of spans (T5).

The corruption of a sample depends only on the seed and the sample's number. So the corruption is
the same on every layout and after a resume, and differs between epochs.

B samples   L tokens of a window
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from megalite.config import RunConfig, spans
from megalite.data.batch import Arrays
from megalite.data.order import Ints, derive_key, uniform

# Maps the arrays of windows and their sample numbers to the arrays for the model.
Corruption = Callable[[Arrays, Ints], Arrays]

_SPACES = frozenset("\u2581\u0120\u010a\u0109")  # stand for white space in vocabularies


def make_corruption(
    config: RunConfig, words: WordBoundaries | None, special: frozenset[int]
) -> Corruption | None:
    """Return the corruption of a run file's objective, or None if the objective has none.

    Args:
        words: word boundaries of the vocabulary; required for `objective.whole_words`.
        special: ids of BOS and EOS, which are never masked.
    """
    if config.objective.name == "masked":
        return TokenMasking(config, words, special)
    return SpanCorruption(config) if config.objective.name == "span_corruption" else None


class WordBoundaries:
    """Pieces of a vocabulary at which words begin or end.

    A piece begins a word if it starts with white space or punctuation, or if the previous piece
    ends with either. In a vocabulary that marks pieces within a word ("##"), all other pieces begin
    a word.
    """

    def __init__(self, pieces: list[str]) -> None:
        def is_separator(character: str) -> bool:
            return character in _SPACES or not character.isalnum()

        continues = [piece.startswith("##") for piece in pieces]
        has_marks = any(continues)
        self._starts = np.array(
            [
                not inside if has_marks else not piece or is_separator(piece[0])
                for piece, inside in zip(pieces, continues, strict=True)
            ]
        )
        self._ends = np.array([not has_marks and (not p or is_separator(p[-1])) for p in pieces])

    def word_numbers(self, ids_BL: Ints) -> Ints:
        """Return the number of each token's word within its window: int64 [B, L]."""
        begins = self._starts[ids_BL]
        begins[:, 1:] |= self._ends[ids_BL[:, :-1]]
        begins[:, 0] = True
        return np.cumsum(begins, axis=1) - 1


class TokenMasking:
    """BERT's masking of tokens.

    80 % of the chosen tokens become the mask token, 10 % become a random token, and 10 % stay. At
    least one token (or word) of each window is chosen. Source: Devlin et al. 2018, and their update
    of 2019 for whole words.
    """

    def __init__(
        self, config: RunConfig, words: WordBoundaries | None, special: frozenset[int]
    ) -> None:
        self._config = config
        self._words = words
        self._special = np.array(sorted(special), np.int64)

    def __call__(self, arrays: Arrays, samples: Ints) -> Arrays:
        objective = self._config.objective
        vocabulary = self._config.model.vocab_size
        ids = arrays["input_ids"]
        draw, action, random_token = _draw(self._config.data.seed, samples, ids.shape[1], 3)
        if self._words is not None:
            draw = np.take_along_axis(draw, self._words.word_numbers(ids), axis=1)
        draw = np.where(np.isin(ids, self._special), 1.0, draw)
        # The token or word with the lowest draw is always chosen.
        limit = np.maximum(draw.min(axis=1, keepdims=True), objective.mask_probability)
        chosen = (draw < objective.mask_probability) | ((draw == limit) & (draw < 1))
        masked = np.where(action < 0.8, np.int64(objective.mask_token_id or 0), ids)
        masked = np.where(action >= 0.9, (random_token * vocabulary).astype(np.int64), masked)
        return arrays | {
            "input_ids": np.where(chosen, masked, ids),
            "labels": ids,
            "loss_mask": chosen,
        }


class SpanCorruption:
    """T5's span corruption: sentinels replace removed spans, and the decoder writes these spans.

    Sentinels are the last ids of the vocabulary, in descending order. The removed and the remaining
    tokens are divided at random into the same number of spans. Both kinds alternate, and the first
    span remains (Raffel et al. 2019). The arrays of all windows have the same lengths.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    def __call__(self, arrays: Arrays, samples: Ints) -> Arrays:
        config = self._config
        ids = arrays["input_ids"]
        noise, count = spans(config)
        remaining_draws, removed_draws = _draw(config.data.seed, samples, ids.shape[1], 2)
        sentinels = config.model.vocab_size - 1 - np.arange(count + 1)
        sources = []
        targets = []
        for row, tokens in enumerate(ids):
            remaining = _random_parts(remaining_draws[row], len(tokens) - noise, count)
            removed = _random_parts(removed_draws[row], noise, count)
            bounds = np.cumsum(np.stack((remaining, removed), axis=1).reshape(-1))
            pieces = np.split(tokens, bounds[:-1])
            source = list[Ints]()
            target = list[Ints]()
            for number in range(count):
                sentinel = sentinels[number : number + 1]
                source += [pieces[2 * number], sentinel]
                target += [sentinel, pieces[2 * number + 1]]
            sources.append(np.concatenate(source))
            targets.append(np.concatenate([*target, sentinels[count:]]))
        start = config.model.decoder_start_token_id
        return _encoder_decoder_arrays(np.stack(sources), np.stack(targets), start)


def _encoder_decoder_arrays(sources: Ints, targets: Ints, start: int) -> Arrays:
    """Return an encoder-decoder's arrays. The decoder reads `start`, then the previous targets."""
    first = np.full((len(targets), 1), start, np.int64)
    return {
        "input_ids": sources,
        "decoder_input_ids": np.concatenate((first, targets[:, :-1]), axis=1),
        "labels": targets,
        "loss_mask": np.ones(targets.shape, np.bool_),
    }


def _random_parts(draws: npt.NDArray[np.float64], total: int, count: int) -> Ints:
    """Divide `total` into `count` parts of at least 1. All divisions are equally likely."""
    cuts = np.sort(np.argsort(draws[: total - 1], kind="stable")[: count - 1]) + 1
    return np.diff(cuts, prepend=0, append=total)


def _draw(seed: int, samples: Ints, length: int, count: int) -> list[npt.NDArray[np.float64]]:
    """Return `count` arrays of random numbers in [0, 1), each of shape [B, length]."""
    keys = derive_key(seed, np.full_like(samples, -1), samples)
    return [uniform(keys, length, stream) for stream in range(count)]
