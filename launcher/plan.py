"""Tell a run's memory, time and traffic before a GPU is asked for. Needs no GPU, and no torch."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megalite import files
from megalite.config import find_file, load_config, section_changes
from megalite.errors import CommandError
from megalite.log import command_parser, run_main
from megalite.plan.devices import DEVICES, find_device
from megalite.plan.forecast import forecast
from megalite.plan.search import run_file, search
from megalite.plan.seconds import Layout
from megalite.plan.tables import compare, describe

_EXAMPLES = """examples:
  python launcher/plan.py --config configs/7b.json --nodes 4 --gpus-per-node 8 --gpu h100-80gb
  python launcher/plan.py --config configs/70b.json --nodes 16 --gpu h100-80gb --search
  python launcher/plan.py --calibrate runs/smoke --output laptop.json
  python launcher/plan.py --config configs/smoke.json --gpus-per-node 2 --gpu laptop.json

Exit codes: 0 it fits, 1 it does not, 2 a configuration or a command line that cannot be.
"""


def parse() -> argparse.Namespace:
    parser = command_parser(__doc__, _EXAMPLES)
    parser.add_argument("--config", metavar="FILE", help="the run file (JSON)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, dotted"
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="hosts (1)")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="G", help="of each (8)")
    parser.add_argument(
        "--gpu",
        default="h100-80gb",
        metavar="NAME|FILE",
        help=f"{', '.join(DEVICES)}, or a JSON file (h100-80gb)",
    )
    parser.add_argument(
        "--search", action="store_true", help="rank all layouts that fit; write the best"
    )
    parser.add_argument(
        "--calibrate", nargs="+", metavar="RUN", help="fit a device's efficiencies to runs on it"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="of --search or --calibrate")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    for name in ("nodes", "gpus_per_node"):
        if (value := getattr(arguments, name)) < 1:
            raise CommandError(f"--{name.replace('_', '-')} {value}: give 1 or more")
    if arguments.calibrate:
        from megalite.plan.calibrate import calibrate

        device = calibrate([Path(run) for run in arguments.calibrate])
        path = arguments.output or Path(f"{device['name']}.json")
        files.write_json(path, device)
        sys.stdout.write(json.dumps(device) + "\n" if arguments.json else f"{path}\n")
        return 0
    if arguments.config is None:
        raise CommandError("--config is missing; give a run file, such as configs/7b.json")
    layout = Layout(find_device(arguments.gpu), arguments.nodes, arguments.gpus_per_node)
    config = load_config(arguments.config, arguments.set)
    if not arguments.search:
        found = forecast(config, layout)
        told = found.as_json(config.training.steps)
        sys.stdout.write(json.dumps(told) + "\n" if arguments.json else describe(config, found))
        return 0 if found.fits else 1
    candidates = search(config, layout)
    if not candidates:
        sys.stderr.write("no layout fits: give more devices, or devices with more memory\n")
        return 1
    size = f"{arguments.nodes}x{arguments.gpus_per_node}-{layout.device.name}"
    path = arguments.output or Path(f"{config.name}-{size}.json")
    source, changes = find_file(arguments.config), section_changes(arguments.set)
    best = run_file(candidates[0], path, source, changes)
    files.write_json(path, best)
    if arguments.json:
        rows = [c.changes | c.forecast.as_json(config.training.steps) for c in candidates]
        sys.stdout.write(json.dumps({"written": str(path), "candidates": rows}) + "\n")
    else:
        sys.stdout.write(f"{compare(candidates)}the first of {len(candidates)}: {path}\n")
    return 0


if __name__ == "__main__":
    run_main(main)
