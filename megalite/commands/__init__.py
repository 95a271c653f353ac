"""The `megalite` command: every program of the project under one name.

    megalite pretrain mine.json --set training.steps=100

runs `megalite.commands.pretrain`, as `launcher/pretrain.py` does. Alone on a host, the programs
that train or measure start one rank for each visible GPU, or `--ranks N`. Under torchrun,
`deepspeed --no_python`, mpirun or srun the command is one rank.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module

from megalite import __version__, env
from megalite.cli import run_main
from megalite.errors import CommandError, UserError, nearest
from megalite.spawn import supervise


@dataclass(frozen=True)
class Program:
    """A program that a sub-command runs: the module of its name in this package.

    Attributes:
        about: a line for the help.
        ranks: "gpus": one rank a GPU unless `--ranks` says otherwise; "one": one rank unless it
            does; "": the program has no ranks.
        launched: whether a launcher's variables are read. `doctor` and `report` examine a machine
            and files, whatever started them.
    """

    about: str
    ranks: str = ""
    launched: bool = True


PROGRAMS = {
    "pretrain": Program("train a model from a run file", "gpus"),
    "finetune": Program("train a model further, on your data", "gpus"),
    "generate": Program("continue prompts, or chat", "one"),
    "eval": Program("measure a model", "gpus"),
    "explain": Program("show which words a classifier's answer depends on"),
    "export": Program("write a folder that transformers loads"),
    "plan": Program("report memory, time and messages of a run before it"),
    "parity": Program("compare layouts with one plain process"),
    "doctor": Program("examine this machine, a run file or a run", launched=False),
    "report": Program("compare runs on one page", launched=False),
}
ABOUT = {name: program.about for name, program in PROGRAMS.items()} | {
    "data": "turn corpora into shards, and check them",
    "completion": "print the completion of a shell: bash, zsh, fish",
}
_EXAMPLES = """\
examples:
  megalite pretrain configs/smoke.json --set training.steps=20
  megalite plan configs/7b.json --nodes 4 --gpu h100-80gb
  megalite data tokenize --input "corpus/*.jsonl" --tokenizer bytes --output data/train
  torchrun --nproc-per-node 8 --no-python megalite pretrain configs/1b.json
  megalite completion bash >> ~/.bashrc

Exit codes: 0 done, 2 user error (nothing was written), 75 stopped and resumable, 3 superseded by a
newer start, 1 anything else.
"""


def main() -> None:
    """Run the command of `sys.argv` and end the process with its exit code."""
    arguments = sys.argv[1:]
    while arguments and re.match(r"--local[-_]rank\b", arguments[0]):
        arguments = arguments[1:]  # `deepspeed --no_python` puts it before the sub-command
    name = arguments[0] if arguments else ""
    if name in PROGRAMS:
        _run(name, arguments[1:])
    elif name == "data":
        from data_prep.__main__ import main as prepare

        command = partial(prepare, arguments[1:], program="megalite data")
        run_main(command, find_rank=lambda: env.find_rank_and_size()[0])
    else:
        run_main(lambda: _answer(arguments))


def run_program(name: str) -> None:
    """Run a program with the arguments of `sys.argv`, and end the process with its exit code."""
    program = PROGRAMS[name]
    options = {} if program.launched else {"find_rank": lambda: 0}
    module = f"megalite.commands.{name}"
    run_main(lambda: import_module(module).main(), ranks=bool(program.ranks), **options)


def _answer(arguments: Sequence[str]) -> int:
    """Handle arguments that name no program and return the exit code.

    Raises:
        CommandError: an unknown sub-command.
    """
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help", "help", ""):
        sys.stdout.write(help_text())
        return 0 if name else CommandError.exit_code
    if name == "--version":
        sys.stdout.write(f"megalite {__version__}\n")
        return 0
    if name == "completion":
        from megalite.commands.completion import completion

        sys.stdout.write(completion(arguments[1:]))
        return 0
    raise CommandError(
        f"{name}: no such command{nearest(name, ABOUT)}; the commands are {', '.join(ABOUT)}"
    )


def help_text() -> str:
    """Return the text of `megalite --help`."""
    lines = [f"  {name:{max(map(len, ABOUT)) + 2}}{line}\n" for name, line in ABOUT.items()]
    return (
        "usage: megalite COMMAND ...\n\n"
        "Train large Transformer models, with the same numbers on every layout.\n\n"
        f"commands; each has --help:\n{''.join(lines)}\n{_EXAMPLES}"
    )


def _run(name: str, arguments: list[str]) -> None:
    """Run a program in this process, or as several ranks, and end with its exit code."""
    if PROGRAMS[name].ranks:
        env.restart_with_heap()
        try:
            ranks, arguments = _choose_ranks(PROGRAMS[name], arguments)
        except UserError as error:
            run_main(partial(_refuse, error))
        if ranks > 1:
            command = [*_own_command(), name, *arguments]
            run_main(lambda: supervise(command, ranks))
    sys.argv = [f"megalite {name}", *arguments]
    run_program(name)


def _refuse(error: UserError) -> int:
    raise error


def _choose_ranks(program: Program, arguments: list[str]) -> tuple[int, list[str]]:
    """Return how many ranks to start, and the arguments without `--ranks`.

    1 stands for this process, which may be a rank that a launcher has started.

    Raises:
        CommandError: a wrong or useless `--ranks`.
        LaunchError: a launcher's variables that are half set.
    """
    ranks, arguments = _take_ranks(arguments)
    words = [word.partition("=")[0] for word in arguments]
    if {"-h", "--help"} & set(words):
        return 1, arguments
    launch = env.find_launch()
    if any("--dry-run".startswith(word) and len(word) > 2 for word in words):
        if ranks:
            raise CommandError(f"--ranks {ranks}: a dry run is one process; use --dry-run {ranks}")
        return 1, arguments
    if launch.source != "python":
        if ranks:
            raise CommandError(
                f"--ranks {ranks}: {launch.source} has started this rank of {launch.world_size}; "
                "remove --ranks"
            )
        return 1, arguments
    default = env.visible_gpus() if program.ranks == "gpus" else 1
    return ranks or default, arguments


def _take_ranks(arguments: Sequence[str]) -> tuple[int, list[str]]:
    """Return the value of `--ranks`, 0 if it is missing, and the other arguments."""
    rest = list(arguments)
    for index, word in enumerate(rest):
        option, equals, value = word.partition("=")
        if option != "--ranks":
            continue
        value = value if equals else "".join(rest[index + 1 : index + 2])
        if not (value.isascii() and value.isdigit() and len(value) < 6 and int(value) > 0):
            raise CommandError(f"--ranks: expected a number of processes, 1 or more, got {value!r}")
        del rest[index : index + (1 if equals else 2)]
        return int(value), rest
    return 0, rest


def _own_command() -> list[str]:
    """Return the words that start this command again, as it was started.

    `python -m megalite` in place of the script would import from the working directory.
    """
    words = sys.orig_argv[1:]
    start = words[: len(words) - len(sys.argv) + 1]
    if [*start, *sys.argv[1:]] != words or not start:
        start = ["-m", "megalite"]  # called by another program
    return [sys.executable, *start]
