"""Report memory, step time and communication volume of a run before it starts, without a GPU."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megalite import files
from megalite.cli import CommandParser, command_parser
from megalite.config import RunConfig, find_file, run_files, section_changes, write_value
from megalite.errors import CommandError
from megalite.log import write_report
from megalite.plan.command import (
    check_plan_options,
    make_cluster,
    planned_config,
    write_calibration,
)
from megalite.plan.devices import DEVICES
from megalite.plan.forecast import forecast
from megalite.plan.search import extends, rank, run_file
from megalite.plan.seconds import Cluster
from megalite.plan.tables import describe_forecast, describe_ranking

_EXAMPLES = """examples:
  megalite plan configs/7b.json --nodes 4 --gpus-per-node 8 --gpu h100-80gb
  megalite plan configs/70b.json --nodes 16 --gpu h100-80gb --search
  megalite plan --calibrate runs/smoke runs/other --output laptop.json
  megalite plan configs/smoke.json --gpus-per-node 2 --gpu laptop.json

Exit codes: 0 the run fits, 1 it does not fit, 2 invalid configuration or command line.
"""


def make_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = command_parser(__doc__, _EXAMPLES, first="--config")
    parser.add_argument("--config", metavar="FILE", help="run file (JSON or YAML)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of the run file, such as training.steps=100; may be repeated",
    )
    parser.add_argument(
        "--nodes", type=int, default=1, metavar="N", help="number of hosts (default: 1)"
    )
    parser.add_argument(
        "--gpus-per-node",
        type=int,
        default=8,
        metavar="G",
        help="number of GPUs per host (default: 8)",
    )
    names = f"{', '.join(DEVICES)}, or a JSON file (default: h100-80gb)"
    parser.add_argument("--gpu", default="h100-80gb", metavar="NAME|FILE", help=f"device: {names}")
    parser.add_argument(
        "--search",
        action="store_true",
        help="rank all layouts that fit, and that of the run file; --output writes the best one",
    )
    parser.add_argument(
        "--init-from",
        metavar="CHECKPOINT",
        help="model for a run file without a model section: checkpoint, Hugging Face model folder, "
        "or model of the hub",
    )
    parser.add_argument(
        "--calibrate",
        nargs="+",
        metavar="RUN",
        help="fit a device's efficiencies to runs on this device; two different runs separate the "
        "efficiency of matrix products from that of memory",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="run file that --search writes, or device file that --calibrate writes",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of a table"
    )
    return parser


def main() -> int:
    arguments = make_parser().parse_args()
    check_plan_options(arguments)
    if arguments.calibrate:
        path, device = write_calibration(arguments.calibrate, arguments.output)
        write_report(device if arguments.json else f"{path}\n", as_json=arguments.json)
        return 0
    cluster = make_cluster(arguments.gpu, arguments.nodes, arguments.gpus_per_node)
    model = None
    if arguments.init_from is not None:
        from megalite.hub import find_model

        start = find_model(arguments.init_from, "--init-from")
        from megalite.checkpoint import describe_start  # torch

        model, _ = describe_start(start)
    config = planned_config(arguments.config, arguments.set, model)
    if not arguments.search:
        plan = forecast(config, cluster)
        steps = config.training.steps
        report = plan.as_json(steps) if arguments.json else describe_forecast(config, plan)
        write_report(report, as_json=arguments.json)
        return 0 if plan.fits else 1
    return _search(arguments, config, cluster)


def _search(arguments: argparse.Namespace, config: RunConfig, cluster: Cluster) -> int:
    path = arguments.output
    if path is not None:
        files.check_target(path, [*run_files(arguments.config), Path(arguments.gpu)])
        source, changes = find_file(arguments.config), section_changes(arguments.set)
        if path.exists() and not extends(path, source):
            raise CommandError(
                f"--output {path}: the file exists and does not extend {source}; name another file"
            )
    ranking = rank(config, cluster)
    if not ranking.candidates:
        sys.stderr.write("no layout fits; give more devices, or devices with more memory\n")
        return 1
    if path is not None:
        write_value(path, run_file(ranking.candidates[0], path, source, changes))
    if arguments.json:
        written = None if path is None else str(path)
        report = {"written": written} | ranking.as_json(config.training.steps)
        write_report(report, as_json=True)
        return 0
    end = (
        f"rank 1 is written to {path}" if path else "write rank 1 as a run file with --output FILE"
    )
    write_report(f"{describe_ranking(ranking)}{end}\n")
    return 0
