"""README.zh.md has the code and the links of README.md."""

from __future__ import annotations

import re

from tests.pages import ROOT

ENGLISH = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh.md").read_text(encoding="utf-8")


def code(text: str) -> list[str]:
    """Return the indented blocks of a page."""
    lines = [line if line.startswith("    ") else "" for line in text.splitlines()]
    return [block for block in re.split(r"\n\n+", "\n".join(lines).strip("\n")) if block]


def test_chinese_page_has_the_code_blocks_of_the_english_page() -> None:
    assert [block for block in code(CHINESE) if block not in code(ENGLISH)] == []
    assert len(code(CHINESE)) >= 10


def test_chinese_page_has_the_links_of_the_english_page() -> None:
    links = [set(re.findall(r"\]\((.+?)\)", text)) for text in (CHINESE, ENGLISH)]
    assert links[0] - {"README.md"} <= links[1]
    assert "README.zh.md" in links[1]


def test_chinese_page_is_written_in_chinese() -> None:
    prose = re.sub(r"^    .*$|`[^`]*`|\]\([^)]*\)", "", CHINESE, flags=re.MULTILINE)
    prose = re.sub(r"^- \[.*$", "", prose, flags=re.MULTILINE)  # lists of files
    paragraphs = [p for p in prose.split("\n\n") if len(p) > 80 and not p.startswith("|")]
    assert paragraphs
    assert all(len(re.findall(r"[\u4e00-\u9fff]", p)) > len(p) / 4 for p in paragraphs)
