"""Corruption of windows: masking of tokens (BERT), or removal of spans (T5).

The corruption of a sample depends only on the seed and the sample's number. So it is the same on
every layout and after a resume, and differs between epochs.

B samples   L tokens of a window
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from megalite.config import RunConfig, spans
from megalite.data.batch import Arrays
from megalite.data.order import Ints, derive_key, uniform

# Function from windows and the numbers of their samples to the arrays for the model.
Corruption = Callable[[Arrays, Ints], Arrays]

_NOT_A_WORD = frozenset("\u2581\u0120\u010a\u0109")  # white space in vocabularies


def make_corruption(
    config: RunConfig, words: Words | None, special: frozenset[int]
) -> Corruption | None:
    """Return the corruption of a run file's objective, or None if it has none.

    Args:
        words: needed for `objective.whole_words`.
        special: ids of BOS and EOS, which are never masked.
    """
    if config.objective.name == "masked":
        return Masked(config, words, special)
    return SpanCorruption(config) if config.objective.name == "span_corruption" else None


class Words:
    """Detection of words from a vocabulary's pieces.

    A piece begins a word if it starts with white space or punctuation, or follows a piece that ends
    with one. If the vocabulary marks the pieces that continue a word ("##"), all others begin one.
    """

    def __init__(self, pieces: list[str]) -> None:
        def is_separator(character: str) -> bool:
            return character in _NOT_A_WORD or not character.isalnum()

        continues = [piece.startswith("##") for piece in pieces]
        marked = any(continues)
        self._starts = np.array(
            [
                not goes_on if marked else not piece or is_separator(piece[0])
                for piece, goes_on in zip(pieces, continues, strict=True)
            ]
        )
        self._ends = np.array([not marked and (not p or is_separator(p[-1])) for p in pieces])

    def numbers(self, ids_BL: Ints) -> Ints:
        """Return the number of each token's word in its window: int64 [B, L]."""
        begins = self._starts[ids_BL]
        begins[:, 1:] |= self._ends[ids_BL[:, :-1]]
        begins[:, 0] = True
        return np.cumsum(begins, axis=1) - 1


class Masked:
    """BERT's masking: of the chosen tokens, 80 % become the mask, 10 % a random token.

    The other 10 % stay. At least one token (or word) of each window is chosen. Devlin et al. 2018;
    whole-word masking is their update of 2019.
    """

    def __init__(self, config: RunConfig, words: Words | None, special: frozenset[int]) -> None:
        self._config = config
        self._words = words
        self._special = np.array(sorted(special), np.int64)

    def __call__(self, arrays: Arrays, samples: Ints) -> Arrays:
        objective = self._config.objective
        vocabulary = self._config.model.vocab_size
        ids = arrays["input_ids"]
        chance, kind, other = _draw(self._config.data.seed, samples, ids.shape[1], 3)
        if self._words is not None:
            chance = np.take_along_axis(chance, self._words.numbers(ids), axis=1)
        chance = np.where(np.isin(ids, self._special), 1.0, chance)
        # At least the token or word with the lowest number is chosen.
        most = np.maximum(chance.min(axis=1, keepdims=True), objective.mask_probability)
        chosen = (chance < objective.mask_probability) | ((chance == most) & (chance < 1))
        masked = np.where(kind < 0.8, np.int64(objective.mask_token_id or 0), ids)
        masked = np.where(kind >= 0.9, (other * vocabulary).astype(np.int64), masked)
        return arrays | {
            "input_ids": np.where(chosen, masked, ids),
            "labels": ids,
            "loss_mask": chosen,
        }


class SpanCorruption:
    """T5's span corruption: sentinels replace removed spans, which the decoder writes.

    Sentinels are the last ids of the vocabulary, counted down. Removed and remaining tokens are
    divided at random into equally many spans, which alternate; the first span remains (Raffel et
    al. 2019). All windows give arrays of the same lengths.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    def __call__(self, arrays: Arrays, samples: Ints) -> Arrays:
        config = self._config
        ids = arrays["input_ids"]
        noise, count = spans(config)
        random_kept, random_noise = _draw(config.data.seed, samples, ids.shape[1], 2)
        sentinels = config.model.vocab_size - 1 - np.arange(count + 1)
        sources = []
        targets = []
        for row, tokens in enumerate(ids):
            remaining = _parts(random_kept[row], len(tokens) - noise, count)
            removed = _parts(random_noise[row], noise, count)
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
    """Return the arrays of an encoder-decoder; its inputs are the targets shifted by `start`."""
    before = np.full((len(targets), 1), start, np.int64)
    return {
        "input_ids": sources,
        "decoder_input_ids": np.concatenate((before, targets[:, :-1]), axis=1),
        "labels": targets,
        "loss_mask": np.ones(targets.shape, np.bool_),
    }


def _parts(chances: npt.NDArray[np.float64], total: int, count: int) -> Ints:
    """Divide `total` at random into `count` parts of at least 1, with equal probabilities."""
    cuts = np.sort(np.argsort(chances[: total - 1], kind="stable")[: count - 1]) + 1
    return np.diff(cuts, prepend=0, append=total)


def _draw(seed: int, samples: Ints, length: int, times: int) -> list[npt.NDArray[np.float64]]:
    """Return `times` arrays of random numbers in [0, 1), [B, length] each."""
    keys = derive_key(seed, np.full_like(samples, -1), samples)
    return [uniform(keys, length, stream) for stream in range(times)]
