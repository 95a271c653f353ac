"""Pretrain a language model from a run file. Started by deepspeed, torchrun, srun,
mpirun or python."""

from __future__ import annotations

from pathlib import Path

from megalite import env
from megalite.cli import refuse_useless, run_main, run_parser
from megalite.config import load_config
from megalite.errors import ConfigError

_EXAMPLES = """examples:
  python launcher/pretrain.py --config configs/smoke.json
  deepspeed --num_gpus 8 launcher/pretrain.py --config configs/1b.json
  torchrun --nproc-per-node 8 launcher/pretrain.py --config configs/1b.json
  srun --ntasks-per-node 8 python launcher/pretrain.py --config configs/7b.json
  mpirun -n 8 python launcher/pretrain.py --config configs/1b.json
  python launcher/pretrain.py --config configs/smoke.json --set training.steps=20 --set name=try

The same command again goes on where the run stopped. Exit codes: 0 done, 2 configuration, data or
command line (nothing was written), 75 stopped and resumable, 3 superseded by a newer start, 1 else.
"""


def main() -> int:
    arguments = run_parser(__doc__, _EXAMPLES).parse_args()
    refuse_useless(arguments)
    if arguments.dry_run is None:
        env.restart_with_heap()
    launch = env.find_launch()
    config = load_config(arguments.config, arguments.set)
    if config.finetune is not None:
        raise ConfigError(
            f"{arguments.config}: it has a finetune section; start launcher/finetune.py with it"
        )
    if arguments.dry_run is not None:
        from megalite.parity.dry_run import report_dry_run

        return report_dry_run(config, launch, arguments.dry_run, arguments.gpu)
    from megalite.formats.start import find_start

    root = Path(config.logging.directory) / config.name / "checkpoints"
    start = find_start(arguments.init_from, None if arguments.resume == "never" else root)
    from megalite.train import RunOptions, run  # torch: after everything that needs no torch

    options = RunOptions(
        config,
        resume=arguments.resume,
        init_from=start,
        init_name=arguments.init_from,
        allow_change=tuple(arguments.allow_change),
    )
    run(options, launch)
    return 0


if __name__ == "__main__":
    run_main(main, ranks=True)
