"""Turn a corpus into shards of tokens that `megalite pretrain` reads.

  megalite data train-tokenizer --input "corpus/*.jsonl" --vocab-size 32000 --output data/tok
  megalite data tokenize --input "corpus/*.jsonl" --tokenizer data/tok --output data/train
  megalite data verify data/train
  megalite data inspect data/train --document 0
"""  # fmt: skip

# Arguments only: each command's module is imported when it runs. The --help of a command is
# its function's docstring.

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
inputs, each by its name:
  corpus.jsonl notes.txt.gz     JSON lines (.jsonl .ndjson .json), Parquet (.parquet), and anything
                                else as one document of UTF-8 text; .gz .bz2 .xz .zst are unpacked
  "web/**/*.parquet"            a glob, quoted or expanded by the shell
  src/                          every file below a folder, but for names that begin with a dot
  saved/                        a data set written by `save_to_disk`
  hf:stanfordnlp/imdb:train     a data set of the Hugging Face hub; hf:NAME@CONFIG:SPLIT

A record without the field, cut JSON, bad UTF-8, a NUL or an empty document is a bad record: named,
counted, and omitted if --max-bad-records allows it. DIR appears when everything succeeded.
"""


def main(arguments: Sequence[str] | None = None, *, program: str = "python -m data_prep") -> int:
    """Run one command and return its exit code.

    Args:
        program: the name that the help shows.
    """
    given = vars(make_parser(program).parse_args(arguments))
    run: Callable[..., int] = given.pop("run")
    return run(**given)


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

    _add_training(command("train-tokenizer", "learn a vocabulary", _train_tokenizer))
    _add_encoding(command("tokenize", "encode documents into shards", _tokenize))
    check = command("verify", "find out whether shards are as written", _verify)
    check.add_argument("folder", type=Path, metavar="DIR", help="a folder that tokenize wrote")
    add = command("inspect", "show what a shard folder holds", _inspect).add_argument
    add("folder", type=Path, metavar="DIR", help="a folder that tokenize wrote")
    add("--picture", type=Path, metavar="FILE.svg", help="also draw the lengths of documents")
    add("--document", type=_at_least(0), metavar="N", help="the text of a document, from 0")
    return parser


def _add_training(parser: argparse.ArgumentParser) -> None:
    _add_inputs(parser)
    parser.add_argument(
        "--vocab-size",
        type=_at_least(1),
        required=True,
        metavar="N",
        help="pieces of the vocabulary, the 256 bytes among them",
    )
    parser.add_argument(
        "--type", choices=["bpe", "unigram"], default="bpe", help="of SentencePiece; default: bpe"
    )


def _add_encoding(parser: argparse.ArgumentParser) -> None:
    _add_inputs(parser)
    add = parser.add_argument
    add(
        "--tokenizer",
        required=True,
        metavar="PATH|bytes",
        help="a .model file, a tokenizer.json, a folder with one of them, a model of the hub "
        "(ORG/NAME), or bytes",
    )
    add(
        "--shard-tokens",
        type=_at_least(1),
        default=100_000_000,
        metavar="N",
        help="most tokens in a shard; default: 100000000, 200 MB as uint16",
    )
    add(
        "--workers",
        type=_at_least(1),
        metavar="N",
        help="processes; default: the cores at hand, or 1 a rank under mpirun and srun",
    )
    add(
        "--valid-fraction",
        type=float,
        metavar="F",
        help="hold out this share of the documents, by a hash of each one's text; above 0, below 1",
    )
    add("--valid-output", type=Path, metavar="DIR", help="a new folder for what is held out")
    add("--deduplicate", action="store_true", help="omit documents that came before")
    add(
        "--no-streaming",
        dest="streaming",
        action="store_false",
        help="download hub data sets whole before they are read",
    )
    take = "take a tokenizer that does not give back every text"
    add("--lossy", action="store_true", help=take)
    add(
        "--bos",
        action=argparse.BooleanOptionalAction,
        help="begin each document with BOS (default: if the tokenizer begins its texts with it)",
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
        help="one or more, as described above",
    )
    add("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    add("--text-field", default="text", metavar="NAME", help="of JSON and tables; default: text")
    add(
        "--max-bad-records",
        type=_at_least(0),
        default=0,
        metavar="N",
        help="bad records that are omitted before the command stops; default: 0",
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


def _train_tokenizer(**given: Any) -> int:
    """Train a SentencePiece model that loses nothing: runs of spaces, newlines and bytes never seen
    come back as they were. Larger corpora are sampled, the same way in every run.

      megalite data train-tokenizer --input "src/**/*.py" --vocab-size 8000 --output data/tok
      megalite data train-tokenizer --input c4.jsonl.gz wiki.parquet --vocab-size 32000 \\
          --output data/tok --type unigram
    """
    from data_prep.train import TrainOptions, train_tokenizer

    tokenizer = train_tokenizer(TrainOptions(**given))
    write_report(f"{given['output']}: a tokenizer of {tokenizer.vocab_size:,} pieces\n")
    return 0


def _tokenize(**given: Any) -> int:
    """Encode documents into DIR: shard_00000.bin and .idx (Megatron-LM's format), tokenizer/ and
    manifest.json. Each document ends with EOS. The shards do not depend on workers or ranks, and
    the same command goes on where a killed one stopped.

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
    given["workers"] = given["workers"] or (_cores() if ranks == 1 else 1)
    manifest = tokenize(TokenizeOptions(**given))
    if rank:
        return 0  # rank 0 speaks for all
    manifests = {given["output"]: manifest}
    if given["valid_output"] is not None:
        manifests[given["valid_output"]] = load_manifest(given["valid_output"])
    total = sum(one.tokens for one in manifests.values())
    for folder, one in manifests.items():
        share = f", {one.tokens / total:.2%} of all" if len(manifests) > 1 else ""
        write_report(f"{folder}: {one.counts()}{share}\n")
    return 0


def _verify(folder: Path) -> int:
    """Compare every byte of a shard folder with its manifest: sizes, structure, SHA-256, ids,
    counts. The exit code is 1 if something is wrong, which is named, else 0.

      megalite data verify data/train
    """
    from data_prep.report import verify

    return verify(folder)


def _inspect(folder: Path, document: int | None, picture: Path | None) -> int:
    """
    Show what a shard folder holds, or one document of it as text.

      megalite data inspect data/train
      megalite data inspect data/train --document 17
    """  # fmt: skip
    from data_prep.report import inspect

    return inspect(folder, document, picture)


if __name__ == "__main__":
    run_main(main, find_rank=lambda: env.find_rank_and_size()[0])
