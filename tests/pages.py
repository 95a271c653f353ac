"""docs/commands.md from the commands' own parsers. `python -m tests.pages` writes it, and api.md.

A launcher parses its arguments before it does anything else, so its parser is had by starting it
with `parse_args` replaced.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

from data_prep import __main__ as data_prep

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "commands.md"
_INTRODUCTION = """\
# Every command and its options

Made from the commands' own parsers by `python -m tests.pages`; `--help` of each prints the same.
The keys that `--set` takes are in [configuration.md](configuration.md).

Commands of `launcher/` are started from a checkout: `pretrain.py` and `finetune.py` by `deepspeed`,
`torchrun`, `srun` or `python`, `eval.py` and `generate.py` by the last three, all others by
`python`. `make smoke` is `launcher/smoke.py`, which takes no options; job scripts are in
[slurm.md](slurm.md). With `--json` standard output holds one object and nothing else. Exit codes: 0
done, 1 failed, 2 user error, nothing was written; a run has two
[more](errors.md#exit-codes)."""


class _Caught(Exception):
    """Carries a parser out of the command that made it."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def _catch(parser: argparse.ArgumentParser, *_: object) -> None:
    raise _Caught(parser)


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield each command that takes arguments, as it is started, and its parser."""
    for path in sorted((ROOT / "launcher").glob("*.py")):
        if "parse_args" in path.read_text(encoding="utf-8"):
            spec = importlib.util.spec_from_file_location(f"launcher_{path.stem}", path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            with patch.object(argparse.ArgumentParser, "parse_args", _catch):
                try:
                    module.main()
                except _Caught as caught:
                    yield f"launcher/{path.name}", caught.parser
    (commands,) = (
        action
        for action in data_prep._parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    for name, parser in commands.choices.items():
        yield f"python -m data_prep {name}", parser


def actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return what a command can be given, but for --help."""
    hidden = argparse.SUPPRESS
    return [action for action in parser._actions if hidden not in (action.help, action.default)]


def commands_page() -> str:
    """Return the page, in Markdown."""
    lines = [_INTRODUCTION]
    for name, parser in parsers():
        lines += ["", f"## {name}", "", *_prose(parser.description or "")]
        lines += ["| option | value | default | meaning |", "| --- | --- | --- | --- |"]
        lines += [_row(action) for action in actions(parser)]
        lines += ["", *_prose(parser.epilog or "")][:-1]
    return "\n".join(lines).rstrip() + "\n"


def _prose(text: str) -> Iterator[str]:
    """Paragraphs; lines that are indented become a block."""
    for paragraph in text.strip("\n").split("\n\n"):
        lines = paragraph.strip("\n").splitlines()
        block = [f"  {line}" for line in lines if line.startswith("  ")]
        said = "\n".join(lines[: len(lines) - len(block)])
        yield from (said[:1].upper() + said[1:], "") if said else ()
        yield from (*block, "") if block else ()


def _row(action: argparse.Action) -> str:
    value = str(action.metavar or "").replace("|", " or ")
    if action.choices:
        value = " or ".join(str(choice) for choice in action.choices)
    name = f"`{action.option_strings[-1]}`" if action.option_strings else f"`{value}`"
    value += " ..." if action.nargs == "+" else ""
    if isinstance(action, argparse._AppendAction | argparse._ExtendAction):
        value += ", and again"
    absent = isinstance(action.default, bool) or action.default in (None, [])
    default = "" if absent else f"`{action.default}`"
    cells = (name, value, "required" if action.required else default, action.help or "")
    assert not any("|" in cell for cell in cells), name
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    from tests.api_page import API_PAGE, api_page

    for page, text in ((PAGE, commands_page()), (API_PAGE, api_page())):
        page.write_text(text, encoding="utf-8")
        sys.stdout.write(f"wrote {page}\n")
