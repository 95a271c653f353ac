"""Check this machine, check a run file on this machine, or report how a run spent its time.

Without options, the command checks versions, devices, MPI, Slurm, memory, limits, disk, clock and
ports. With --config, the command also makes the checks that a run makes before its first step. With
--run, the command reports how the run spent its time, how many steps were lost, and why the run was
restarted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megalite.cli import CommandParser, command_parser
from megalite.errors import CommandError
from megalite.log import write_report

_EXAMPLES = """examples:
  megalite doctor
  megalite doctor configs/1b.json
  megalite doctor --run runs/1b --json

Exit codes: 0 nothing failed (there may be warnings), 1 a check failed, 2 no such run or file.
"""


def make_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = command_parser(__doc__, _EXAMPLES, first="--config")
    parser.add_argument(
        "--config", metavar="FILE", help="also check a run file (JSON or YAML) on this machine"
    )
    parser.add_argument(
        "--init-from", metavar="PATH", help="model that the run of --config starts from"
    )
    parser.add_argument(
        "--run", metavar="RUN", help="report the time, lost steps and restarts of a run folder"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def main() -> int:
    arguments = make_parser().parse_args()
    if arguments.init_from is not None and arguments.config is None:
        raise CommandError("--init-from has no effect without --config; add --config FILE")
    report: dict[str, Any] = {}
    code = 0
    if arguments.run is not None:
        from megalite.observe.goodput import goodput

        report = goodput(Path(arguments.run))
    if arguments.run is None or arguments.config is not None:
        from data_prep.preview import preview
        from megalite.config import find_file
        from megalite.doctor import examine, print_results

        if arguments.config is not None and not find_file(arguments.config).is_file():
            raise CommandError(f"--config {arguments.config!r}: no such run file; check the path")
        model = None
        if arguments.init_from is not None:
            from megalite.hub import find_model

            model = find_model(arguments.init_from, "--init-from")
        results = examine(arguments.config, preview, model)
        code = int(any(result.state == "fail" for result in results))
        if arguments.json:
            run = {"run": report} if report else {}
            report = {"ok": code == 0, "rows": [result.to_json() for result in results], **run}
        else:
            print_results(results)
    if arguments.json:
        write_report(report, as_json=True)
    elif report:
        _print_goodput(report)
    return code


def _print_goodput(report: dict[str, Any]) -> None:
    from megalite.observe.console import format_duration

    wall = report["wall_seconds"]
    lines = [
        f"{report['run']}: {report['state']}, goodput {100 * report['goodput']:.1f} % of "
        f"{format_duration(wall)}, {report['restarts']} restarts, {report['lost_steps']} steps lost"
    ]
    if (set_back := report["clock_set_back_seconds"]) > 0:
        lines.append(
            f"  the clock was set back by {format_duration(set_back)} during the run, so some time "
            "is not counted; synchronise the clocks of the hosts (NTP)"
        )
    for name, seconds in sorted(report["seconds"].items(), key=lambda item: -item[1]):
        percent = 100 * seconds / wall if wall else 0.0
        lines.append(f"  {name:8} {percent:5.1f} %  {format_duration(seconds):>10}")
    for attempt in report["attempts"]:
        lost = f", {attempt['lost']} lost" if attempt["lost"] else ""
        first, last = attempt["first"], attempt["last"]
        steps = (f"steps {first + 1} to {last}" if last > first else "no step") + lost
        lines.append(f"  attempt {attempt['attempt']}: {steps}: {attempt['cause']}")
    write_report("\n".join(lines) + "\n")
