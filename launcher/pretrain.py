"""Pretrain a language model from a run file. Started by deepspeed, torchrun, srun or python."""

from __future__ import annotations

import argparse

from megalite import env
from megalite.config import load_config
from megalite.errors import ConfigError
from megalite.log import command_parser, run_main

_EXAMPLES = """examples:
  python launcher/pretrain.py --config configs/smoke.json
  deepspeed --num_gpus 8 launcher/pretrain.py --config configs/1b.json
  torchrun --nproc-per-node 8 launcher/pretrain.py --config configs/1b.json
  srun --ntasks-per-node 8 python launcher/pretrain.py --config configs/7b.json
  python launcher/pretrain.py --config configs/smoke.json --set training.steps=20 --set name=try

The same command again goes on where the run stopped. Exit codes: 0 done, 2 configuration, data or
command line (nothing was written), 75 stopped and resumable, 3 superseded by a newer start, 1 else.
"""


def parse() -> argparse.Namespace:
    parser = command_parser(__doc__, _EXAMPLES)
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
        help="start a fresh run from the weights of a checkpoint, or of a model folder of Hugging "
        "Face's",
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
    config = load_config(arguments.config, arguments.set)
    if config.finetune is not None:
        raise ConfigError(
            f"{arguments.config}: it has a finetune section; start launcher/finetune.py with it"
        )
    if arguments.dry_run is not None:
        from megalite.train.rehearsal import dry_run

        return dry_run(config, launch, arguments.dry_run)
    from megalite.train import Request, run  # torch: after everything that needs no torch

    request = Request(
        config,
        resume=arguments.resume,
        init_from=arguments.init_from,
        allow_change=tuple(arguments.allow_change),
    )
    run(request, launch)
    return 0


if __name__ == "__main__":
    run_main(main, ranks=True)
