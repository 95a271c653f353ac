"""The rules of plain English that a program can check: words, openings, docstrings, sentences.

    python -m tests.language megalite/plan docs/data.md    (no argument: the whole project)

prints one line per fault. CONTRIBUTING.md lists the rules. Prose is what a person reads:
docstrings, comments, strings with a space in them, and Markdown outside code blocks. Words in
backquotes are names and are not checked.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
MAX_WORDS = 25

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
        "if or when; where is a place",
    ),
)
OPENINGS = (
    (r"What\b(?![^.?!]*\?)", "start with the subject, not with 'What ...'"),
    (r"Of\b", "start with the subject, not with 'Of ...'"),
    (r"Where\b(?![^.?!]*\?)", "'Where ...': start with the subject; conditions are 'if' or 'when'"),
    (r"(Who|Whoever|Which)\b(?![^.?!]*\?)", "start with the subject"),
)
# A function's docstring is an imperative: none of these words begins one.
NOT_IMPERATIVE = re.compile(
    r"(The|A|An|What|Whether|Where|Of|How|Which|Who|Every|Each|All|Both|One|Two|No|None|Only|If|In"
    r"|On|At|By|For|From|With|As|This|These|That|Its|It|Is|Are|Has|True|False|Like|Same|Names"
    r"|Bytes|Seconds|Number|Line|Lines|Text|Paths?|Rows?|Words|Tokens|Returns|Yields|Raises|Makes"
    r"|Gives|Writes|Reads|Adds|Sets|Gets|Checks|Computes|Loads|Saves|Runs|Builds|Creates|Finds)\b"
)
# Variables and arguments that do not say what they hold.
NAMES = frozenset(["told", "found", "made", "own", "kept", "held", "asked", "wish"])
_CODE = re.compile(r"``[^`]*``|`[^`]*`")
# A sentence ends at its full stop, and at the borders of list items, columns, commands, and
# entries of Args and Attributes.
_SENTENCE_END = re.compile(
    r"(?<=[.!?:])\s+(?=[A-Z(`\"'\[])|\n\s*\n|\n\s*[-*|\d]+[.)]?\s|;\s"
    r"|\n\s*(?=(?:python|mpirun|srun|torchrun|megalite) )"
    r"|(?<=\S) {2,}(?=\S)|\n +(?=\w+(, \w+)*: )"
)


class Fault(NamedTuple):
    """A line of a file, the words at fault, and the advice."""

    file: str
    line: int
    found: str
    advice: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.found!r}: {self.advice}"


class Prose(NamedTuple):
    """A piece of text a person reads: its kind is docstring, function, comment, string or page."""

    line: int
    text: str
    kind: str


def python_prose(source: str) -> Iterator[Prose]:
    """Yield the docstrings, comments and prose strings of a Python source."""
    tree = ast.parse(source)
    docstrings = set()
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
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and id(node) not in docstrings and text.strip().count(" ") >= 2:
            yield Prose(node.lineno, text, "string")
    yield from _comments(source)


def _comments(source: str) -> Iterator[Prose]:
    """Yield each block of comment lines as one text, and each comment after code by itself."""
    block: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        alone = token.line.strip().startswith("#")
        if block and not (alone and token.start[0] == block[-1][0] + 1):
            yield Prose(block[0][0], "\n".join(text for _, text in block), "comment")
            block = []
        block.append((token.start[0], token.string.lstrip("#:! ")))
    if block:
        yield Prose(block[0][0], "\n".join(text for _, text in block), "comment")


def name_faults(file: str, source: str) -> Iterator[Fault]:
    """Yield the variables, arguments and functions with a name that says nothing."""
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
    """Yield the paragraphs of a Markdown page, without code blocks and links' targets."""
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


def faults_in(path: Path) -> list[Fault]:
    """Return the faults of a Python file or a Markdown page."""
    text = path.read_text(encoding="utf-8")
    texts = python_prose(text) if path.suffix == ".py" else page_prose(text)
    file = path.relative_to(ROOT).as_posix()
    faults = {fault for prose in texts for fault in faults_of(file, prose)}
    if path.suffix == ".py":
        faults.update(name_faults(file, text))
    return sorted(faults)


def project_files(*below: str) -> list[Path]:
    """Return the tracked Python files and English pages, all or those below some paths."""
    listed = subprocess.run(
        ["git", "ls-files", *below], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = [name for name in listed.stdout.split() if name.endswith((".py", ".md"))]
    return [ROOT / name for name in names if ".zh." not in name and (ROOT / name).exists()]


def main() -> None:
    """Print the faults of the files below the given paths."""
    faults = [fault for path in project_files(*sys.argv[1:]) for fault in faults_in(path)]
    sys.stdout.write("".join(f"{fault}\n" for fault in faults))
    sys.stdout.write(f"{len(faults)} faults\n")


if __name__ == "__main__":
    main()
