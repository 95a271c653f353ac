"""Tell what a run's time went into, what was lost, and why it was started again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from megalite.log import command_parser, run_main

_EXAMPLES = """examples:
  python launcher/doctor.py --run runs/1b
  python launcher/doctor.py --run runs/1b --json
"""


def main() -> None:
    parser = command_parser(__doc__, _EXAMPLES)
    parser.add_argument("--run", required=True, metavar="RUN", help="a run folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    from megalite.observe.console import format_duration
    from megalite.observe.goodput import goodput

    found: dict[str, Any] = goodput(Path(arguments.run))
    if arguments.json:
        sys.stdout.write(json.dumps(found) + "\n")
        return
    wall = found["wall_seconds"]
    lines = [
        f"{found['run']}: {found['state']}, goodput {100 * found['goodput']:.1f} % of "
        f"{format_duration(wall)}, {found['restarts']} restarts, {found['lost_steps']} steps lost"
    ]
    for name, seconds in sorted(found["seconds"].items(), key=lambda item: -item[1]):
        share = 100 * seconds / wall if wall else 0.0
        lines.append(f"  {name:8} {share:5.1f} %  {format_duration(seconds):>10}")
    for one in found["attempts"]:
        lost = f", {one['lost']} lost" if one["lost"] else ""
        some = one["last"] > one["first"]
        steps = (f"steps {one['first'] + 1} to {one['last']}" if some else "no step") + lost
        lines.append(f"  attempt {one['attempt']}: {steps}: {one['cause']}")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    run_main(main, find_rank=lambda: 0)
