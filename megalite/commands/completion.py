"""Shell completion of `megalite`: a script that lists the options of every command.

The script is generated from the parsers. It starts no Python, so a Tab completes at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module

from megalite.cli import CommandParser
from megalite.commands import ABOUT, PROGRAMS
from megalite.config.load import SHIPPED
from megalite.errors import CommandError

_SHELLS = ("bash", "zsh", "fish")
_RUN_FILES = ("json", "yaml", "yml")  # endings of run files


@dataclass
class Words:
    """Words that may follow a command.

    Attributes:
        commands: sub-commands.
        options: options, each with its possible values.
        run_files: If true, only run files are completed, else all files.
    """

    commands: list[str] = field(default_factory=list)
    options: dict[str, list[str]] = field(default_factory=dict)
    run_files: bool = False


def completion(arguments: Sequence[str]) -> str:
    """Return the completion script of a shell.

    Args:
        arguments: the arguments of `megalite completion`, which are the name of the shell.
    Raises:
        CommandError: there is no script for this shell.
    """
    shell = arguments[0] if len(arguments) == 1 else ""
    if shell not in _SHELLS:
        words = " ".join(arguments)
        raise CommandError(f"completion: got {words!r}; give one of {', '.join(_SHELLS)}")
    table = words_of_commands()
    if shell == "fish":
        return "".join(f"complete -c megalite {line}\n" for line in _fish(table))
    return _bash(table, zsh=shell == "zsh")


def words_of_commands() -> dict[str, Words]:
    """Return the words of every command, by the command's name."""
    from data_prep.__main__ import make_parser

    table = {"completion": Words(list(_SHELLS)), "data": _words(make_parser(""))}
    for name in PROGRAMS:
        parser: CommandParser = import_module(f"megalite.commands.{name}").make_parser()
        table[name] = _words(parser)
    return {name: table[name] for name in ABOUT}


def _words(parser: argparse.ArgumentParser) -> Words:
    words = Words(run_files="--config" in parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            words.commands = list(action.choices)
            for inner in action.choices.values():
                words.options |= _words(inner).options
        elif action.help != argparse.SUPPRESS:
            for option in action.option_strings:
                if option.startswith("--"):
                    words.options[option] = _choices(action)
    return words


def _choices(action: argparse.Action) -> list[str]:
    """Return the values of an option: its choices, or the lower-case words of its metavar."""
    if action.choices is not None:
        return [str(choice) for choice in action.choices]
    parts = action.metavar.split("|") if isinstance(action.metavar, str) else []
    return [part for part in parts if part.islower()]


def _shipped() -> list[str]:
    """Return the names of the shipped run files, which are valid in every working directory."""
    paths = sorted(path.relative_to(SHIPPED) for path in SHIPPED.rglob("*.json"))
    return [f"configs/{path.as_posix()}" for path in paths if path.name != "schema.json"]


def _bash(table: dict[str, Words], *, zsh: bool) -> str:
    values = "".join(
        f'            {name}:{option}) offered="{" ".join(choices)}" ;;\n'
        for name, words in table.items()
        for option, choices in words.options.items()
        if choices
    )
    cases = "".join(
        f'            {name}) offered="${{offered:-{" ".join(words.commands)}}}"\n'
        f'                options="{" ".join(words.options)}"; files={_kind(words)} ;;\n'
        for name, words in table.items()
    )
    head = "autoload -U +X bashcompinit && bashcompinit\n" if zsh else ""
    # bash marks folders only when files are completed: the command `data` may name a folder, too
    mark, complete = (":", "complete -o filenames") if zsh else ("compopt -o filenames", "complete")
    return f"""{head}_megalite() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}}
    local offered="" options="--help --version" files="" end
    if [ "$COMP_CWORD" = 1 ]; then
        offered="{" ".join(ABOUT)}"
    else
        case ${{COMP_WORDS[1]}}:$before in
{values}        esac
        case ${{COMP_WORDS[1]}} in
{cases}        esac
    fi
    case $word in -*) offered=$options; files="" ;; esac
    if [ "$files" = run ]; then
        offered="$offered {" ".join(_shipped())}"
    fi
    COMPREPLY=($(compgen -W "$offered" -- "$word"))
    [ -z "$files" ] && return
    {mark} 2>/dev/null
    local IFS=$'\\n'
    if [ "$files" = run ]; then
        COMPREPLY+=($(compgen -d -- "$word"))
        for end in {" ".join(_RUN_FILES)}; do
            COMPREPLY+=($(compgen -f -X "!*.$end" -- "$word"))
        done
    else
        COMPREPLY+=($(compgen -f -- "$word"))
    fi
}}
{complete} -F _megalite megalite
"""


def _kind(words: Words) -> str:
    """Return the kind of files that a command accepts: "run", "any", or '""' for none."""
    return ("run" if words.run_files else "any") if words.options else '""'


def _fish(table: dict[str, Words]) -> Iterator[str]:
    yield "-f"
    for name, about in ABOUT.items():
        yield f'-n __fish_use_subcommand -a {name} -d "{about}"'
    for name, words in table.items():
        seen = f"__fish_seen_subcommand_from {name}"
        if words.commands:
            names = " ".join(words.commands)
            yield f"-n '{seen}; and not __fish_seen_subcommand_from {names}' -a '{names}'"
        for option, choices in words.options.items():
            values = f" -x -a '{' '.join(choices)}'" if choices else ""
            yield f"-n '{seen}' -l {option[2:]}{values}"
        if words.options:
            yield f"-n '{seen}' -F"
        if words.run_files:
            yield f"-n '{seen}' -a '{' '.join(_shipped())}'"
