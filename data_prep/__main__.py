"""`python -m data_prep COMMAND`: arguments only. Each command's module is imported when it runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megalite import env
from megalite.log import run_main

_ABOUT = """\
Turn a corpus into shards of tokens that launcher/pretrain.py reads.

  python -m data_prep train-tokenizer --input "corpus/*.jsonl" --vocab-size 32000 --output data/tok
  python -m data_prep tokenize --input "corpus/*.jsonl" --tokenizer data/tok --output data/train
  python -m data_prep verify data/train
  python -m data_prep inspect data/train --document 0
"""

_INPUTS = """\
inputs, each by its name:
  corpus.jsonl notes.txt.gz     JSON lines (.jsonl .ndjson .json), Parquet (.parquet), and anything
                                else as one document of UTF-8 text; .gz .bz2 .xz .zst are unpacked
  "web/**/*.parquet"            a glob, quoted or expanded by the shell
  src/                          every file below a folder, but for names that begin with a dot
  saved/                        a data set written by `save_to_disk`
  hf:stanfordnlp/imdb:train     a data set of the Hugging Face hub; hf:NAME@CONFIG:SPLIT

A record without the field, cut JSON, bad UTF-8, a NUL or an empty document is a bad record: named,
counted, and left out if --max-bad-records allows it. DIR appears when everything succeeded.
"""

_TRAIN = (
    """\
Train a SentencePiece model that loses nothing: runs of spaces, newlines and bytes never seen come
back as they were. Larger corpora are sampled, alike in every run.

  python -m data_prep train-tokenizer --input "src/**/*.py" --vocab-size 8000 --output data/tok
  python -m data_prep train-tokenizer --input c4.jsonl.gz wiki.parquet --vocab-size 32000 \\
      --output data/tok --type unigram

"""
    + _INPUTS
)

_TOKENIZE = (
    """\
Encode documents into DIR: shard_00000.bin and .idx (Megatron-LM's format), tokenizer/ and
manifest.json. Each document ends with EOS. The shards do not depend on workers or ranks, and the
same command goes on where a killed one stopped.

  python -m data_prep tokenize --input "corpus/*.jsonl" --tokenizer data/tok --output data/train
  python -m data_prep tokenize --input books/ --tokenizer bytes --output data/books --workers 8
  python -m data_prep tokenize --input hf:stanfordnlp/imdb:train --tokenizer data/tok \\
      --output data/imdb --max-bad-records 10
  mpirun -n 64 python -m data_prep tokenize --input "web/*.jsonl.zst" --tokenizer data/tok \\
      --output data/web --deduplicate

"""
    + _INPUTS
)

_VERIFY = """\
Compare every byte of a shard folder with its manifest: sizes, structure, SHA-256, ids, counts.
Names what is wrong and leaves with 1; with 0 where nothing is.

  python -m data_prep verify data/train
"""

_INSPECT = """\
Show what a shard folder holds, or one document of it as text.

  python -m data_prep inspect data/train
  python -m data_prep inspect data/train --document 17
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    chosen = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = chosen.run
    return run(chosen)


def _parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m data_prep", None, _ABOUT, formatter_class=plain)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(
        name: str, line: str, about: str, run: Callable[[argparse.Namespace], int]
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=line, description=about, formatter_class=plain)
        made.set_defaults(run=run)
        return made

    _add_training(command("train-tokenizer", "learn a vocabulary", _TRAIN, _train_tokenizer))
    _add_encoding(command("tokenize", "encode documents into shards", _TOKENIZE, _tokenize))
    check = command("verify", "find out whether shards are as written", _VERIFY, _verify)
    check.add_argument("folder", type=Path, metavar="DIR")
    show = command("inspect", "show what a shard folder holds", _INSPECT, _inspect)
    show.add_argument("folder", type=Path, metavar="DIR")
    show.add_argument(
        "--picture", type=Path, metavar="FILE.svg", help="also draw the lengths of documents"
    )
    show.add_argument(
        "--document", type=_at_least(0), metavar="N", help="the text of a document, from 0"
    )
    return parser


def _add_training(parser: argparse.ArgumentParser) -> None:
    _add_inputs(parser)
    parser.add_argument("--vocab-size", type=_at_least(1), required=True, metavar="N")
    parser.add_argument("--type", choices=["bpe", "unigram"], default="bpe", help="default: bpe")


def _add_encoding(parser: argparse.ArgumentParser) -> None:
    _add_inputs(parser)
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="PATH|bytes",
        help="a .model file, a tokenizer.json, a folder with one of them, or bytes",
    )
    parser.add_argument(
        "--shard-tokens",
        type=_at_least(1),
        default=100_000_000,
        metavar="N",
        help="most tokens in a shard; default: 100000000, 200 MB as uint16",
    )
    parser.add_argument(
        "--workers",
        type=_at_least(1),
        metavar="N",
        help="processes; default: the cores at hand, or 1 a rank under mpirun and srun",
    )
    parser.add_argument(
        "--deduplicate", action="store_true", help="leave out documents that came before"
    )
    parser.add_argument(
        "--no-streaming",
        dest="streaming",
        action="store_false",
        help="download hub data sets whole before they are read",
    )
    parser.add_argument(
        "--lossy", action="store_true", help="take a tokenizer that does not give back every text"
    )
    parser.add_argument("--bos", action="store_true", help="begin each document with BOS")
    parser.add_argument(
        "--no-eos", dest="eos", action="store_false", help="do not end each document with EOS"
    )


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", nargs="+", action="extend", required=True, metavar="INPUT")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--text-field", default="text", metavar="NAME", help="of JSON and tables; default: text"
    )
    parser.add_argument(
        "--max-bad-records", type=_at_least(0), default=0, metavar="N", help="default: 0"
    )


def _at_least(lowest: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"{value} is below {lowest}")
        return value

    return number


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _train_tokenizer(chosen: argparse.Namespace) -> int:
    from data_prep.train import TrainOptions, train_tokenizer

    options = TrainOptions(
        inputs=chosen.input,
        vocab_size=chosen.vocab_size,
        output=chosen.output,
        type=chosen.type,
        text_field=chosen.text_field,
        max_bad_records=chosen.max_bad_records,
    )
    tokenizer = train_tokenizer(options)
    sys.stdout.write(f"{chosen.output}: a tokenizer of {tokenizer.vocab_size:,} pieces\n")
    return 0


def _tokenize(chosen: argparse.Namespace) -> int:
    from data_prep.encode import TokenizeOptions, tokenize

    options = TokenizeOptions(
        inputs=chosen.input,
        tokenizer=chosen.tokenizer,
        output=chosen.output,
        text_field=chosen.text_field,
        shard_tokens=chosen.shard_tokens,
        workers=chosen.workers or (_cores() if env.find_place()[1] == 1 else 1),
        max_bad_records=chosen.max_bad_records,
        bos=chosen.bos,
        eos=chosen.eos,
        deduplicate=chosen.deduplicate,
        streaming=chosen.streaming,
        lossy=chosen.lossy,
    )
    manifest = tokenize(options)
    if env.find_place()[0]:
        return 0  # rank 0 speaks for all
    sys.stdout.write(
        f"{chosen.output}: {len(manifest.shards)} shards, {manifest.documents:,} documents, "
        f"{manifest.tokens:,} tokens\n"
    )
    return 0


def _verify(chosen: argparse.Namespace) -> int:
    from data_prep.report import verify

    return verify(chosen.folder)


def _inspect(chosen: argparse.Namespace) -> int:
    from data_prep.report import inspect

    return inspect(chosen.folder, chosen.document, chosen.picture)


if __name__ == "__main__":
    run_main(main, find_rank=lambda: env.find_place()[0])
