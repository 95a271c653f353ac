"""Options, keys and files named on the pages exist, and the commands on them can be parsed."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megalite.commands import _take_ranks
from megalite.config.__main__ import json_schema
from megalite.config.deepspeed_tables import REFUSED
from megalite.config.faults import known_keys
from tests.pages import PAGE, ROOT, actions, commands_page, parsers

PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("README*.md")])
PARSERS = dict(parsers())
NAMES = [name.split()[-1] for name in PARSERS]
# options of other programs
FOREIGN = {
    "deepspeed": "--num_gpus --no_ssh --master_port --module --no_python",
    "torchrun": "--nproc-per-node --master-port --no-python",
    "mkdocs": "--strict",
    "mpirun and srun": "--nodes --ntasks-per-node --ntasks",
    "sbatch": "--gpus-per-node --cpus-per-task --open-mode --signal --export",
    "squeue": "--me",
    "pip": "--no-deps",
    "hf": "--local-dir",
    "others": "--logdir --quiet --help --version --run-folder --shm-size",
}
# keys that are examples of mistakes
MISSPELT = {"deepspeed.gradient_cliping", "optimizer.lrr"}
# files of the user, and a file that must not exist
ABSENT = {"configs/mine.json", "slurm/site.env", "launcher/profile.py"}


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(text: str) -> str:
    """Return the fenced and indented code of a page, with continued lines joined."""
    fenced = re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    code = "\n".join([*fenced, *re.findall(r"^    .*$", text, re.MULTILINE)])
    return code.replace("\\\n", " ")


def spans(text: str) -> list[str]:
    """Return the texts in code font."""
    plain = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", plain)


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield MegaLite's commands in the code of a page: name of the parser, and arguments."""
    starts = r"\b(?:python|deepspeed|torchrun|srun|mpirun|sbatch)\b.*?"
    files = r"launcher/(?!smoke)\w+\.py|-m data_prep [\w-]+|slurm/\w+\.sbatch"
    command = rf"(?<![\w./-])megalite (?:data )?(?:{'|'.join(NAMES)})\b"
    ours = rf"(?:{starts}(?P<file>{files})|(?P<command>{command}))(?P<rest>.*)"
    for match in re.finditer(ours, blocks(text)):
        lexer = shlex.shlex(match["rest"], posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in lexer:
            if re.fullmatch(r"[();<>|&]+", word):
                break
            words.append(word)
        name = re.sub(r"launcher/(\w+)\.py|-m data_prep", _as_command, match["file"] or "")
        yield name or match["command"], words


def _as_command(file: re.Match[str]) -> str:
    return f"megalite {file[1] or 'data'}"


def test_page_of_commands_is_up_to_date() -> None:
    assert text_of(PAGE) == commands_page(), "run `python -m tests.pages`"


def test_page_of_commands_documents_every_option() -> None:
    parts = re.split(r"^## (.+)$", text_of(PAGE), flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert list(sections) == list(PARSERS)
    for name, parser in PARSERS.items():
        for action in actions(parser):
            assert action.help, f"{name} {action.dest} has no help"
            for option in action.option_strings[-1:] or [str(action.metavar)]:
                assert f"`{option}` |" in sections[name]


def option_faults(text: str) -> list[str]:
    """Return options that no command has."""
    known = {option for parser in PARSERS.values() for option in parser._option_string_actions}
    known |= {option for options in FOREIGN.values() for option in options.split()}
    for script in (ROOT / "benchmarks").glob("*.py"):
        known |= set(re.findall(r'"(--[\w-]+)"', text_of(script)))
    return sorted(set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) - known)


def command_faults(text: str) -> list[str]:
    """Return commands that their parsers refuse."""
    faults = []
    for name, words in commands(text):
        if "..." in words or not words:
            continue  # an excerpt
        command = name
        if name.startswith("slurm/"):
            stem = Path(name).stem
            command = "megalite data tokenize" if stem == "prep" else f"megalite {stem}"
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                PARSERS[command].parse_args(_take_ranks(words)[1])
        except (SystemExit, KeyError):
            faults.append(f"{name} {shlex.join(words)}")
    return faults


def key_faults(text: str) -> list[str]:
    """Return dotted keys that no run file has."""
    known = {".".join(key) for key in known_keys()}
    sections = {key.split(".")[0] for key in known}
    given = [word for _, words in commands(text) for word in words if "=" in word]
    named = set()
    for word in [*spans(text), *given]:
        for key in re.findall(r"(?<![\w./-])[a-z_]+(?:\.[a-z_0-9]+)+(?![\w*/(-])", word):
            file = key.endswith((".json", ".md", ".py", ".jsonl", ".sh", ".safetensors"))
            parameter = key.startswith(("model.layers.", "model.embed_", "model.encoder."))
            if key.split(".")[0] in sections and not file and not parameter:
                named.add(re.sub(r"\.\d+", "", key))
    return sorted(key for key in named - known - MISSPELT if not is_deepspeed_key(key))


def is_deepspeed_key(key: str) -> bool:
    """Return whether the deepspeed section contains a key, or refuses it by name."""
    schema = json_schema()["properties"]["deepspeed"]
    first, _, name = key.partition(".")
    if first != "deepspeed" or name in REFUSED:
        return first == "deepspeed"
    for part in name.split("."):
        if "properties" not in schema:  # only DeepSpeed checks the keys below
            return True
        if part not in schema["properties"]:
            return False
        schema = schema["properties"][part]
    return True


def file_faults(text: str) -> list[str]:
    """Return files of the repository that do not exist."""
    folders = "megalite|data_prep|launcher|configs|slurm|tests|benchmarks|docs|examples"
    pattern = rf"(?<![\w/.-])(?:{folders})/[\w./*-]*[\w*]"
    named = {word for span in spans(text) for word in re.findall(pattern, span)}
    given = {word for _, words in commands(text) for word in words}
    named |= {word for word in given if re.fullmatch(r"configs/[\w/]+\.json", word)}
    return [name for name in sorted(named - ABSENT) if not any(ROOT.glob(name))]


RULES = (option_faults, command_faults, key_faults, file_faults)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_page_names_only_what_exists(path: Path, rule: Callable[[str], list[str]]) -> None:
    assert rule(text_of(path)) == []


@pytest.mark.parametrize(
    ("rule", "text", "faults"),
    [
        (option_faults, "`--set` and `--sett`", ["--sett"]),
        (command_faults, "    python launcher/eval.py --data x", ["megalite eval --data x"]),
        (command_faults, "    megalite plan 7b.json --nods 2", ["megalite plan 7b.json --nods 2"]),
        (command_faults, "    srun megalite pretrain --ranks 2 --set a=1 mine.yaml", []),
        (command_faults, "```bash\npython -m data_prep inspect x || true\n```", []),
        (command_faults, "    sbatch -N 2 slurm/pretrain.sbatch configs/1b.json --set a=1", []),
        (
            command_faults,
            "    sbatch slurm/prep.sbatch configs/1b.json",
            ["slurm/prep.sbatch configs/1b.json"],
        ),
        (
            key_faults,
            "`training.steps` `training.stepz` `model.layers.0.mlp` `data.md` `data.train.0.path`",
            ["training.stepz"],
        ),
        (key_faults, "`deepspeed.zero_optimization.stage`, `deepspeed.amp`", []),
        (
            key_faults,
            "`deepspeed.zero_optimization.stagee`",
            ["deepspeed.zero_optimization.stagee"],
        ),
        (key_faults, "    python launcher/plan.py --set schedule.nam=1", ["schedule.nam"]),
        (file_faults, "`megalite/mesh.py`, `megalite/shape.py`", ["megalite/shape.py"]),
    ],
)
def test_rule_detects_its_fault(
    rule: Callable[[str], list[str]], text: str, faults: list[str]
) -> None:
    assert rule(text) == faults


def test_pages_contain_every_command() -> None:
    names = [name for path in PAGES for name, _ in commands(text_of(path))]
    assert set(names) >= set(PARSERS)
    assert len(names) > 80


def test_page_of_extensions_lists_the_methods_of_a_sink() -> None:
    section = text_of(ROOT / "docs" / "extending.md").split("## A sink of metrics")[1]
    for name in ("tensorboard", "wandb"):
        source = text_of(ROOT / "megalite" / "observe" / f"{name}.py")
        public = re.findall(r"^    def ([a-z]\w*)\(", source, re.MULTILINE)
        assert sorted(re.findall(r"`(\w+)\(", section)) == sorted(public)
