"""The `megalite` command: every program of the project under one name.

    megalite pretrain mine.json --set training.steps=100

runs `megalite.commands.pretrain`, as `launcher/pretrain.py` does. Without a launcher, programs that
train or evaluate start one rank for each visible GPU, or N ranks with `--ranks N`. Under torchrun,
`deepspeed --no_python`, mpirun or srun, each process is one rank.
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
    """Program of a sub-command: the module of the same name in this package.

    Attributes:
        about: line for the help.
        ranks: number of ranks without `--ranks`: "gpus" means one per visible GPU, and "one" means
            one. "" means that the program has no ranks.
        launched: If true, the rank is read from a launcher's variables. `doctor` and `report`
            ignore these variables.
    """

    about: str
    ranks: str = ""
    launched: bool = True


PROGRAMS = {
    "pretrain": Program("train a model from a run file", "gpus"),
    "finetune": Program("fine-tune a model on your data", "gpus"),
    "generate": Program("generate text from prompts, or chat", "one"),
    "eval": Program("evaluate a model on shards, lm-eval tasks or labelled rows", "gpus"),
    "explain": Program("show which words determine a classifier's label"),
    "export": Program("export a checkpoint for Hugging Face transformers"),
    "plan": Program("predict memory, step time and communication of a run"),
    "parity": Program("compare every parallel layout with one plain process"),
    "doctor": Program("check this machine or a run file, or analyse a run", launched=False),
    "report": Program("compare runs on one HTML page", launched=False),
}
ABOUT = {name: program.about for name, program in PROGRAMS.items()} | {
    "data": "tokenize corpora into shards, and check shards",
    "completion": "print the completion script for bash, zsh or fish",
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
        arguments = arguments[1:]  # `deepspeed --no_python` inserts the option here
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
        f"{name}: no such command{nearest(name, ABOUT)}; use one of {', '.join(ABOUT)}"
    )


def help_text() -> str:
    """Return the text of `megalite --help`."""
    lines = [f"  {name:{max(map(len, ABOUT)) + 2}}{line}\n" for name, line in ABOUT.items()]
    return (
        "usage: megalite COMMAND ...\n\n"
        "Train large Transformer models, with the same numbers on every layout.\n\n"
        f"commands (`megalite COMMAND --help` lists the options):\n{''.join(lines)}\n{_EXAMPLES}"
    )


def _run(name: str, arguments: list[str]) -> None:
    """Run a program in this process or as several ranks, and exit with its code."""
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
    """Return the number of ranks to start, and the arguments without `--ranks`.

    The number 1 means this process, which may be a rank of a launcher.

    Raises:
        CommandError: `--ranks` is invalid or has no effect.
        LaunchError: variables of a launcher are missing.
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
    """Return the value of `--ranks` and the other arguments. Without `--ranks` the value is 0."""
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
    """Return the command line of this process, without the arguments of the program.

    A script is kept as it is: `python -m megalite` would import from the working directory.
    """
    words = sys.orig_argv[1:]
    start = words[: len(words) - len(sys.argv) + 1]
    if [*start, *sys.argv[1:]] != words or not start:
        start = ["-m", "megalite"]  # called by another program
    return [sys.executable, *start]
