"""Examine a machine, a run file on it, or where the time of a run went.

Without --run: versions, devices, MPI, Slurm, memory, limits, disk, clock and ports; with --config
also what is known of a run before it trains. --run reports where a run's time went, what was
lost, and why it was started again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megalite.cli import command_parser, run_main
from megalite.errors import CommandError
from megalite.log import write_report

_EXAMPLES = """examples:
  python launcher/doctor.py
  python launcher/doctor.py --config configs/1b.json
  python launcher/doctor.py --run runs/1b --json

Exit codes: 0 nothing failed (there may be warnings), 1 a check failed, 2 no such run or file.
"""


def main() -> int:
    parser = command_parser(__doc__, _EXAMPLES)
    parser.add_argument(
        "--config", metavar="FILE", help="a run file (JSON or YAML), on this machine"
    )
    parser.add_argument(
        "--init-from", metavar="PATH", help="the model that the run of --config starts from"
    )
    parser.add_argument("--run", metavar="RUN", help="a run folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if arguments.init_from is not None and arguments.config is None:
        raise CommandError("--init-from has no effect without --config; name the run file, too")
    told: dict[str, Any] = {}
    code = 0
    if arguments.run is not None:
        from megalite.observe.goodput import goodput

        told = goodput(Path(arguments.run))
    if arguments.run is None or arguments.config is not None:
        from data_prep.preview import preview
        from megalite.config import find_file
        from megalite.doctor import examine, show

        if arguments.config is not None and not find_file(arguments.config).is_file():
            raise CommandError(f"--config {arguments.config!r}: no such run file")
        start = None
        if arguments.init_from is not None:
            from megalite.hub import find_model

            start = find_model(arguments.init_from, "--init-from")
        rows = examine(arguments.config, preview, start)
        code = int(any(row.state == "fail" for row in rows))
        if arguments.json:
            run = {"run": told} if told else {}
            told = {"ok": code == 0, "rows": [row._asdict() for row in rows], **run}
        else:
            show(rows)
    if arguments.json:
        write_report(told, as_json=True)
    elif told:
        _print_goodput(told)
    return code


def _print_goodput(found: dict[str, Any]) -> None:
    from megalite.observe.console import format_duration

    wall = found["wall_seconds"]
    lines = [
        f"{found['run']}: {found['state']}, goodput {100 * found['goodput']:.1f} % of "
        f"{format_duration(wall)}, {found['restarts']} restarts, {found['lost_steps']} steps lost"
    ]
    if (back := found["clock_set_back_seconds"]) > 0:
        lines.append(
            f"  the clock was set back by {format_duration(back)} during the run: time that passed "
            "at that moment is not counted; see that the hosts keep their clocks (NTP)"
        )
    for name, seconds in sorted(found["seconds"].items(), key=lambda item: -item[1]):
        share = 100 * seconds / wall if wall else 0.0
        lines.append(f"  {name:8} {share:5.1f} %  {format_duration(seconds):>10}")
    for one in found["attempts"]:
        lost = f", {one['lost']} lost" if one["lost"] else ""
        some = one["last"] > one["first"]
        steps = (f"steps {one['first'] + 1} to {one['last']}" if some else "no step") + lost
        lines.append(f"  attempt {one['attempt']}: {steps}: {one['cause']}")
    write_report("\n".join(lines) + "\n")


if __name__ == "__main__":
    run_main(main, find_rank=lambda: 0)
