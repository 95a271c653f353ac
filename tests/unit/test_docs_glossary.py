"""docs/glossary.md explains the abbreviations of the pages and of --help."""

from __future__ import annotations

import re

import pytest

from tests.pages import ROOT, actions, parsers

# words that need no explanation: placeholders of values, names of files, names of products
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
    """Return the pages without code and links, and the descriptions of the commands."""
    paths = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    for code in (r"^```.*?^```$", r"^    .*$", r"`[^`\n]*`", r"\]\([^)]*\)"):
        text = re.sub(code, " ", text, flags=re.MULTILINE | re.DOTALL if "```" in code else re.M)
    return text + "\n".join(parser.description or "" for _, parser in parsers())


def terms() -> list[str]:
    """Return the terms in the first column."""
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    return re.findall(r"^\| ([^|]+?) \| ", text, re.MULTILINE)[2:]


def test_glossary_explains_every_abbreviation() -> None:
    explained = {word for term in terms() for word in re.findall(r"[\w-]+", term)}
    options = [action for _, parser in parsers() for action in actions(parser)]
    values = {word for action in options for word in re.findall(r"\w+", str(action.metavar))}
    used = set(re.findall(r"\b[A-Z][a-z]*[A-Z][A-Za-z]*(?:-\d+)?\b", prose()))
    used = {re.sub(r"(?<=[A-Z])s$|-[0-4]$", "", word) for word in used}
    assert sorted(used - explained - values - PLACEHOLDERS - NAMES) == []
    assert len(used & explained) > 30


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
def test_glossary_has_the_terms_of_the_field(words: tuple[str, ...]) -> None:
    assert set(words) <= set(terms())


def test_glossary_is_sorted_and_has_no_term_twice() -> None:
    assert terms() == sorted(set(terms()), key=str.lower)
