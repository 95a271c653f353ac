"""Fine-tune a model on labelled data. Started by deepspeed, torchrun, srun,
mpirun or python."""

from __future__ import annotations

from megalite.cli import run_main, run_parser
from megalite.workflows import finetuning_options, start_run

_EXAMPLES = """examples:
  python launcher/finetune.py --config configs/finetune/reuters.json
  python launcher/finetune.py --config configs/finetune/lora.json --init-from runs/1b
  deepspeed --num_gpus 8 launcher/finetune.py --config configs/finetune/sft.json --init-from HF
  python launcher/finetune.py --config mine.json --set finetune.data.path=reviews.csv

Without a model section in the run file the model is that of --init-from. The same command again
goes on where the run stopped. Exit codes: as launcher/pretrain.py.
"""


def main() -> int:
    arguments = run_parser(__doc__, _EXAMPLES).parse_args()
    return start_run(arguments, finetuning_options)


if __name__ == "__main__":
    run_main(main, ranks=True)
