"""Training of a lossless SentencePiece tokenizer (`train-tokenizer`)."""

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

# Size of the training sample. SentencePiece trains BPE on this sample in about 20 s and 1 GB.
SAMPLE_CHARACTERS = 100_000_000
# Maximum length of a chunk, which the trainer treats as one sentence. From chunks of several lines,
# the trainer learns newlines and indentation. It fails on 65,536 characters without a space.
_CHUNK_CHARACTERS = 16_384
_SEED = 1234
_FIXED_PIECES = 260  # in every model: 256 bytes, 3 control tokens and a space


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
    """Train on a sample of the input and write `tokenizer.model` to a new folder.

    Ids: 0 unknown (unused, because unknown characters become bytes), 1 BOS, 2 EOS, no padding.

    Raises:
        CommandError: an input does not exist, or the output already exists.
        DataError: the vocabulary size is too small or too large for the text; a file cannot be
            used; there are too many bad records.
    """
    with staged(options.output) as staging:
        sample = sample_chunks(_documents(options), SAMPLE_CHARACTERS)
        if not sample:
            raise DataError(f"no document in {', '.join(options.inputs)}; add text to an input")
        tokenizer = train_sentencepiece(sample, options.vocab_size, options.type)
        sync_file(staging / tokenizer.save(staging))
    return tokenizer


def sample_chunks(documents: Iterator[str], limit: int) -> list[str]:
    """Return a uniform sample of chunks of the documents, at most `limit` characters, in order.

    Each chunk draws a number from a seeded generator. A chunk stays in the sample while its number
    is below a threshold, which is halved whenever the sample is full. So every run gets the same
    sample, and memory is bounded.
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
    """Yield a document in chunks.

    If possible, a chunk begins with a newline, because the trainer strips newlines at the end of
    chunks.
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


def train_sentencepiece(
    sample: Sequence[str],
    vocab_size: int,
    kind: Literal["bpe", "unigram"] = "bpe",
    option: str = "--vocab-size",
    *,
    allow_fewer: bool = False,
) -> SentencePieceTokenizer:
    """Train a tokenizer on a sample of texts.

    Args:
        option: name of the vocabulary size for messages: an option or a key.
        allow_fewer: if true, train a smaller vocabulary if the texts yield fewer pieces.
    Raises:
        DataError: the vocabulary size is too small or too large for the texts.
    """
    size = sum(map(len, sample)) / 1e6
    logger.info(
        "training a tokenizer of %s pieces (%s) on %.1f M characters", f"{vocab_size:,}", kind, size
    )
    setting = f"{option} {vocab_size}"
    try:
        model = _train(sample, vocab_size, kind, setting)
    except _TooFewPieces as error:
        if not allow_fewer:
            raise
        logger.info(
            "the text yields only %d pieces; training a tokenizer of this size", error.available
        )
        model = _train(sample, error.available, kind, setting)
    tokenizer = SentencePieceTokenizer(model)
    check_round_trip(tokenizer)
    return tokenizer


class _TooFewPieces(DataError):
    """Error for a text that yields fewer pieces than requested.

    Attributes:
        available: the number of pieces that the text yields.
    """

    def __init__(self, setting: str, available: int) -> None:
        self.available = available
        super().__init__(
            f"{setting}: this text yields at most {available} pieces; add text, or lower the "
            "vocabulary size"
        )


def _train(sample: Sequence[str], vocab_size: int, kind: str, setting: str) -> bytes:
    import sentencepiece

    if vocab_size < _FIXED_PIECES:
        raise DataError(
            f"{setting}: the 256 bytes, 3 control tokens and a space take {_FIXED_PIECES} pieces "
            "already; raise the vocabulary size"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=kind,
            # No character of the text is changed, dropped or added.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            byte_fallback=True,
            # SentencePiece's symbol of a space. Without this option, a model of text without spaces
            # would encode a space as the bytes of this symbol.
            required_chars="\u2581",
            split_digits=True,
            max_sentence_length=4 * _CHUNK_CHARACTERS,  # bytes; the trainer omits longer chunks
            # The unigram trainer sums floats by thread, so another number of threads would give
            # another model.
            num_threads=8,
            minloglevel=2,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
        )
    except RuntimeError as error:
        raise _training_error(str(error), setting) from error
    return model.getvalue()


def _training_error(message: str, setting: str) -> DataError:
    """Return the error for a message of SentencePiece's trainer."""
    if match := re.search(r"size too high .* value <= (\d+)", message):
        return _TooFewPieces(setting, int(match[1]))
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return DataError(
            f"{setting}: the 256 bytes, 3 control tokens and the characters of this text take "
            f"{match[1]} pieces already; raise the vocabulary size"
        )
    return DataError(f"SentencePiece cannot train on this text; change the input: {message}")
