"""Tokenize a corpus into shards that `megalite pretrain` reads.

  megalite data train-tokenizer --input "corpus/*.jsonl" --vocab-size 32000 --output data/tok
  megalite data tokenize --input "corpus/*.jsonl" --tokenizer data/tok --output data/train
  megalite data verify data/train
  megalite data inspect data/train --document 0
"""  # fmt: skip

# This module only parses arguments. A command's module is imported when the command runs. The
# docstring of its function is the text of its --help.

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from inspect import cleandoc
from pathlib import Path
from typing import Any

from megalite import env
from megalite.cli import CommandParser, run_main
from megalite.log import write_report

_INPUTS = """\
kinds of INPUT:
  corpus.jsonl notes.txt.gz     JSON lines (.jsonl .ndjson .json), Parquet (.parquet), else one
                                document of UTF-8 text; .gz .bz2 .xz .zst are decompressed
  "web/**/*.parquet"            a glob, quoted or expanded by the shell
  src/                          all files below a folder, except names that begin with a dot
  saved/                        a data set that `save_to_disk` has written
  hf:stanfordnlp/imdb:train     a data set of the Hugging Face hub; hf:NAME@CONFIG:SPLIT

A bad record lacks the text field, is truncated JSON or invalid UTF-8, contains a NUL, or is empty.
Bad records are reported, counted and skipped. If there are more than --max-bad-records, the command
stops. DIR appears only after everything has succeeded.
"""


def main(arguments: Sequence[str] | None = None, *, program: str = "python -m data_prep") -> int:
    """Run one command and return its exit code.

    Args:
        program: name of the program in the help.
    """
    options = vars(make_parser(program).parse_args(arguments))
    run: Callable[..., int] = options.pop("run")
    return run(**options)


def make_parser(program: str) -> CommandParser:
    """Return the parser of all commands."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = CommandParser(program, None, __doc__, formatter_class=plain)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, line: str, run: Callable[..., int]) -> argparse.ArgumentParser:
        about = cleandoc(run.__doc__ or "")
        subparser = commands.add_parser(name, help=line, description=about, formatter_class=plain)
        subparser.set_defaults(run=run)
        return subparser

    _add_training(command("train-tokenizer", "train a tokenizer", _train_tokenizer))
    _add_encoding(command("tokenize", "encode documents into shards", _tokenize))
    check = command("verify", "check shards against their manifest", _verify)
    check.add_argument("folder", type=Path, metavar="DIR", help="shard folder, written by tokenize")
    add = command("inspect", "show the contents of a shard folder", _inspect).add_argument
    add("folder", type=Path, metavar="DIR", help="shard folder, written by tokenize")
    add(
        "--picture",
        type=Path,
        metavar="FILE.svg",
        help="also draw a histogram of the document lengths",
    )
    add(
        "--document",
        type=_at_least(0),
        metavar="N",
        help="print the text of document N, counted from 0",
    )
    return parser


def _add_training(parser: argparse.ArgumentParser) -> None:
    _add_inputs(parser)
    parser.add_argument(
        "--vocab-size",
        type=_at_least(1),
        required=True,
        metavar="N",
        help="vocabulary size, including the 256 bytes",
    )
    parser.add_argument(
        "--type",
        choices=["bpe", "unigram"],
        default="bpe",
        help="SentencePiece model type (default: bpe)",
    )


def _add_encoding(parser: argparse.ArgumentParser) -> None:
    _add_inputs(parser)
    add = parser.add_argument
    add(
        "--tokenizer",
        required=True,
        metavar="PATH|bytes",
        help="SentencePiece .model file, tokenizer.json, folder with one of them, model of the hub "
        "(ORG/NAME), or the word bytes",
    )
    add(
        "--shard-tokens",
        type=_at_least(1),
        default=100_000_000,
        metavar="N",
        help="maximum tokens per shard (default: 100000000, which is 200 MB as uint16)",
    )
    add(
        "--workers",
        type=_at_least(1),
        metavar="N",
        help="number of processes (default: the available cores; 1 per rank under mpirun and srun)",
    )
    add(
        "--valid-fraction",
        type=float,
        metavar="F",
        help="fraction of the documents to hold out, selected by a hash of their text; above 0, "
        "below 1",
    )
    add("--valid-output", type=Path, metavar="DIR", help="new folder for the held-out documents")
    add("--deduplicate", action="store_true", help="skip documents that repeat an earlier text")
    add(
        "--no-streaming",
        dest="streaming",
        action="store_false",
        help="download hub data sets completely before reading them",
    )
    accept = "accept a tokenizer that cannot reproduce every text"
    add("--lossy", action="store_true", help=accept)
    add(
        "--bos",
        action=argparse.BooleanOptionalAction,
        help="begin each document with BOS, or without it (default: as the tokenizer does)",
    )
    add("--no-eos", dest="eos", action="store_false", help="do not end each document with EOS")


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.description = f"{parser.description}\n\n{_INPUTS}"
    add = parser.add_argument
    add(
        "--input",
        dest="inputs",
        nargs="+",
        action="extend",
        required=True,
        metavar="INPUT",
        help="files, folders or data sets; see the kinds of INPUT above",
    )
    add("--output", type=Path, required=True, metavar="DIR", help="new folder to create")
    add(
        "--text-field",
        default="text",
        metavar="NAME",
        help="field or column of the text (default: text)",
    )
    add(
        "--max-bad-records",
        type=_at_least(0),
        default=0,
        metavar="N",
        help="maximum bad records to skip before the command stops (default: 0)",
    )


def _at_least(lowest: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"{value} is below {lowest}")
        return value

    return number


def _cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _train_tokenizer(**options: Any) -> int:
    """Train a lossless SentencePiece tokenizer: decoding restores every text, including spaces,
    newlines and bytes that training never saw. Large corpora are sampled; every run takes the same
    sample.

      megalite data train-tokenizer --input "src/**/*.py" --vocab-size 8000 --output data/tok
      megalite data train-tokenizer --input c4.jsonl.gz wiki.parquet --vocab-size 32000 \\
          --output data/tok --type unigram
    """
    from data_prep.train import TrainOptions, train_tokenizer

    tokenizer = train_tokenizer(TrainOptions(**options))
    write_report(f"{options['output']}: a tokenizer of {tokenizer.vocab_size:,} pieces\n")
    return 0


def _tokenize(**options: Any) -> int:
    """Encode documents into DIR: shard_00000.bin and .idx (Megatron-LM's format), tokenizer/ and
    manifest.json. Each document ends with EOS. The shards do not depend on the number of workers or
    ranks. If the command was killed, start it again, and it continues.

      megalite data tokenize --input "corpus/*.jsonl" --tokenizer data/tok --output data/train
      megalite data tokenize --input books/ --tokenizer bytes --output data/books --workers 8
      megalite data tokenize --input hf:stanfordnlp/imdb:train --tokenizer data/tok \\
          --output data/imdb --max-bad-records 10
      megalite data tokenize --input "corpus/*.jsonl" --tokenizer data/tok \\
          --output data/train --valid-fraction 0.01 --valid-output data/valid
      mpirun -n 64 megalite data tokenize --input "web/*.jsonl.zst" --tokenizer data/tok \\
          --output data/web --deduplicate
    """
    from data_prep.encode import tokenize
    from data_prep.options import TokenizeOptions
    from megalite.formats.manifest import load_manifest

    rank, ranks = env.find_rank_and_size()
    options["workers"] = options["workers"] or (_cores() if ranks == 1 else 1)
    manifest = tokenize(TokenizeOptions(**options))
    if rank:
        return 0  # rank 0 writes the report
    manifests = {options["output"]: manifest}
    if options["valid_output"] is not None:
        manifests[options["valid_output"]] = load_manifest(options["valid_output"])
    total = sum(manifest.tokens for manifest in manifests.values())
    for folder, manifest in manifests.items():
        share = f", {manifest.tokens / total:.2%} of all" if len(manifests) > 1 else ""
        write_report(f"{folder}: {manifest.counts()}{share}\n")
    return 0


def _verify(folder: Path) -> int:
    """Compare every byte of a shard folder with its manifest: sizes, structure, SHA-256, ids and
    counts. Each fault is reported. The exit code is 1 if there is a fault, else 0.

      megalite data verify data/train
    """
    from data_prep.report import verify

    return verify(folder)


def _inspect(folder: Path, document: int | None, picture: Path | None) -> int:
    """
    Show the contents of a shard folder, or one of its documents as text.

      megalite data inspect data/train
      megalite data inspect data/train --document 17
    """  # fmt: skip
    from data_prep.report import inspect

    return inspect(folder, document, picture)


if __name__ == "__main__":
    run_main(main, find_rank=lambda: env.find_rank_and_size()[0])
