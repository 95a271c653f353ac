"""Compare runs on one HTML page: curves, differences, time, events, samples."""

from __future__ import annotations

from pathlib import Path

from megalite import files
from megalite.cli import CommandParser, command_parser
from megalite.errors import CommandError
from megalite.log import printable, write_report

_EXAMPLES = """examples:
  megalite report runs/smoke --output smoke.html
  megalite report runs/1b runs/1b-again --output both.html

The page needs no network and no other file. A run in progress is shown up to its last row.
"""


def make_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = command_parser(__doc__, _EXAMPLES)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="FILE",
        help="HTML page to write; an existing file is replaced",
    )
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    output: Path = arguments.output
    files.check_target(output)
    from megalite.report import read_records, render

    page = render(read_records(arguments.runs))
    try:
        files.write_atomic(output, printable(page))
    except OSError as error:
        raise CommandError(f"--output {output} cannot be written: {error.strerror}") from None
    write_report(f"{output}\n")
