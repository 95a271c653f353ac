"""The `megalite` command: every program of the project under one name.

    megalite pretrain mine.json --set training.steps=100

runs `launcher/pretrain.py`. Alone on a host, pretrain and finetune start one rank for each visible
GPU, or `--ranks N`. Under torchrun, `deepspeed --no_python`, mpirun or srun the command is one
rank.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megalite import __version__, env
from megalite.cli import run_main
from megalite.errors import CommandError, nearest
from megalite.spawn import supervise


@dataclass(frozen=True)
class Program:
    """A program that a sub-command runs.

    Attributes:
        about: a line for the help.
        option: the option that a first argument without an option belongs to.
        ranks: "gpus": one rank a GPU unless `--ranks` says otherwise; "one": one rank unless it
            does; "": the program has no ranks.
    """

    about: str
    option: str = ""
    ranks: str = ""


PROGRAMS = {
    "pretrain": Program("train a model from a run file", "--config", "gpus"),
    "finetune": Program("train a model further, on your data", "--config", "gpus"),
    "generate": Program("continue prompts, or chat", "--checkpoint", "one"),
    "eval": Program("measure a model", "--checkpoint", "one"),
    "explain": Program("show which words a classifier's answer depends on", "--checkpoint"),
    "export": Program("write a folder that transformers loads", "--checkpoint"),
    "plan": Program("report memory, time and messages of a run before it", "--config"),
    "parity": Program("compare layouts with one plain process", "--config"),
    "doctor": Program("examine this machine, a run file or a run", "--config"),
    "report": Program("compare runs on one page"),
    "data": Program("turn corpora into shards, and check them"),
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
_SHELLS = ("bash", "zsh", "fish")


def main() -> None:
    """Run the command of `sys.argv` and end the process with its exit code."""
    arguments = sys.argv[1:]
    while arguments and re.match(r"--local[-_]rank\b", arguments[0]):
        arguments = arguments[1:]  # `deepspeed --no_python` puts it before the sub-command
    name = arguments[0] if arguments else ""
    if name in PROGRAMS:
        _run(name, arguments[1:])
    run_main(lambda: _answer(arguments))


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
        shell = arguments[1] if len(arguments) == 2 else ""
        if shell not in _SHELLS:
            raise CommandError(f"completion: expected a shell, {', '.join(_SHELLS)}; got {shell!r}")
        sys.stdout.write(completion(shell))
        return 0
    advice = nearest(name, [*PROGRAMS, "completion"])
    raise CommandError(f"{name}: no such command{advice}; the commands are {', '.join(PROGRAMS)}")


def help_text() -> str:
    """Return the text of `megalite --help`."""
    width = len("completion") + 2
    lines = [f"  {name:{width}}{program.about}\n" for name, program in PROGRAMS.items()]
    return (
        "usage: megalite COMMAND ...\n\n"
        "Train large Transformer models, with the same numbers on every layout.\n\n"
        f"commands; each has --help:\n{''.join(lines)}"
        f"  {'completion':{width}}print the completion of a shell: {', '.join(_SHELLS)}\n\n"
        f"{_EXAMPLES}"
    )


def _run(name: str, arguments: Sequence[str]) -> None:
    """Run a program in this process, or as several ranks, and end with its exit code."""
    program = PROGRAMS[name]
    if name == "data":
        from data_prep.__main__ import main as prepare

        run_main(lambda: prepare(arguments), find_rank=lambda: env.find_rank_and_size()[0])
    if program.ranks:
        env.restart_with_heap()
        try:
            ranks, arguments = _take_ranks(arguments)
        except CommandError as error:
            run_main(partial(_refuse, error))
        single = {"-h", "--help", "--dry-run"} & {word.partition("=")[0] for word in arguments}
        if ranks == 0 and not single and program.ranks == "gpus":
            ranks = env.visible_gpus()
        if ranks > 1 and not single and _is_alone():
            command = [sys.executable, "-m", "megalite", name, *arguments]
            run_main(lambda: supervise(command, ranks))
    if program.option and arguments and not arguments[0].startswith("-"):
        arguments = [program.option, *arguments]
    sys.argv = [f"megalite {name}", *arguments]
    if name in ("doctor", "report"):  # they read a machine and files, whatever started them
        run_main(_load(name), find_rank=lambda: 0)
    run_main(_load(name), ranks=bool(program.ranks))


def _load(name: str) -> Callable[[], int | None]:
    """Return the main function of a launcher.

    Its file is next to the package in a checkout, and within the package in a wheel.
    """
    package = Path(__file__).parent
    folder = package / "launcher"
    path = (folder if folder.is_dir() else package.parent / "launcher") / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"megalite.launcher.{name}", path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    main: Callable[[], int | None] = module.main
    return main


def _is_alone() -> bool:
    """Return whether no launcher has started this process."""
    return env.find_launch().source == "python"


def _refuse(error: CommandError) -> int:
    raise error


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


# --- completion ---


def options(name: str) -> list[str]:
    """Return the options of a program and of its sub-commands, as its help lists them."""
    command = [sys.executable, "-m", "megalite", *name.split(), "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text.partition("examples:")[0])))


def completion(shell: str) -> str:
    """Return a script that completes sub-commands, options and files in a shell."""
    table = {name: options(name) for name in PROGRAMS if name != "data"}
    parts = ("train-tokenizer", "tokenize", "verify", "inspect")
    words = sorted({option for part in parts for option in options(f"data {part}")})
    table["data"] = [*parts, *words]
    for name, program in PROGRAMS.items():
        if program.ranks:
            table[name] = [*table[name], "--ranks"]
    names = [*PROGRAMS, "completion"]
    if shell == "fish":
        lines = [
            f"complete -c megalite -n __fish_use_subcommand -f -a {name} -d '{program.about}'"
            for name, program in PROGRAMS.items()
        ]
        for name, found in table.items():
            condition = f"'__fish_seen_subcommand_from {name}'"
            lines += [
                f"complete -c megalite -n {condition} -l {word[2:]}"
                if word.startswith("--")
                else f"complete -c megalite -n {condition} -a {word}"
                for word in found
            ]
        return "\n".join(lines) + "\n"
    cases = "".join(
        f'        {name}) words="{" ".join(found)}" ;;\n' for name, found in table.items()
    )
    head = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return f"""{head}_megalite() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} words
    if [ "$COMP_CWORD" = 1 ]; then
        words="{" ".join(names)}"
    else
        case ${{COMP_WORDS[1]}} in
{cases}        completion) words="{" ".join(_SHELLS)}" ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    case $word in -*) ;; *) COMPREPLY+=($(compgen -f -- "$word")) ;; esac
}}
complete -o filenames -F _megalite megalite
"""
