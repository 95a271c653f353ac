"""docs/glossary.md has the words of the pages and of --help."""

from __future__ import annotations

import re

import pytest

from tests.pages import ROOT, actions, parsers

# not words of the trade: what a user puts in their place, files by name, products
PLACEHOLDERS = {"ADDRESS", "COMMAND", "CONFIG", "DIR", "ID", "ORG", "REVISION", "RUN", "SPLIT"}
PLACEHOLDERS |= {"KIND", "TERM"}
NAMES = {"ARCHITECTURE", "CONTRIBUTING", "README", "SECURITY", "COMPLETED", "FAILED", "IMDB"}
NAMES |= {
    "MegaLite",
    "MiniLM",
    "ShareGPT",
    "SmolLM",
    "NeoX",
    "NVIDIA",
    "OLMo",
    "PyTorch",
    "PyArrow",
    "PipelineModule",
}


def prose() -> str:
    """Return the pages without code and links, and what commands say of themselves."""
    paths = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    for code in (r"^```.*?^```$", r"^    .*$", r"`[^`\n]*`", r"\]\([^)]*\)"):
        text = re.sub(code, " ", text, flags=re.MULTILINE | re.DOTALL if "```" in code else re.M)
    return text + "\n".join(parser.description or "" for _, parser in parsers())


def terms() -> list[str]:
    """Return what the first column names, as it stands there."""
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    return re.findall(r"^\| ([^|]+?) \| ", text, re.MULTILINE)[2:]


def test_every_abbreviation_is_explained() -> None:
    known = {word for term in terms() for word in re.findall(r"[\w-]+", term)}
    asked = {str(action.metavar) for _, parser in parsers() for action in actions(parser)}
    asked = {word for metavar in asked for word in re.findall(r"\w+", metavar)}
    found = set(re.findall(r"\b[A-Z][a-z]*[A-Z][A-Za-z]*(?:-\d+)?\b", prose()))
    bare = {re.sub(r"(?<=[A-Z])s$|-[0-4]$", "", word) for word in found}
    assert sorted(bare - known - asked - PLACEHOLDERS - NAMES) == []
    assert len(bare & known) > 30


@pytest.mark.parametrize(
    "words",
    [
        ("rank", "world size", "data parallelism", "tensor parallelism", "sequence parallelism"),
        ("micro-batch", "gradient accumulation", "recompute", "activation checkpointing", "ZeRO"),
        ("warmup", "loss scale", "perplexity", "packing", "shard", "checkpoint", "memmap"),
        ("goodput", "roofline", "gloo", "NCCL", "MFU", "GQA", "RoPE", "LoRA", "SFT", "offload"),
    ],
    ids=" ".join,
)
def test_the_words_of_the_trade_are_there(words: tuple[str, ...]) -> None:
    assert set(words) <= set(terms())


def test_the_list_is_in_order_and_has_no_word_twice() -> None:
    assert terms() == sorted(set(terms()), key=str.lower)
