"""Pretrain a model from a run file, alone or under deepspeed, torchrun, srun or mpirun."""

from __future__ import annotations

from megalite.cli import CommandParser, run_parser
from megalite.commands.training import start_run
from megalite.workflows import pretraining_options

_EXAMPLES = """examples:
  megalite pretrain configs/smoke.json
  deepspeed --num_gpus 8 --no_python megalite pretrain configs/1b.json
  torchrun --nproc-per-node 8 --no-python megalite pretrain configs/1b.json
  srun --ntasks-per-node 8 megalite pretrain configs/7b.json
  mpirun -n 8 megalite pretrain configs/1b.json
  megalite pretrain configs/smoke.json --set training.steps=20 --set name=try

To continue a stopped run, start the same command again. Exit codes: 0 done, 2 user error (nothing
was written), 75 stopped and resumable, 3 superseded by a newer start, 1 anything else.
"""


def make_parser() -> CommandParser:
    """Return the parser of the command line."""
    return run_parser(__doc__, _EXAMPLES)


def main() -> int:
    return start_run(make_parser().parse_args(), pretraining_options)
