"""Show which tokens of a text a classifier's label rests on, as an HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

from megalite import files, hub
from megalite.cli import command_parser, run_main
from megalite.log import printable, write_report

_EXAMPLES = """examples:
  python launcher/explain.py --checkpoint runs/imdb --text "A film to forget." --output why.html
  python launcher/explain.py --checkpoint runs/imdb --text "..." --label positive --output why.html

The page says what the label's score loses without each token, what each one adds by gradients, and
what the last layer looks at.
"""


def parse() -> argparse.Namespace:
    parser = command_parser(__doc__, _EXAMPLES)
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
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    files.check_target(arguments.output)
    checkpoint = hub.find_model(arguments.checkpoint, "--checkpoint")  # before torch is imported
    from megalite.evaluate import explain, open_model

    opened = open_model(checkpoint)
    page = explain.explain_text(opened, arguments.text, arguments.label)
    files.write_atomic(arguments.output, printable(page))
    write_report(f"{arguments.output}\n")


if __name__ == "__main__":
    run_main(main)
