"""Corruption of windows: tokens that are hidden, or spans that are cut out.

Both are functions of (seed, sample): every layout, and a run that goes on, hides the same tokens,
and another epoch hides others.

B samples   L tokens of a window
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from megalite.config import RunConfig, spans
from megalite.data.batch import Arrays
from megalite.data.order import Ints, derive_key, uniform

# windows as they are read, and the numbers of their samples -> what a model is given of them
Corruption = Callable[[Arrays, Ints], Arrays]

_NOT_A_WORD = frozenset("\u2581\u0120\u010a\u0109")  # how vocabularies write spaces and line ends


def make_corruption(
    config: RunConfig, words: Words | None, special: frozenset[int]
) -> Corruption | None:
    """Return the corruption of a run file's objective; None if windows stay as they are.

    Args:
        words: which tokens of a text begin a word; needed for `whole_words`.
        special: ids that end or begin documents, which are never hidden.
    """
    if config.objective.name == "masked":
        return Masked(config, words, special)
    return SpanCorruption(config) if config.objective.name == "span_corruption" else None


class Words:
    """Beginnings of words, found by the form of a vocabulary's pieces.

    A piece begins a word if it starts with a space or a sign, or follows a piece that ends so. If
    the vocabulary marks the pieces that continue a word ("##"), all others begin one.
    """

    def __init__(self, pieces: list[str]) -> None:
        def sign(character: str) -> bool:
            return character in _NOT_A_WORD or not character.isalnum()

        goes_on = [piece.startswith("##") for piece in pieces]
        marked = any(goes_on)
        self._starts = np.array(
            [
                (not marked and (not piece or sign(piece[0]))) or (marked and not on)
                for piece, on in zip(pieces, goes_on, strict=True)
            ]
        )
        self._ends = np.array([not marked and (not p or sign(p[-1])) for p in pieces])

    def numbers(self, ids_BL: Ints) -> Ints:
        """Return the number of each token's word in its window: int64 [B, L]."""
        begins = self._starts[ids_BL]
        begins[:, 1:] |= self._ends[ids_BL[:, :-1]]
        begins[:, 0] = True
        return np.cumsum(begins, axis=1) - 1


class Masked:
    """BERT's: of the tokens that are chosen, 8 in 10 become the mask, 1 another token, 1 itself.

    A window in which none is chosen has one chosen. Devlin et al. 2018; whole words are theirs of
    2019.
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
        # at least the token, or the word, of the lowest chance
        most = np.maximum(chance.min(axis=1, keepdims=True), objective.mask_probability)
        hidden = (chance < objective.mask_probability) | ((chance == most) & (chance < 1))
        given = np.where(kind < 0.8, np.int64(objective.mask_token_id or 0), ids)
        given = np.where(kind >= 0.9, (other * vocabulary).astype(np.int64), given)
        return arrays | {
            "input_ids": np.where(hidden, given, ids),
            "labels": ids,
            "loss_mask": hidden,
        }


class SpanCorruption:
    """T5's: spans are cut out, a sentinel stands for each, and the decoder writes what was there.

    Sentinels are the last ids of the vocabulary, counted down. The noise and what is left are cut
    into equally many parts at random, which take turns; a window begins with what is left (Raffel
    et al. 2019). Every window gives tensors of the same lengths.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    def __call__(self, arrays: Arrays, samples: Ints) -> Arrays:
        config = self._config
        ids = arrays["input_ids"]
        noise, count = spans(config)
        left, noisy = _draw(config.data.seed, samples, ids.shape[1], 2)
        sentinels = config.model.vocab_size - 1 - np.arange(count + 1)
        sources = []
        targets = []
        for row, tokens in enumerate(ids):
            kept = _parts(left[row], len(tokens) - noise, count)
            cut = _parts(noisy[row], noise, count)
            bounds = np.cumsum(np.stack((kept, cut), axis=1).reshape(-1))
            pieces = np.split(tokens, bounds[:-1])
            source = list[Ints]()
            target = list[Ints]()
            for number in range(count):
                sentinel = sentinels[number : number + 1]
                source += [pieces[2 * number], sentinel]
                target += [sentinel, pieces[2 * number + 1]]
            sources.append(np.concatenate(source))
            targets.append(np.concatenate([*target, sentinels[count:]]))
        return shifted(np.stack(sources), np.stack(targets), config.model.decoder_start_token_id)


def shifted(sources: Ints, targets: Ints, start: int) -> Arrays:
    """Return the inputs of two stacks: a text to read, and one to write after `start`."""
    before = np.full((len(targets), 1), start, np.int64)
    return {
        "input_ids": sources,
        "decoder_input_ids": np.concatenate((before, targets[:, :-1]), axis=1),
        "labels": targets,
        "loss_mask": np.ones(targets.shape, np.bool_),
    }


def _parts(chances: npt.NDArray[np.float64], total: int, count: int) -> Ints:
    """Divide `total` into `count` parts of at least one; all divisions are equally likely."""
    cuts = np.sort(np.argsort(chances[: total - 1], kind="stable")[: count - 1]) + 1
    return np.diff(cuts, prepend=0, append=total)


def _draw(seed: int, samples: Ints, length: int, times: int) -> list[npt.NDArray[np.float64]]:
    """Return numbers in [0, 1): [B, length] at each call."""
    keys = derive_key(seed, np.full_like(samples, -1), samples)
    return [uniform(keys, length, stream) for stream in range(times)]
