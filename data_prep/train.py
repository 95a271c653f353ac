"""`train-tokenizer`: a SentencePiece model that gives back every character it is fed."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_prep.inputs import find_streams
from data_prep.output import staged
from data_prep.part_reader import read_streams
from data_prep.records import BadRecord, BadRecordCounter
from megalite.errors import DataError
from megalite.files import sync_file
from megalite.log import logger
from megalite.tokenizers.tokenizer import SentencePieceTokenizer, Tokenizer, check_round_trip

# SentencePiece sees at most this much of the text: BPE learns it in some 20 s and 1 GB.
SAMPLE_CHARACTERS = 100_000_000
# A piece of a document that the trainer takes as one sentence. Documents are fed whole up to here
# so that newlines and indentation are learnt; above 65,535 characters without a space it fails.
_CHUNK_CHARACTERS = 16_384
_SEED = 1234
_TAKEN = 260  # pieces of every model


@dataclass(frozen=True)
class TrainOptions:
    """The arguments of `train-tokenizer`."""

    inputs: Sequence[str]
    vocab_size: int
    output: Path
    type: Literal["bpe", "unigram"] = "bpe"
    text_field: str = "text"
    max_bad_records: int = 0


def train_tokenizer(options: TrainOptions) -> Tokenizer:
    """Train on a sample of the input and write `tokenizer.model` into a new folder.

    Ids: 0 unknown (never met, since unseen characters become bytes), 1 BOS, 2 EOS, no padding.

    Raises:
        CommandError: an input that names nothing, an output that is taken.
        DataError: a vocabulary that the text cannot fill or that cannot hold its characters; a
            file that cannot be used; too many bad records.
    """
    with staged(options.output) as staging:
        sample = sample_chunks(_documents(options), SAMPLE_CHARACTERS)
        if not sample:
            raise DataError(f"no document in {', '.join(options.inputs)}; nothing was written")
        tokenizer = learn_tokenizer(sample, options.vocab_size, options.type)
        sync_file(staging / tokenizer.save(staging))
    return tokenizer


def sample_chunks(documents: Iterator[str], limit: int) -> list[str]:
    """Return a sample of all text, at most `limit` characters, in the order of the text.

    Each chunk draws a number from a seeded generator and stays while that is below a threshold,
    which is halved whenever the sample is full: uniform, the same in every run, flat in memory.
    """
    draw = random.Random(_SEED)
    threshold = 1.0
    size = 0
    sample: list[tuple[float, str]] = []
    for document in documents:
        for chunk in chunks(document):
            number = draw.random()
            if number >= threshold:
                continue
            sample.append((number, chunk))
            size += len(chunk)
            while size > limit and len(sample) > 1:
                threshold /= 2
                sample = [(number, chunk) for number, chunk in sample if number < threshold]
                size = sum(len(chunk) for _, chunk in sample)
    return [chunk for _, chunk in sample]


def chunks(document: str) -> Iterator[str]:
    """Yield a document in parts that add up to it, cut before newlines if it has any.

    Before, not after: the trainer strips the newlines that end a sentence.
    """
    start = 0
    while len(document) - start > _CHUNK_CHARACTERS:
        stop = start + _CHUNK_CHARACTERS
        cut = document.rfind("\n", start + 1, stop)
        cut = cut if cut > start else document.rfind(" ", start + 1, stop)
        stop = cut if cut > start else stop
        yield document[start:stop]
        start = stop
    yield document[start:]


def _documents(options: TrainOptions) -> Iterator[str]:
    bad = BadRecordCounter(options.max_bad_records)
    for record in read_streams(find_streams(options.inputs), options.text_field):
        if isinstance(record, BadRecord):
            bad.add(record)
        else:
            yield record


def learn_tokenizer(
    sample: Sequence[str],
    vocab_size: int,
    kind: Literal["bpe", "unigram"] = "bpe",
    option: str = "--vocab-size",
    *,
    fewer: bool = False,
) -> SentencePieceTokenizer:
    """Learn from texts, of `sample_chunks`; `option` is what errors call the size.

    Args:
        fewer: whether as many pieces as the texts yield will do.

    Raises:
        DataError: a vocabulary that the texts cannot fill or that cannot hold their characters.
    """
    size = sum(map(len, sample)) / 1e6
    logger.info("learning %s pieces (%s) from %.1f M characters", f"{vocab_size:,}", kind, size)
    asked = f"{option} {vocab_size}"
    try:
        model = _learn(sample, vocab_size, kind, asked)
    except _TooFew as error:
        if not fewer:
            raise
        logger.info("the text yields %d pieces", error.most)
        model = _learn(sample, error.most, kind, asked)
    tokenizer = SentencePieceTokenizer(model)
    check_round_trip(tokenizer)
    return tokenizer


class _TooFew(DataError):
    """A vocabulary that a text cannot fill, and the largest that it can."""

    def __init__(self, asked: str, most: int) -> None:
        self.most = most
        super().__init__(
            f"{asked}: this text yields {most} pieces at most; give more text, or lower "
            "--vocab-size"
        )


def _learn(sample: Sequence[str], vocab_size: int, kind: str, asked: str) -> bytes:
    import sentencepiece

    if vocab_size < _TAKEN:
        raise DataError(
            f"{asked}: the 256 bytes, 3 control tokens and a space take "
            f"{_TAKEN} pieces already; raise --vocab-size"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=kind,
            # nothing of the text is changed, dropped or added
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            byte_fallback=True,
            # a space as the trainer writes it: in text without spaces it would fall to bytes that
            # are not a space's
            required_chars="\u2581",
            split_digits=True,
            max_sentence_length=4 * _CHUNK_CHARACTERS,  # in bytes; longer ones are omitted
            # unigram sums floats thread by thread: another number would give another model
            num_threads=8,
            minloglevel=2,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
        )
    except RuntimeError as error:
        raise _explain(str(error), asked) from error
    return model.getvalue()


def _explain(message: str, asked: str) -> DataError:
    if found := re.search(r"size too high .* value <= (\d+)", message):
        return _TooFew(asked, int(found[1]))
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return DataError(
            f"{asked}: the 256 bytes, 3 control tokens and the characters of this text take "
            f"{found[1]} pieces already; raise --vocab-size"
        )
    return DataError(f"SentencePiece cannot learn from this text: {message}")
