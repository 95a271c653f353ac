"""Generator of docs/api.md from public docstrings; `python -m tests.pages` runs it."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import megalite

ROOT = Path(__file__).resolve().parents[1]
API_PAGE = ROOT / "docs" / "api.md"
EXAMPLES = ROOT / "examples"
_FUNCTIONS = ("pretrain", "finetune", "load", "make_plan", "open_shards")
_CLASSES = ("RunResult", "Model", "Shards", "Hook", "StepReport", "SaveReport", "Outcome")
_SECTIONS = ("Args", "Attributes", "Returns", "Raises")

_INTRODUCTION = """\
# The library

`python -m tests.pages` generates this page from docstrings. `import megalite` imports no other
module. A name is imported when it is first used, and torch is imported when something is computed.
One process is one rank, so a script or a notebook needs no launcher. A script under `torchrun`
trains on all ranks.

This is `examples/pretrain.py`:

```python
{source}
```

A test runs this example and the others:

{others}

## Several runs, signals, messages

Several runs in one process give the losses and norms of fresh processes, bit for bit, in any
sequence. When an engine closes, it restores the torch functions that DeepSpeed has replaced.
`tests/dist/test_library.py` checks both.

Ctrl-C, or an interrupted kernel, saves and stops a run. A run in a thread gets no signals; a hook
that returns `Outcome(stop=True)` stops the run. A second run at the same time is refused. A run
that hangs ends its process (`guards.hang_seconds`).

Progress goes to standard error, one line every `training.log_every` steps. If a program has added a
handler to the logger `megalite`, the messages go to this handler instead.

Losses are in nats, sizes in bytes, times in seconds. Shapes name their dimensions: T is tokens.
`megalite/errors.py` defines the errors. A `UserError` means that nothing was written. Its
subclasses are `ConfigError`, `DataError`, `CommandError` and `LaunchError`. Any other
`MegaLiteError` is a failure of the run. No function ends the process."""
ABOUT = {
    "pretrain.py": "pretrains a small model in ten lines",
    "own_dataset.py": "trains a tokenizer on your own texts, and a model on their shards",
    "own_objective.py": "registers an objective and trains with it",
    "lora_chat.py": "fine-tunes LoRA adapters on conversations and chats with the model",
    "notebook.ipynb": "plans a run, trains, generates text and trains in a thread, in a notebook",
}
_CONFIG = """\
## `megalite.RunConfig`

A validated run file: a frozen object with the sections of [configuration.md](configuration.md) as
attributes (`config.training.steps`). `pretrain`, `finetune` and `make_plan` accept a `RunConfig` in
place of a dictionary or a path."""


def api_page() -> str:
    """Return the page, in Markdown."""
    others = [
        f"- `examples/{name}` {about}" for name, about in ABOUT.items() if name != "pretrain.py"
    ]
    source = (EXAMPLES / "pretrain.py").read_text(encoding="utf-8").strip()
    head = _INTRODUCTION.format(source=source, others="\n".join(others))
    parts = [head]
    parts += [_function(f"megalite.{name}", getattr(megalite, name), "##") for name in _FUNCTIONS]
    for name in _CLASSES:
        parts.append(_class(name, getattr(megalite, name)))
    return "\n\n".join([*parts, _CONFIG]) + "\n"


def _function(name: str, function: Any, level: str) -> str:
    """Return the section of a function or method: signature, description and tables."""
    signature = _signature(function)
    lines = [f"{level} `{name}`", "", "```python", f"{name}{signature}", "```", ""]
    return "\n".join([*lines, *_description(inspect.getdoc(function) or "")]).rstrip()


def _class(name: str, item: Any) -> str:
    """Return the section of a class, with its public methods and properties."""
    lines = [f"## `megalite.{name}`", "", *_description(inspect.getdoc(item) or "")]
    parts = ["\n".join(lines).rstrip()]
    for member, value in vars(item).items():
        if isinstance(value, property):
            text = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
            rest = (inspect.getdoc(value) or "").split("\n\n")[1:]
            parts.append("\n\n".join([f"### `{name}.{member}`", text, *rest]))
        elif inspect.isfunction(value) and (member[0] != "_" or member in _OPERATORS):
            shown = _OPERATORS.get(member, f"{name}.{member}")
            parts.append(_function(shown, value, "###"))
    return "\n\n".join(parts)


_OPERATORS = {"__len__": "len", "__getitem__": "shards[index]"}


def _signature(function: Any) -> str:
    """Return a signature with the annotations of the source, without self."""
    signature = inspect.signature(function)
    if function.__name__ == "__len__":
        return "(shards) -> int"
    if function.__name__ == "__getitem__":
        return " -> Tensor"
    parts: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        if parameter.name != "self":
            parts.append(f"{parameter.name}: {parameter.annotation}{default}")
    line = f"({', '.join(parts)}) -> {signature.return_annotation}"
    if len(line) < 60:
        return line
    return (
        "\n    ".join(["(", *(f"{part}," for part in parts)])
        + f"\n) -> {signature.return_annotation}"
    )


def _description(docstring: str) -> Iterator[str]:
    """Yield a docstring in Google's style as prose and tables."""
    pattern = rf"^({'|'.join(_SECTIONS)}):\n"
    prose, *rest = re.split(pattern, docstring, flags=re.MULTILINE)
    yield from (prose.strip(), "")
    for title, body in zip(rest[::2], rest[1::2], strict=True):
        if title == "Returns":
            yield from (f"Returns {' '.join(body.split())}", "")
            continue
        head = {"Args": "argument", "Attributes": "attribute", "Raises": "raises"}[title]
        yield from (f"| {head} | |", "| --- | --- |")
        yield from (f"| {name} | {text} |" for name, text in _items(body))
        yield ""


def _items(body: str) -> list[tuple[str, str]]:
    """Return the names and texts of a section's items."""
    items: list[tuple[str, str]] = []
    for line in textwrap.dedent(body).splitlines():
        item = re.match(r"([\w, ]+): (.*)", line)
        if item and not line.startswith(" "):
            names = ", ".join(f"`{name}`" for name in item[1].split(", "))
            items.append((names, item[2]))
        elif line.strip():
            name, text = items.pop()
            items.append((name, f"{text} {line.strip()}"))
    return items
