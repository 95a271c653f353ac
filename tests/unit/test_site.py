"""docs/ builds as a site: no dead link or anchor, no page omitted, nothing from elsewhere."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import ROOT

LINK = r"\]\(([^)\s]+)\)"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_in_the_site_and_can_be_searched(site: Path) -> None:
    entries = json.loads((site / "search" / "search_index.json").read_text("utf-8"))["docs"]
    searched = {entry["location"].partition("#")[0] for entry in entries}
    for page in (ROOT / "docs").glob("*.md"):
        place = "" if page.stem == "index" else f"{page.stem}/"
        assert (site / place / "index.html").is_file()
        assert place in searched


def test_a_page_fetches_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text("utf-8")
        assert re.findall(r"<(?:script|img|link)[^>]* (?:src|href)=\"?(?:https?:)?//", text) == []


def test_tables_and_blocks_are_drawn(site: Path) -> None:
    """What GitHub takes for a table, a list or a block must not end up as a paragraph."""
    for page in site.rglob("index.html"):
        text = re.sub(r"<(pre|code)\b.*?</\1>", "", page.read_text("utf-8"), flags=re.DOTALL)
        assert re.findall(r"<p>\s*\||^\|.*\|$|```", text, re.MULTILINE) == []
        assert re.findall(r"^(?:- |\d\. )\S", text, re.MULTILINE) == []


def github_anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize(
    "page",
    sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")]),
    ids=lambda page: page.name,
)
def test_links_hold_on_github_too(page: Path) -> None:
    """Pages of the site link to each other alone; files of the repository are named, not linked."""
    for link in re.findall(LINK, page.read_text("utf-8")):
        path, _, anchor = link.partition("#")
        if path.startswith(("https://", "http://")):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert page.parent != ROOT / "docs" or target.parent == page.parent, link
        assert not anchor or anchor in github_anchors(target), link
