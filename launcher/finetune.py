"""Fine-tune a model on labelled data. Started by deepspeed, torchrun, srun,
mpirun or python."""

from __future__ import annotations

from megalite import env
from megalite.cli import refuse_useless, run_main, run_parser
from megalite.workflows import finetuning_options

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
    refuse_useless(arguments)
    if arguments.dry_run is None:
        env.restart_with_heap()
    launch = env.find_launch()
    options = finetuning_options(
        arguments.config,
        arguments.set,
        resume=arguments.resume,
        init_from=arguments.init_from,
        allow_change=arguments.allow_change,
    )
    if arguments.dry_run is not None:
        from megalite.parity.dry_run import report_dry_run

        return report_dry_run(options.config, launch, arguments.dry_run, arguments.gpu)
    from megalite.train import run

    run(options, launch)
    return 0


if __name__ == "__main__":
    run_main(main, ranks=True)
