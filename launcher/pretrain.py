"""Pretrain a language model from a run file. Started by deepspeed, torchrun, srun,
mpirun or python."""

from __future__ import annotations

from megalite.cli import run_main, run_parser
from megalite.workflows import pretraining_options, start_run

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
    return start_run(arguments, pretraining_options)


if __name__ == "__main__":
    run_main(main, ranks=True)
