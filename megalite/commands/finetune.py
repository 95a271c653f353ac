"""Fine-tune a model on labelled data, alone or under deepspeed, torchrun, srun or mpirun."""

from __future__ import annotations

from megalite.cli import CommandParser, run_parser
from megalite.commands.training import start_run
from megalite.workflows import finetuning_options

_EXAMPLES = """examples:
  megalite finetune configs/finetune/reuters.json
  megalite finetune configs/finetune/lora.json --init-from runs/1b
  deepspeed --num_gpus 8 --no_python megalite finetune configs/finetune/sft.json --init-from HF
  megalite finetune mine.json --set finetune.data.path=reviews.csv

If the run file has no model section, --init-from defines the model. To continue a stopped run,
start the same command again. The exit codes are those of `megalite pretrain`.
"""


def make_parser() -> CommandParser:
    """Return the parser of the command line."""
    return run_parser(__doc__, _EXAMPLES)


def main() -> int:
    return start_run(make_parser().parse_args(), finetuning_options)
