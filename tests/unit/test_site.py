"""The site of docs/ builds: no dead link or anchor, every page, no file of another server."""

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
    """Return the folder of the built site."""
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def test_site_has_every_page_and_its_search_entry(site: Path) -> None:
    entries = json.loads((site / "search" / "search_index.json").read_text("utf-8"))["docs"]
    searched = {entry["location"].partition("#")[0] for entry in entries}
    for page in (ROOT / "docs").glob("*.md"):
        location = "" if page.stem == "index" else f"{page.stem}/"
        assert (site / location / "index.html").is_file()
        assert location in searched


def test_site_loads_no_file_of_another_server(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text("utf-8")
        assert re.findall(r"<(?:script|img|link)[^>]* (?:src|href)=\"?(?:https?:)?//", text) == []


def test_site_renders_the_tables_lists_and_blocks_of_github(site: Path) -> None:
    """A table, a list or a block on GitHub must not become a paragraph of the site."""
    for page in site.rglob("index.html"):
        text = re.sub(r"<(pre|code)\b.*?</\1>", "", page.read_text("utf-8"), flags=re.DOTALL)
        assert re.findall(r"<p>\s*\||^\|.*\|$|```", text, re.MULTILINE) == []
        assert re.findall(r"^(?:- |\d\. )\S", text, re.MULTILINE) == []


def github_anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes from the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize(
    "page",
    sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")]),
    ids=lambda page: page.name,
)
def test_links_are_valid_on_github(page: Path) -> None:
    """A page of the site links only to other pages. It names files of the repository as code."""
    for link in re.findall(LINK, page.read_text("utf-8")):
        path, _, anchor = link.partition("#")
        if path.startswith(("https://", "http://")):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert page.parent != ROOT / "docs" or target.parent == page.parent, link
        assert not anchor or anchor in github_anchors(target), link
