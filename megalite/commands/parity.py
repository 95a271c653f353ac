"""Check that a run file trains the same model on every layout as in one plain process."""

from __future__ import annotations

import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from megalite.cli import CommandParser, command_parser
from megalite.errors import CommandError
from megalite.log import write_report

if TYPE_CHECKING:
    from megalite.parity.runner import ParityResult

_EXAMPLES = """examples:
  megalite parity configs/smoke.json
  megalite parity configs/70b.json --scale --resume --json
"""


def make_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = command_parser(__doc__, _EXAMPLES, first="--config")
    parser.add_argument("--config", required=True, metavar="PATH", help="run file (JSON or YAML)")
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="maximum number of ranks of a layout (default: 4, or all GPUs)",
    )
    parser.add_argument(
        "--scale", action="store_true", help="test a scaled-down copy of a large model"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="also save a checkpoint under some layouts and resume it under others",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of a table"
    )
    return parser


def main() -> int:
    arguments = make_parser().parse_args()
    from megalite.config import load_config
    from megalite.parity.layouts import resume_pairs, select_layouts
    from megalite.parity.runner import ParityRunner
    from megalite.parity.trial import make_case, usable_ranks

    if arguments.ranks is not None and arguments.ranks < 1:
        raise CommandError(f"--ranks {arguments.ranks}: give 1 or more")
    config = load_config(arguments.config)
    ranks = usable_ranks(arguments.ranks)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the ranks, removes the folder
    with tempfile.TemporaryDirectory(prefix="megalite-parity-") as folder:
        case = make_case(config, Path(folder), ranks=ranks, scale=arguments.scale)
        layouts = select_layouts(case.model, ranks)
        pairs = resume_pairs(layouts) if arguments.resume else []
        saved = {pair.saved for pair in pairs}
        runner = ParityRunner(case)
        runner.run_reference(resumes=arguments.resume)
        results = [runner.try_layout(layout, save=layout in saved) for layout in layouts]
        results += [runner.try_resume(pair) for pair in pairs]
    ok = all(result.ok for result in results)
    report = {"ok": ok, "layouts": [vars(result) for result in results]}
    write_report(report if arguments.json else _table(results), as_json=arguments.json)
    return 0 if ok else 1


def _table(results: list[ParityResult]) -> str:
    width = max(len(result.name) for result in results)
    lines = [f"{'layout':<{width}}  {'loss':>8}  {'norm':>8}  {'worst':>8}        parameter"]
    for row in results:
        numbers = (row.loss_error, row.grad_norm_error, row.parameter_error)
        cells = "  ".join(f"{'-' if n is None else format(n, '.1e'):>8}" for n in numbers)
        verdict = "ok" if row.ok else "MISS"
        lines.append(f"{row.name:<{width}}  {cells}  {verdict:<4}  {row.parameter or '-'}")
    return "\n".join(lines) + "\n"
