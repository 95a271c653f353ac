"""Fine-tune a model on labelled data. Started by deepspeed, torchrun, srun or python."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from megalite import env
from megalite.config import find_run, load_config
from megalite.errors import CommandError, ConfigError
from megalite.log import command_parser, run_main

_EXAMPLES = """examples:
  python launcher/finetune.py --config configs/finetune/reuters.json
  python launcher/finetune.py --config configs/finetune/lora.json --init-from runs/1b
  deepspeed --num_gpus 8 launcher/finetune.py --config configs/finetune/sft.json --init-from HF
  python launcher/finetune.py --config mine.json --set finetune.data.path=reviews.csv

Without a model section in the run file the model is that of --init-from. The same command again
goes on where the run stopped. Exit codes: as launcher/pretrain.py.
"""


def parse() -> argparse.Namespace:
    parser = command_parser(__doc__, _EXAMPLES)
    parser.add_argument("--config", required=True, metavar="FILE", help="the run file (JSON)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key, dotted (finetune.epochs=5); may be repeated",
    )
    parser.add_argument(
        "--init-from",
        metavar="CHECKPOINT",
        help="start from the weights of a checkpoint, or of a model folder of Hugging Face's "
        "(default: from scratch)",
    )
    parser.add_argument(
        "--resume", default="auto", metavar="auto|never|PATH", help="as launcher/pretrain.py"
    )
    parser.add_argument(
        "--allow-change", action="append", default=[], metavar="KEY", help="as launcher/pretrain.py"
    )
    parser.add_argument(
        "--dry-run",
        type=int,
        nargs="?",
        const=0,
        metavar="RANKS",
        help="rehearse a step's shapes and messages on so many ranks, here and now; train nothing",
    )
    # the deepspeed launcher appends it; the environment says the same
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    launch = env.find_launch()
    from megalite.checkpoint import describe_run, describe_start

    own = find_run(arguments.config, arguments.set)
    known = describe_run(own) if own is not None and arguments.resume != "never" else None
    if known is None and arguments.init_from is not None:
        if not Path(arguments.init_from).is_dir():
            raise CommandError(f"--init-from {arguments.init_from!r}: no such folder")
        known = describe_start(Path(arguments.init_from))
    model, tokenizer = known or (None, None)
    config = load_config(arguments.config, arguments.set, model=model)
    if config.finetune is None:
        raise ConfigError(
            f"{arguments.config}: no finetune section; write one (configs/finetune has examples), "
            "or start launcher/pretrain.py"
        )
    if arguments.dry_run is not None:
        from megalite.train.rehearsal import dry_run

        return dry_run(config, launch, arguments.dry_run)
    from data_prep.chat import ask
    from data_prep.examples import prepare
    from megalite.train import Request, run

    request = Request(
        config,
        resume=arguments.resume,
        init_from=arguments.init_from,
        allow_change=tuple(arguments.allow_change),
        prepare=partial(prepare, tokenizer=tokenizer),
        ask=ask,
    )
    run(request, launch)
    return 0


if __name__ == "__main__":
    run_main(main, ranks=True)
