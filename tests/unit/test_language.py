"""The rules of plain English: all files follow them, and the checker detects each kind of fault."""

from __future__ import annotations

import pytest

from tests.language import MAX_WORDS, ROOT, faults_in, project_faults, project_files

# A file, its text, and the first words of the fault.
BAD = (
    ("a.md", "A manifest tells the number of tokens.", "tells"),
    ("a.md", "The ranks stop and start anew.", "anew"),
    ("a.md", "If the key has no effect, leave it out.", "leave it out"),
    ("a.md", "The loader skips the file where it is damaged.", "where it is"),
    ("a.md", "What the loader reads is a shard.", "What the loader"),
    ("a.md", "- Of a run, the newest checkpoint.", "Of a run"),
    ("a.md", "| key | The ranks are told the step. |", "told"),
    ("a.py", '"""Writer of files that know nothing, and was told so."""', "told"),
    ("a.py", "x = 1  # Where the ranks wait.", "Where the ranks"),
    ("a.py", 'raise ValueError("--a: not asked for by any rank")', "asked for"),
    ("a.py", 'def f():\n    """The newest checkpoint."""', "The newest checkpoint."),
    ("a.py", 'def f():\n    """Returns the newest checkpoint."""', "Returns the newest"),
    ("a.py", 'class A:\n    def f(self):\n        """Whether to stop."""', "Whether to stop."),
    ("a.py", "found = f()", "found"),
    ("a.py", "def f(told=None):\n    g()", "told"),
    ("a.py", "def _made():\n    g()", "_made"),
)
GOOD = (
    ("a.md", "The variables `told` and `found` are names."),
    ("a.md", "See the run:\n\n    megalite tells anew\n\n```\nleave it out\n```"),
    ("a.md", "What is a rank? Where does it run?"),
    ("a.md", "## What a user sees"),
    ("a.md", "The folder where the shards lie."),
    ("a.py", 'def f():\n    """Return the newest checkpoint."""'),
    (
        "a.py",
        'class A:\n    """A step."""\n    @property\n    def f(self):\n        """The step."""',
    ),
    ("a.py", 'def test_a():\n    """The newest checkpoint is used."""'),
    ("a.py", 'x = ["told"]'),
    ("a.py", "match.found = True"),
)
# Texts of single tests.
TEXTS = {
    "lines": '"""Module.\n\nThe rank\nis told.\n"""\n\nx = 1\nfound = 2\n',
    "changelog": "## [Unreleased]\n\nA rank is told.\n\n## [0.2.0]\n\nA rank is told.\n\n"
    "## [0.1.0]\n\nRuns start anew.\n",
    "table": "WORDS = (('it is told', 'say'),)\n",
}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout")
def test_project_has_no_language_fault() -> None:
    assert len(project_files()) > 500
    assert [str(fault) for fault in project_faults()] == []


@pytest.mark.parametrize(("file", "text", "words"), BAD)
def test_checker_detects_a_fault(file: str, text: str, words: str) -> None:
    [fault] = faults_in(file, text)
    assert fault.words.startswith(words)


@pytest.mark.parametrize(("file", "text"), GOOD)
def test_checker_accepts_plain_text(file: str, text: str) -> None:
    assert faults_in(file, text) == []


@pytest.mark.parametrize("line", ["{}", "# {}", '"""{}"""'])
def test_sentence_has_at_most_25_words(line: str) -> None:
    file = "a.md" if line == "{}" else "a.py"
    longest = "Word" + " word" * (MAX_WORDS - 1)
    assert faults_in(file, line.format(f"{longest}. {longest}: {longest}.")) == []
    [fault] = faults_in(file, line.format(f"Word {longest}."))
    assert fault.advice == "26 words in a sentence; at most 25"


def test_comment_after_code_does_not_continue_in_the_next_line() -> None:
    half = "word " * 20
    assert faults_in("a.py", f"x = 1  # {half}\n# {half}\n") == []
    assert len(faults_in("a.py", f"# {half}\n# {half}\n")) == 1


def test_fault_has_the_line_of_its_words() -> None:
    faults = faults_in("a.py", TEXTS["lines"])
    assert [(fault.line, fault.words) for fault in faults] == [(4, "told"), (8, "found")]


def test_entries_of_published_releases_are_skipped() -> None:
    assert [fault.line for fault in faults_in("CHANGELOG.md", TEXTS["changelog"])] == [3]
    assert [fault.line for fault in faults_in("a.md", TEXTS["changelog"])] == [3, 7, 11]


def test_only_the_tables_of_the_checker_are_skipped() -> None:
    table = TEXTS["table"]
    assert faults_in("tests/language.py", table) == []
    assert len(faults_in("tests/language.py", table.replace("WORDS", "OTHER"))) == 1
    assert len(faults_in("megalite/cli.py", table)) == 1
