"""Start of a run from arguments, for `megalite pretrain` and `megalite finetune`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from megalite import env
from megalite.errors import CommandError

if TYPE_CHECKING:
    from megalite.train import RunOptions


def start_run(arguments: argparse.Namespace, make_options: Callable[..., RunOptions]) -> int:
    """Train a run, or check one step of it (`--dry-run`), and return the exit code.

    Args:
        arguments: parsed arguments of `megalite.cli.run_parser`.
        make_options: function of `megalite.workflows` that returns the run's options.
    Raises:
        CommandError: an option that would be ignored.
    """
    if arguments.gpu is not None and arguments.dry_run is None:
        raise CommandError("--gpu only applies to --dry-run; add --dry-run, or remove --gpu")
    if arguments.dry_run is None:
        env.restart_with_heap()
    launch = env.find_launch()
    options = make_options(
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
