"""docs/commands.md from the commands' parsers. `python -m tests.pages` writes it, and api.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from data_prep import __main__ as data_prep
from megalite.commands import PROGRAMS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "commands.md"
_INTRODUCTION = """\
# Every command and its options

Made from the commands' own parsers by `python -m tests.pages`; `--help` of each prints the same.
The keys that `--set` takes are in [configuration.md](configuration.md).

`megalite COMMAND` runs every program of the project; `python -m megalite` is the same. The run
file, or the checkpoint, needs no option's name: `megalite plan 7b.json`. With `--json` standard
output holds one object and nothing else. Exit codes: 0 done, 1 failed, 2 user error, nothing was
written; a run has two [more](errors.md#exit-codes).

**Ranks.** Alone on a host, `pretrain`, `finetune` and `eval` start one process for each GPU that
`CUDA_VISIBLE_DEVICES` leaves visible, or one on a CPU; `generate` starts one. `--ranks N` starts
another number. SIGTERM, SIGINT and SIGUSR1 are passed on to every rank, so that a run is saved. If
a rank fails, the others end within 30 seconds. The exit code is that of the run itself, with any
number of ranks. A launcher starts the ranks of several hosts; under one, the command is one rank:

    torchrun --nproc-per-node 8 --no-python megalite pretrain configs/1b.json
    deepspeed --num_gpus 8 --no_python megalite pretrain configs/1b.json
    srun --ntasks-per-node 8 megalite pretrain configs/7b.json
    mpirun -n 8 megalite pretrain configs/1b.json

**Files.** For launchers that start a file, each command but `data` is a file of `launcher/`, such
as `launcher/pretrain.py`, and in an installed MegaLite a module, `megalite.launcher.pretrain`. They
take the same options and start no ranks. `python -m data_prep` is `megalite data`. `make smoke` is
`launcher/smoke.py`, which takes no options. Job scripts are in [slurm.md](slurm.md).

**Completion.** A script completes commands, options and run files, and starts no Python:

    megalite completion bash >> ~/.bashrc
    megalite completion zsh >> ~/.zshrc      # after the line with compinit
    megalite completion fish > ~/.config/fish/completions/megalite.fish"""


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield each command that takes arguments, as it is started, and its parser."""
    for name in PROGRAMS:
        yield f"megalite {name}", import_module(f"megalite.commands.{name}").make_parser()
    (commands,) = (
        action
        for action in data_prep.make_parser("megalite data")._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    for name, parser in commands.choices.items():
        yield f"megalite data {name}", parser


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
