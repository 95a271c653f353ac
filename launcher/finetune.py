"""Fine-tune a model on labelled data. Started by deepspeed, torchrun, srun,
mpirun or python."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from megalite import env
from megalite.cli import refuse_useless, run_main, run_parser
from megalite.config import find_run, load_config, stated_model
from megalite.config.tasks import find_task
from megalite.errors import ConfigError

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
    from megalite.formats.start import find_start
    from megalite.hub import find_model

    own = find_run(arguments.config, arguments.set)
    root = None if own is None or arguments.resume == "never" else own / "checkpoints"
    start = find_start(arguments.init_from, root)
    from megalite.checkpoint import describe_run, describe_start, require_head  # torch

    fresh = False
    known = None
    if own is not None and arguments.resume != "never":
        known = describe_run(own, stated_model(arguments.config, arguments.set))
    if known is None and start is not None:
        start = str(find_model(start, "--init-from"))
        known = describe_start(Path(start))
        fresh = True
    model, tokenizer = known or (None, None)
    config = load_config(arguments.config, arguments.set, model=model)
    if config.finetune is None:
        raise ConfigError(
            f"{arguments.config}: no finetune section; write one (configs/finetune has examples), "
            "or start launcher/pretrain.py"
        )
    if fresh and start is not None and not find_task(config.finetune.task).has_labels:
        require_head(Path(start))  # before the examples are made
    if arguments.dry_run is not None:
        from megalite.parity.dry_run import report_dry_run

        return report_dry_run(config, launch, arguments.dry_run, arguments.gpu)
    from data_prep.chat import ask
    from data_prep.examples import prepare
    from megalite.train import RunOptions, run

    options = RunOptions(
        config,
        resume=arguments.resume,
        init_from=start,
        init_name=arguments.init_from,
        allow_change=tuple(arguments.allow_change),
        prepare=partial(prepare, tokenizer=tokenizer),
        ask=ask,
    )
    run(options, launch)
    return 0


if __name__ == "__main__":
    run_main(main, ranks=True)
