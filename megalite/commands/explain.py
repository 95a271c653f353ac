"""Show which tokens of a text a classifier's label rests on, as an HTML page."""

from __future__ import annotations

from pathlib import Path

from megalite import files, hub
from megalite.cli import CommandParser, command_parser
from megalite.log import printable, write_report

_EXAMPLES = """examples:
  megalite explain runs/imdb --text "A film to forget." --output why.html
  megalite explain runs/imdb --text "..." --label positive --output why.html

The page says what the label's score loses without each token, what each one adds by gradients, and
what the last layer looks at.
"""


def make_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = command_parser(__doc__, _EXAMPLES, first="--checkpoint")
    parser.add_argument(
        "--checkpoint", required=True, metavar="PATH", help="a step folder, or a run folder"
    )
    parser.add_argument("--text", required=True, metavar="TEXT", help="what is classified")
    parser.add_argument(
        "--label", metavar="NAME", help="what is explained (default: the likeliest)"
    )
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="FILE",
        help="the page; an existing one is replaced",
    )
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    files.check_target(arguments.output)
    checkpoint = hub.find_model(arguments.checkpoint, "--checkpoint")  # before torch is imported
    from megalite.evaluate import explain, open_model

    opened = open_model(checkpoint)
    page = explain.explain_text(opened, arguments.text, arguments.label)
    files.write_atomic(arguments.output, printable(page))
    write_report(f"{arguments.output}\n")
