"""Checker of the rules of plain English: words, openings, docstrings, sentences and names.

    python -m tests.language megalite/plan docs/data.md    (without a path: the whole project)

prints one line per fault. CONTRIBUTING.md lists the rules. The checker reads docstrings, comments,
strings with two spaces or more, and Markdown outside code blocks. Words in backquotes are names and
are not checked. The entries of published releases in CHANGELOG.md are not checked either.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
MAX_WORDS = 25

# These tables of the checker and of its test contain the faults as examples, so they are skipped.
TABLES = {
    "tests/language.py": ("WORDS", "OPENINGS"),
    "tests/unit/test_language.py": ("BAD", "GOOD", "TEXTS"),
}
# A pattern and the plain word for it.
WORDS = (
    (r"told|tells?|telling", "say, state, report; a file contains, defines"),
    (r"anew", "again"),
    (r"alike", "identical, equally"),
    (r"beside", "next to, with"),
    (r"apart(?! from)|set apart", "separately, separate"),
    (r"lone|lonely", "single"),
    (r"of use", "useful"),
    (r"mend(s|ed|ing)?", "fix"),
    (r"asked for|asks for|ask for|as asked", "requested, required"),
    (r"knows|knew", "a function does not know: has, reads, contains"),
    (r"le(ave|aves|aving|ft) (it|them|that|this|those|a \w+|the \w+) out|left out", "remove, omit"),
    (r"foretold|foretell", "predicted, predict"),
    (
        r"where (there|it|that|none|one|nothing|nobody|they|this|a|the|no) [^.,;:]*?"
        r"\b(is|are|has|have|can|does|do|was|may|must)",
        "if or when; use where for places only",
    ),
)
OPENINGS = (
    (r"What\b(?![^.?!]*\?)", "start with the subject, not with 'What ...'"),
    (r"Of\b", "start with the subject, not with 'Of ...'"),
    (r"Where\b(?![^.?!]*\?)", "start with the subject, or with 'if' or 'when' for a condition"),
    (r"(Who|Whoever|Which)\b(?![^.?!]*\?)", "start with the subject"),
)
# A function's docstring is an imperative, so it does not begin with these words.
NOT_IMPERATIVE = re.compile(
    r"(The|A|An|What|Whether|Where|Of|How|Which|Who|Every|Each|All|Both|One|Two|No|None|Only|If|In"
    r"|On|At|By|For|From|With|As|This|These|That|Its|It|Is|Are|Has|True|False|Like|Same|Names"
    r"|Bytes|Seconds|Number|Line|Lines|Text|Paths?|Rows?|Words|Tokens|Returns|Yields|Raises|Makes"
    r"|Gives|Writes|Reads|Adds|Sets|Gets|Checks|Computes|Loads|Saves|Runs|Builds|Creates|Finds)\b"
)
# Variables and arguments that do not say what they hold.
NAMES = frozenset(["told", "found", "made", "own", "kept", "held", "asked", "wish"])
_CODE = re.compile(r"``[^`]*``|`[^`]*`")
_RELEASE = re.compile(r"^## \[\d", re.MULTILINE)  # the heading of a published release
# A sentence ends at its full stop, and at the borders of list items, columns, commands, and
# entries of Args and Attributes.
_SENTENCE_END = re.compile(
    r"(?<=[.!?:])\s+(?=[A-Z(`\"'\[])|\n\s*\n|\n\s*[-*|\d]+[.)]?\s|;\s"
    r"|\n\s*(?=(?:python|mpirun|srun|torchrun|megalite) )"
    r"|(?<=\S) {2,}(?=\S)|\n +(?=\w+(, \w+)*: )"
)


class Fault(NamedTuple):
    """A line of a file, the faulty words, and the advice."""

    file: str
    line: int
    words: str
    advice: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.words!r}: {self.advice}"


class Prose(NamedTuple):
    """A text for readers. The kind is docstring, function, comment, string or page."""

    line: int
    text: str
    kind: str


def python_prose(source: str, tables: Sequence[str] = ()) -> Iterator[Prose]:
    """Yield the docstrings, comments and prose strings of a Python source.

    Args:
        tables: names of module variables whose strings are skipped.
    """
    tree = ast.parse(source)
    docstrings = set()
    skipped = {id(part) for node in tree.body if _is_table(node, tables) for part in ast.walk(node)}
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, holders) and (text := ast.get_docstring(node)):
            constant = node.body[0].value  # type: ignore[attr-defined]
            docstrings.add(id(constant))
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            is_property = function and any(
                "property" in ast.unparse(d) for d in node.decorator_list
            )
            statement = is_property or (function and node.name.startswith("test_"))
            kind = "function" if function and not statement else "docstring"
            yield Prose(constant.lineno, text, kind)
    skipped |= docstrings
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and id(node) not in skipped and text.strip().count(" ") >= 2:
            yield Prose(node.lineno, text, "string")
    yield from _comments(source)


def _is_table(node: ast.stmt, tables: Sequence[str]) -> bool:
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in tables


def _comments(source: str) -> Iterator[Prose]:
    """Yield each block of comment lines as one text, and each comment after code by itself."""
    block: list[tuple[int, str]] = []
    in_block = False  # if false, the last comment follows code
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        own_line = token.line.strip().startswith("#")
        if block and not (in_block and own_line and token.start[0] == block[-1][0] + 1):
            yield Prose(block[0][0], "\n".join(text for _, text in block), "comment")
            block = []
        in_block = own_line
        block.append((token.start[0], token.string.lstrip("#:! ")))
    if block:
        yield Prose(block[0][0], "\n".join(text for _, text in block), "comment")


def name_faults(file: str, source: str) -> Iterator[Fault]:
    """Yield the variables, arguments and functions whose name does not say what they are."""
    for node in ast.walk(ast.parse(source)):
        name = ""
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        elif isinstance(node, ast.arg):
            name = node.arg
        elif isinstance(node, ast.FunctionDef):
            name = node.name
        if name.strip("_") in NAMES:
            yield Fault(file, node.lineno, name, "a name that says what it is")


def page_prose(text: str) -> Iterator[Prose]:
    """Yield the paragraphs of a Markdown page, without code blocks and targets of links."""
    fenced = False
    paragraph: list[str] = []
    start = 1
    for number, line in enumerate([*text.splitlines(), ""], 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
            line = ""
        if fenced or line.startswith("    ") or not line.strip():
            if paragraph:
                yield Prose(start, "\n".join(paragraph), "page")
            paragraph = []
            continue
        if not paragraph:
            start = number
        paragraph.append(re.sub(r"\]\([^)]*\)", "]", line))


def faults_of(file: str, prose: Prose) -> Iterator[Fault]:
    """Yield the faults of one text."""
    text = _CODE.sub(lambda match: "`" + "x" * (len(match[0]) - 2) + "`", prose.text)

    def at(position: int) -> int:
        return prose.line + text.count("\n", 0, position)

    for pattern, advice in WORDS:
        for match in re.finditer(rf"\b(?:{pattern})\b", text, re.IGNORECASE):
            yield Fault(file, at(match.start()), match[0][:40], advice)
    if prose.kind == "function" and (match := NOT_IMPERATIVE.match(text)):
        yield Fault(
            file,
            prose.line,
            text.split("\n")[0][:40],
            "begin with an imperative: Return, Yield, Raise ...",
        )
    starts = [0, *(match.end() for match in _SENTENCE_END.finditer(text))]
    for begin, end in zip(starts, [*starts[1:], len(text)], strict=True):
        sentence = text[begin:end].strip(" |#>*-\n")
        for pattern, advice in OPENINGS:
            title = text[begin:end].lstrip().startswith("#")
            if prose.kind != "string" and not title and re.match(pattern, sentence):
                yield Fault(file, at(begin), sentence[:40].replace("\n", " "), advice)
        words = re.findall(r"[A-Za-z0-9`'_./%-]*[A-Za-z][A-Za-z0-9`'_./%-]*", sentence)
        if prose.kind != "string" and "|" not in sentence and len(words) > MAX_WORDS:
            yield Fault(
                file,
                at(begin),
                sentence[:40].replace("\n", " "),
                f"{len(words)} words in a sentence; at most {MAX_WORDS}",
            )


def faults_in(file: str, text: str) -> list[Fault]:
    """Return the faults in the text of a Python file or a Markdown page.

    Args:
        file: the path below the root of the project.
    """
    if file.endswith(".py"):
        faults = set(name_faults(file, text))
        texts = python_prose(text, TABLES.get(file, ()))
    else:
        faults = set()
        texts = page_prose(_RELEASE.split(text)[0] if file == "CHANGELOG.md" else text)
    faults.update(fault for prose in texts for fault in faults_of(file, prose))
    return sorted(faults)


def project_faults(*below: str) -> list[Fault]:
    """Return the faults of the whole project, or of the files below some paths."""
    return [
        fault
        for path in project_files(*below)
        for fault in faults_in(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    ]


def project_files(*below: str) -> list[Path]:
    """Return the tracked Python files and English pages, all of them or those below some paths."""
    listed = subprocess.run(
        ["git", "ls-files", *below], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = [name for name in listed.stdout.split() if name.endswith((".py", ".md"))]
    return [ROOT / name for name in names if ".zh." not in name and (ROOT / name).exists()]


def main() -> None:
    """Print the faults of the files below the given paths."""
    faults = project_faults(*sys.argv[1:])
    sys.stdout.write("".join(f"{fault}\n" for fault in faults))
    sys.stdout.write(f"{len(faults)} faults\n")


if __name__ == "__main__":
    main()
