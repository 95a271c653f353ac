"""A row of the table, and the checks that make one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from megalite.errors import MegaLiteError
from megalite.log import printable

GIB = 1 << 30
STATES = ("ok", "warn", "fail")
_COLOURS = dict(zip(STATES, ("green", "yellow", "red"), strict=True))


class Row(NamedTuple):
    """state "fail": a run would end, or not be what was requested. advice: what to do about it."""

    state: Literal["ok", "warn", "fail"]
    found: str
    advice: str = ""
    name: str = ""


Check = tuple[str, Callable[[], Row]]


def run(checks: Iterable[Check]) -> Iterator[Row]:
    """Yield a row of each check, whatever becomes of it."""
    for name, check in checks:
        try:
            row = check()
        except MegaLiteError as error:
            row = Row("fail", str(error))
        except Exception as error:
            told = f"the check itself failed: {type(error).__name__}: {error}"
            row = Row("fail", told, "the check itself failed: fix what its message names")
        yield row._replace(name=name)


def show(rows: Sequence[Row]) -> None:
    """Print the table on standard output."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("", "", "what was found", "what to do", box=None, pad_edge=False)
    for row in rows:
        state = Text(row.state, _COLOURS[row.state])
        table.add_row(row.name, state, Text(printable(row.found)), Text(printable(row.advice)))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
