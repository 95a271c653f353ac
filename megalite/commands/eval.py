"""Evaluate a trained model on shards, on lm-eval tasks, or on labelled examples."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megalite import env, hub
from megalite.cli import CommandParser, add_ranks, command_parser
from megalite.errors import CommandError
from megalite.log import logger, write_report
from megalite.workflows import measure

_EXAMPLES = """examples:
  megalite eval runs/smoke
  megalite eval runs/smoke --data data/smoke/valid --json
  torchrun --nproc-per-node 4 --no-python megalite eval runs/1b --tensor 2 --tasks piqa
  megalite eval runs/imdb --data new.csv --predictions labels.jsonl

For a masked language model, the report includes the accuracy on the masked tokens. Ranks split the
data, and with --tensor also the model. --tasks needs lm-eval: pip install megalite[eval].
"""


def make_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = command_parser(__doc__, _EXAMPLES, first="--checkpoint")
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="step folder, run folder, Hugging Face model folder, or model of the hub (ORG/NAME, "
        "ORG/NAME@REVISION)",
    )
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="shard folder, or labelled examples for a fine-tuned model (default: held-out data of "
        "the model's run)",
    )
    parser.add_argument(
        "--predictions",
        type=Path,
        metavar="FILE",
        help="write a classifier's predictions, one JSON line per example; the examples need no "
        "labels",
    )
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="names of lm-eval tasks")
    parser.add_argument(
        "--task-path", metavar="DIR", help="folder with your own task files in lm-eval's format"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="examples to evaluate per task (default: all)"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="B",
        help="samples per batch (default: the run's micro-batch size; 8 without a run)",
    )
    parser.add_argument(
        "--tensor",
        type=int,
        default=1,
        metavar="N",
        help="ranks that share one model by tensor parallelism (default: 1)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of a table"
    )
    add_ranks(parser, "one per visible GPU, or one on a CPU")
    return parser


def check(arguments: argparse.Namespace) -> None:
    """Refuse options that contradict each other, before anything is loaded."""
    for name in ("limit", "batch_size", "tensor"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise CommandError(f"--{name.replace('_', '-')} {value}: give 1 or more")
    if arguments.tasks and arguments.predictions:
        raise CommandError(
            "--predictions needs a classifier, and --tasks a decoder; remove one of them"
        )
    if not arguments.tasks and (arguments.limit or arguments.task_path):
        raise CommandError(
            "--limit and --task-path only apply to --tasks; add --tasks, or remove them"
        )


def main() -> None:
    arguments = make_parser().parse_args()
    launch = env.find_launch()
    check(arguments)
    checkpoint = hub.find_model(arguments.checkpoint, "--checkpoint")  # before torch is imported
    logger.info("load PyTorch and %s", checkpoint)
    from megalite.evaluate import harness, open_model, table
    from megalite.parallel import start

    if arguments.tasks:
        harness.require()
    grid = start(launch, tensor=arguments.tensor)
    loaded = open_model(checkpoint, grid)
    size = arguments.batch_size or loaded.micro_batch_size
    result: dict[str, Any] = dict.fromkeys(("loss", "perplexity", "bits_per_byte", "tokens"))
    if loaded.is_finetuned or arguments.data or not arguments.tasks:
        result |= measure(
            loaded,
            grid,
            data=arguments.data,
            micro_batch_size=size,
            predictions=arguments.predictions,
        )
    result["tasks"] = None
    if arguments.tasks:
        result["tasks"] = harness.run(
            loaded,
            grid,
            arguments.tasks,
            path=arguments.task_path,
            limit=arguments.limit,
            batch_size=size,
        )
    if launch.rank == 0:
        report = result if arguments.json else table.table(result)
        write_report(report, as_json=arguments.json)
