"""The result of a check, and the functions that run checks and print their results."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from megalite.errors import MegaLiteError
from megalite.log import printable

GIB = 1 << 30
STATES = ("ok", "warn", "fail")
_COLOURS = dict(zip(STATES, ("green", "yellow", "red"), strict=True))


class CheckResult(NamedTuple):
    """The result of one check.

    Attributes:
        state: "fail" means that a run would fail, or differ from what its run file requests.
        detail: the measured facts.
        advice: the remedy. Empty if the state is "ok".
        name: the name of the check.
    """

    state: Literal["ok", "warn", "fail"]
    detail: str
    advice: str = ""
    name: str = ""

    def to_json(self) -> dict[str, str]:
        """Return the row of `--json`, in which the detail has the key `found`."""
        return {
            "state": self.state,
            "found": self.detail,
            "advice": self.advice,
            "name": self.name,
        }


Check = tuple[str, Callable[[], CheckResult]]


def run_checks(checks: Iterable[Check]) -> Iterator[CheckResult]:
    """Yield the result of each check; an exception becomes a failed check."""
    for name, check in checks:
        try:
            result = check()
        except MegaLiteError as error:
            result = CheckResult("fail", str(error))
        except Exception as error:
            detail = f"the check itself failed: {type(error).__name__}: {error}"
            result = CheckResult("fail", detail, "fix the cause that the message names")
        yield result._replace(name=name)


def print_results(results: Sequence[CheckResult]) -> None:
    """Print a table of results on standard output."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("", "", "result", "what to do", box=None, pad_edge=False)
    for result in results:
        state = Text(result.state, _COLOURS[result.state])
        detail, advice = Text(printable(result.detail)), Text(printable(result.advice))
        table.add_row(result.name, state, detail, advice)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
