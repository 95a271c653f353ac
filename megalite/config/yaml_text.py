"""Parser of run files in YAML: the values of JSON, by the core schema of YAML 1.2.

PyYAML only parses the structure of the text. PyYAML's values follow YAML 1.1, in which `off` is
false, `010` is 8 and `3e-4` is text. Here `off` is text, `010` is 10 and `3e-4` is a number. Tags,
anchors, directives, keys that are not text and a second document are refused, because JSON has none
of them. Characters that end a line only in YAML 1.1 are refused too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml

from megalite.config.faults import show
from megalite.config.strict import ValueChecks
from megalite.errors import ConfigError

_DEPTH = 31  # one level more than allowed, so that `strict.too_deep` reports the fault

# YAML 1.2.2, section 10.3.2: the tag resolution of the core schema
_NULL = re.compile(r"(null|Null|NULL|~|)")
_TRUE = re.compile(r"(true|True|TRUE)")
_FALSE = re.compile(r"(false|False|FALSE)")
_DECIMAL = re.compile(r"[-+]?[0-9]+")
_OCTAL = re.compile(r"0o[0-7]+")
_HEXADECIMAL = re.compile(r"0x[0-9a-fA-F]+")
_REAL = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

_OLD_BREAK = re.compile("[\x85\u2028\u2029]")
# Words that need no quotes: they are text in YAML 1.2, and in YAML 1.1 for other programs.
_PLAIN = re.compile(r"(?!(?i:y|n|yes|no|on|off|true|false|null)\Z)[A-Za-z_][A-Za-z0-9_./-]*")


def parse_yaml(text: str, checks: ValueChecks) -> Any:
    """Return the value of a YAML text.

    Raises:
        ConfigError: the text is not YAML, or uses a feature that JSON lacks.
    """
    if old_break := _OLD_BREAK.search(text):
        code = ord(old_break[0])
        raise ConfigError(
            f"{_place_in(text, old_break.start())}: the character U+{code:04X}, which ends a line "
            f"in YAML 1.1 only; remove it, or write \\u{code:04x} in double quotes"
        )
    reader = None
    try:
        reader = _Reader(text, checks)
        return reader.document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"{_place(mark)}: " if mark else ""
        problem = error.problem or error.context or "it cannot be parsed"
        tab = "'\\t'" in problem
        advice = "indent and separate with spaces" if tab else "fix that line"
        raise ConfigError(f"{at}not YAML: {problem}; {advice}") from None
    except yaml.reader.ReaderError as error:
        at = _place_in(text, error.position)
        raise ConfigError(f"{at}: not YAML: a control character; remove it") from None
    except (OverflowError, ValueError):  # raised by chr() in PyYAML
        at = _place(reader.loader.get_mark()) if reader else "line 1"
        raise ConfigError(
            f"{at}: not YAML: \\U beyond 10FFFF is not a character; write the character itself"
        ) from None


def format_yaml(sections: dict[str, Any], indent: str = "") -> str:
    """Return the YAML text of a run file. Lists are written as JSON."""
    text = ""
    for key, value in sections.items():
        text += f"{indent}{_leaf(key)}:"
        if isinstance(value, dict) and value:
            text += "\n" + format_yaml(value, indent + "  ")
        else:
            text += f" {_leaf(value)}\n"
    return text


def _leaf(value: Any) -> str:
    """Return a value on one line: a word without quotes, or JSON, which is also YAML."""
    if isinstance(value, str) and _PLAIN.fullmatch(value):
        return value
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return re.sub(
        "[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]", lambda match: f"\\u{ord(match[0]):04x}", text
    )


class _Reader:
    """Reader of a document, in one pass over its events."""

    def __init__(self, text: str, checks: ValueChecks) -> None:
        self.loader = yaml.SafeLoader(text)
        self._events: Iterator[Any] = iter(self.loader.get_event, None)
        self._checks = checks

    def document(self) -> Any:
        """Return the value of the only document."""
        next(self._events)  # the start of the stream
        first = next(self._events)
        if isinstance(first, yaml.StreamEndEvent):
            return None
        if first.version or first.tags:
            raise _fault(first, "a directive (%)", "remove that line")
        value = self._value(next(self._events), 0)
        next(self._events)  # the end of the document
        after = next(self._events)
        if not isinstance(after, yaml.StreamEndEvent):
            raise _fault(after, "a second document", "write one file for each")
        return value

    def _value(self, event: Any, depth: int) -> Any:
        """Return the value whose first event is given."""
        if isinstance(event, yaml.AliasEvent):
            raise _fault(event, f"the alias *{event.anchor}", "write the value out")
        if event.anchor:
            raise _fault(event, f"the anchor &{event.anchor}", "remove it")
        if event.tag:
            raise _fault(event, f"the tag {event.tag}", "remove it")
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event)
        if depth > _DEPTH:
            raise _fault(event, f"sections more than {_DEPTH - 1} deep", "remove some levels")
        if isinstance(event, yaml.SequenceStartEvent):
            items = []
            while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
                items.append(self._value(event, depth + 1))
            return items
        section: dict[str, Any] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key = self._value(event, depth + 1)
            if not isinstance(key, str):
                raise _fault(event, f"the key {show(key)}, which is not text", "put it in quotes")
            value = self._value(next(self._events), depth + 1)
            self._checks.prefix = f"{_place(event.start_mark)}: "
            self._checks.add(section, key, value)
        return section

    def _scalar(self, event: Any) -> Any:
        """Return the value of a scalar, which is text if it is quoted or a block."""
        text: str = event.value
        if event.style is not None:
            # "\ud83d\ude00" is one character, as in JSON
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
        self._checks.prefix = f"{_place(event.start_mark)}: "
        if _NULL.fullmatch(text):
            return None
        if _TRUE.fullmatch(text) or _FALSE.fullmatch(text):
            return _TRUE.fullmatch(text) is not None
        if _NOT_FINITE.fullmatch(text):
            return self._checks.constant(text)
        if _DECIMAL.fullmatch(text):
            return self._checks.integer(text)
        for pattern, base in ((_OCTAL, 8), (_HEXADECIMAL, 16)):
            if pattern.fullmatch(text):
                # such a long number is out of range; the error does not depend on the digits
                digits = str(int(text[2:], base)) if len(text) < 30 else "9" * len(text)
                return self._checks.integer(digits)
        return self._checks.real(text) if _REAL.fullmatch(text) else text


def _fault(event: Any, fault: str, remedy: str) -> ConfigError:
    at = _place(event.start_mark)
    return ConfigError(f"{at}: {fault}: not allowed in a run file; {remedy}")


def _place_in(text: str, index: int) -> str:
    column = index - text.rfind("\n", 0, index)
    return f"line {text.count(chr(10), 0, index) + 1} column {column}"


def _place(mark: Any) -> str:
    return f"line {mark.line + 1} column {mark.column + 1}"
