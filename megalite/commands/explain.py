"""Show which tokens of a text determine a classifier's label, as an HTML page."""

from __future__ import annotations

from pathlib import Path

from megalite import files, hub
from megalite.cli import CommandParser, command_parser
from megalite.log import printable, write_report

_EXAMPLES = """examples:
  megalite explain runs/imdb --text "A film to forget." --output why.html
  megalite explain runs/imdb --text "..." --label positive --output why.html

For each token, the page shows the label's score without the token, the gradient times the
embedding, and the attention of the last layer.
"""


def make_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = command_parser(__doc__, _EXAMPLES, first="--checkpoint")
    parser.add_argument(
        "--checkpoint", required=True, metavar="PATH", help="step folder or run folder"
    )
    parser.add_argument("--text", required=True, metavar="TEXT", help="text to classify")
    parser.add_argument(
        "--label", metavar="NAME", help="label to explain (default: the most likely one)"
    )
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
    files.check_target(arguments.output)
    checkpoint = hub.find_model(arguments.checkpoint, "--checkpoint")  # before torch is imported
    from megalite.evaluate import explain, open_model

    loaded = open_model(checkpoint)
    page = explain.explain_text(loaded, arguments.text, arguments.label)
    files.write_atomic(arguments.output, printable(page))
    write_report(f"{arguments.output}\n")
