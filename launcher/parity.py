"""Prove that a run file trains the same model on every layout: one plain process against all."""

from __future__ import annotations

import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from megalite.cli import command_parser, run_main
from megalite.errors import CommandError
from megalite.log import write_report

if TYPE_CHECKING:
    from megalite.parity.runner import Finding

_EXAMPLES = """examples:
  python launcher/parity.py --config configs/smoke.json
  python launcher/parity.py --config configs/70b.json --scale --resume --json
"""


def main() -> int:
    parser = command_parser(__doc__, _EXAMPLES)
    parser.add_argument("--config", required=True, metavar="PATH", help="the run file")
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="most ranks of a layout (default: 4, or all GPUs)"
    )
    parser.add_argument("--scale", action="store_true", help="shrink the model in proportion")
    parser.add_argument(
        "--resume", action="store_true", help="also save under some layouts and resume under others"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    arguments = parser.parse_args()
    from megalite.config import load_config
    from megalite.parity.layouts import layouts, resumes
    from megalite.parity.runner import Proof
    from megalite.parity.trial import make_trial, usable_ranks

    if arguments.ranks is not None and arguments.ranks < 1:
        raise CommandError(f"--ranks {arguments.ranks}: give 1 or more")
    config = load_config(arguments.config)
    ranks = usable_ranks(arguments.ranks)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the ranks, removes the folder
    with tempfile.TemporaryDirectory(prefix="megalite-parity-") as folder:
        trial = make_trial(config, Path(folder), ranks=ranks, scale=arguments.scale)
        tried = layouts(trial.model, ranks)
        pairs = resumes(tried) if arguments.resume else []
        sources = {pair.saved for pair in pairs}
        proof = Proof(trial)
        proof.run_reference(resumes=arguments.resume)
        findings = [proof.try_layout(layout, save=layout in sources) for layout in tried]
        findings += [proof.try_resume(pair) for pair in pairs]
    ok = all(finding.ok for finding in findings)
    report = {"ok": ok, "layouts": [vars(finding) for finding in findings]}
    write_report(report if arguments.json else _table(findings), as_json=arguments.json)
    return 0 if ok else 1


def _table(findings: list[Finding]) -> str:
    width = max(len(finding.name) for finding in findings)
    lines = [f"{'layout':<{width}}  {'loss':>8}  {'norm':>8}  {'worst':>8}        parameter"]
    for row in findings:
        numbers = (row.loss_error, row.grad_norm_error, row.parameter_error)
        cells = "  ".join(f"{'-' if n is None else format(n, '.1e'):>8}" for n in numbers)
        verdict = "ok" if row.ok else "MISS"
        lines.append(f"{row.name:<{width}}  {cells}  {verdict:<4}  {row.parameter or '-'}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_main(main)
