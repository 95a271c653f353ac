"""Measure a trained model: on shards, on tasks of lm-eval, and on examples of a fine-tuned one."""

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

Of a model of masked tokens also the share of them that it names right. Ranks share the model
(--tensor) and what is measured (pip install megalite[eval] for --tasks).
"""


def make_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = command_parser(__doc__, _EXAMPLES, first="--checkpoint")
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="a step folder, a run folder, a model folder of Hugging Face's, or a model of the hub "
        "(ORG/NAME, ORG/NAME@REVISION)",
    )
    parser.add_argument(
        "--data", metavar="PATH", help="shards, or examples of a fine-tuned model (the run's own)"
    )
    parser.add_argument(
        "--predictions",
        type=Path,
        metavar="FILE",
        help="write a classifier's answers, a JSON line an example, which needs no label then",
    )
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="of lm-eval, by name")
    parser.add_argument(
        "--task-path", metavar="DIR", help="a folder with tasks of your own, as lm-eval writes them"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="examples of each task (all)")
    parser.add_argument("--batch-size", type=int, metavar="B", help="default: the run's, or 8")
    parser.add_argument(
        "--tensor", type=int, default=1, metavar="N", help="ranks that share a model"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    add_ranks(parser, "one per visible GPU, or one on a CPU")
    return parser


def check(arguments: argparse.Namespace) -> None:
    """Refuse options that contradict each other, before anything is loaded."""
    for name in ("limit", "batch_size", "tensor"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise CommandError(f"--{name.replace('_', '-')} {value}: give 1 or more")
    if arguments.tasks and arguments.predictions:
        raise CommandError("--predictions are a classifier's, whom no --tasks asks: leave one out")
    if not arguments.tasks and (arguments.limit or arguments.task_path):
        raise CommandError("--limit and --task-path are of --tasks; name some, or remove them")


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
    opened = open_model(checkpoint, grid)
    size = arguments.batch_size or opened.micro_batch_size
    result: dict[str, Any] = dict.fromkeys(("loss", "perplexity", "bits_per_byte", "tokens"))
    if opened.is_finetuned or arguments.data or not arguments.tasks:
        result |= measure(
            opened,
            grid,
            data=arguments.data,
            micro_batch_size=size,
            predictions=arguments.predictions,
        )
    result["tasks"] = None
    if arguments.tasks:
        result["tasks"] = harness.run(
            opened,
            grid,
            arguments.tasks,
            path=arguments.task_path,
            limit=arguments.limit,
            batch_size=size,
        )
    if launch.rank == 0:
        report = result if arguments.json else table.table(result)
        write_report(report, as_json=arguments.json)
