"""What the commands that start a run take: launcher/pretrain.py and launcher/finetune.py."""

from __future__ import annotations

import argparse

from megalite.errors import CommandError
from megalite.log import command_parser


def run_parser(about: str | None, examples: str) -> argparse.ArgumentParser:
    """The parser of a command that runs what a run file says."""
    parser = command_parser(about, examples)
    parser.add_argument("--config", required=True, metavar="FILE", help="the run file (JSON)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key, dotted (training.steps=100); may be repeated",
    )
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto: this run's newest whole checkpoint, else a fresh start (default); never: "
        "fresh, an error where checkpoints exist; PATH: a step folder or a run folder of any run",
    )
    parser.add_argument(
        "--init-from",
        metavar="CHECKPOINT",
        help="start a fresh run from the weights of a checkpoint, of a model folder of Hugging "
        "Face's, or of a model of the hub (ORG/NAME, ORG/NAME@REVISION)",
    )
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="resume although model, tokenizer, data, sequence_length or seed changed",
    )
    parser.add_argument(
        "--dry-run",
        type=_ranks,
        nargs="?",
        const=0,
        metavar="RANKS",
        help="rehearse a step's shapes and messages on so many ranks (default: those started), "
        "here and now; train nothing",
    )
    parser.add_argument(
        "--gpu",
        metavar="NAME|FILE",
        help="device to rehearse with --dry-run: a name that plan.py knows, cpu, or a JSON file "
        "(default: this host's if no RANKS are given, else GPUs)",
    )
    # the deepspeed launcher appends it; the environment says the same
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser


def refuse_useless(arguments: argparse.Namespace) -> None:
    """Refuse options that would be ignored.

    Raises:
        CommandError: --gpu without --dry-run.
    """
    if arguments.gpu is not None and arguments.dry_run is None:
        raise CommandError("--gpu is an option of --dry-run: add that, or remove --gpu")


def _ranks(text: str) -> int:
    """How many ranks to rehearse; 0 is left to an option without a number."""
    if text.isascii() and text.isdigit() and 1 <= len(text) <= 9 and int(text) >= 1:
        return int(text)
    raise argparse.ArgumentTypeError(f"ranks, at least 1, not {text!r}")
