"""Show runs side by side on one HTML page: curves, differences, time, events, samples."""

from __future__ import annotations

import argparse
from pathlib import Path

from megalite import files
from megalite.cli import command_parser, run_main
from megalite.errors import CommandError
from megalite.log import printable, write_report

_EXAMPLES = """examples:
  python launcher/report.py runs/smoke --output smoke.html
  python launcher/report.py runs/1b runs/1b-again --output both.html

The page needs no network and no other file. A run that still goes is shown as far as it is.
"""


def parse() -> argparse.Namespace:
    parser = command_parser(__doc__, _EXAMPLES)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="FILE",
        help="the page; an existing one is replaced",
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    output: Path = arguments.output
    files.check_target(output)
    from megalite.report import read_records, render

    page = render(read_records(arguments.runs))
    try:
        files.write_atomic(output, printable(page))
    except OSError as error:
        raise CommandError(f"--output {output} cannot be written: {error.strerror}") from None
    write_report(f"{output}\n")


if __name__ == "__main__":
    run_main(main, find_rank=lambda: 0)
