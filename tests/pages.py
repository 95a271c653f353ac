"""Generator of docs/commands.md from the parsers: `python -m tests.pages` writes it and api.md."""

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

`python -m tests.pages` generates this page from the parsers; `--help` of a command prints the same
text. [configuration.md](configuration.md) lists the keys for `--set`.

`megalite COMMAND` runs every program of the project, as does `python -m megalite COMMAND`. The name
of the option for the run file or the checkpoint may be omitted: `megalite plan 7b.json`. With
`--json`, standard output contains one JSON object and nothing else. The exit code is 0 if the
command is done, 1 if it failed, and 2 after a user error, when nothing was written. Runs have two
[more](errors.md#exit-codes).

**Ranks.** Without a launcher, `pretrain`, `finetune` and `eval` start one rank for each GPU that
`CUDA_VISIBLE_DEVICES` makes visible, or one rank on a CPU. `generate` starts one rank. `--ranks N`
starts N ranks. SIGTERM, SIGINT and SIGUSR1 are passed on to every rank, so that the run is saved.
If a rank fails, the others end within 30 seconds. The exit code is that of the run, with any number
of ranks. For several hosts, use a launcher. Each process that a launcher starts is one rank:

    torchrun --nproc-per-node 8 --no-python megalite pretrain configs/1b.json
    deepspeed --num_gpus 8 --no_python megalite pretrain configs/1b.json
    srun --ntasks-per-node 8 megalite pretrain configs/7b.json
    mpirun -n 8 megalite pretrain configs/1b.json

**Files.** Some launchers start a file. For them, every command except `data` is a file of
`launcher/`, such as `launcher/pretrain.py`. An installed MegaLite has these files as modules, such
as `megalite.launcher.pretrain`. The files have the same options and start no ranks. `megalite data`
is also `python -m data_prep`. `make smoke` runs `launcher/smoke.py`, which has no options.
[slurm.md](slurm.md) describes the job scripts.

**Completion.** A shell script completes commands, options and run files. It starts no Python:

    megalite completion bash >> ~/.bashrc
    megalite completion zsh >> ~/.zshrc      # after the line with compinit
    megalite completion fish > ~/.config/fish/completions/megalite.fish"""


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield the name and the parser of each command that has arguments."""
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
    """Return the options and arguments of a command, except --help."""
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
    """Yield the paragraphs of a text. Indented lines become a block."""
    for paragraph in text.strip("\n").split("\n\n"):
        lines = paragraph.strip("\n").splitlines()
        block = [f"  {line}" for line in lines if line.startswith("  ")]
        prose = "\n".join(lines[: len(lines) - len(block)])
        yield from (prose[:1].upper() + prose[1:], "") if prose else ()
        yield from (*block, "") if block else ()


def _row(action: argparse.Action) -> str:
    value = str(action.metavar or "").replace("|", " or ")
    if action.choices:
        value = " or ".join(str(choice) for choice in action.choices)
    both = isinstance(action, argparse.BooleanOptionalAction)  # --bos and --no-bos
    options = action.option_strings[0 if both else -1 :] or [value]
    name = ", ".join(f"`{option}`" for option in options)
    value += " ..." if action.nargs == "+" else ""
    if isinstance(action, argparse._AppendAction | argparse._ExtendAction):
        value += ", repeatable"
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
