"""Every message that docs/errors.md quotes is in the sources."""

from __future__ import annotations

import ast
import re
import signal
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.pages import ROOT

FOREIGN = {  # messages of other packages, and the files that contain them
    "OutOfMemoryError": "torch/cuda/__init__.py",
    "Setting accelerator to CPU": "deepspeed/accelerator/real_accelerator.py",
    "Unable to find hostfile": "deepspeed/launcher/runner.py",
    "Unrecognized model in": "transformers/models/auto/configuration_auto.py",
}


def messages() -> list[str]:
    """Return the messages in code font in the first column."""
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (.+?) \| ", page, re.MULTILINE)
    return [message for cell in cells for message in re.findall(r"^`(.+?)`", cell)]


def message_of(node: ast.AST) -> str | None:
    """Return the message in a string or f-string, with a NUL for each variable part."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[.\d]*[sdfgr]", "\0", node.value.replace("%%", "%"))
    if isinstance(node, ast.JoinedStr):
        return "".join(message_of(value) or "\0" for value in node.values)
    return None


@cache
def sources() -> str:
    """Return all strings of the code and all lines of the job scripts, one per line."""
    texts = []
    for folder in ("megalite", "data_prep", "launcher"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            texts += [text for node in ast.walk(tree) if (text := message_of(node))]
    for path in (ROOT / "slurm").iterdir():
        texts += path.read_text(encoding="utf-8").splitlines()
    return "\n".join(text.replace("\n", " ") for text in texts)


def is_written(message: str) -> bool:
    """Return whether one string of the sources contains all parts of a message, in order."""
    parts = [re.escape(part.strip()) for part in message.split("...") if part.strip(" .;")]
    return bool(parts) and re.search(".*".join(parts), sources()) is not None


@pytest.mark.parametrize("message", messages())
def test_quoted_message_is_in_the_sources(message: str) -> None:
    if message in FOREIGN:
        spec = find_spec(FOREIGN[message].split("/")[0])
        assert spec is not None
        assert spec.origin is not None
        file = Path(spec.origin).parents[1] / FOREIGN[message]
        assert message in file.read_text(encoding="utf-8")
    elif message != signal.strsignal(signal.SIGKILL):
        assert is_written(message)


def test_message_that_is_not_in_the_sources_is_detected() -> None:
    assert len(messages()) > 50
    assert is_written("the launch is incomplete: ...")
    assert not is_written("the launch is all set: ...")
    assert not is_written("start with deepspeed ... the launch is incomplete")
