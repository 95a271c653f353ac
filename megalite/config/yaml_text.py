"""Run files in YAML: the values that JSON has, by the rules of YAML 1.2's core schema.

PyYAML only finds the structure of the text. Its own values follow YAML 1.1, in which `off` is
false, `010` is 8 and `3e-4` is text. Here `off` is text, `010` is 10 and `3e-4` is a number. Tags,
anchors, directives, keys that are no text and a second document are refused. JSON has none of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from megalite.config.faults import show
from megalite.errors import ConfigError

_DEPTH = 31  # one more than a run file may have, so that the check for all files reports it

# YAML 1.2.2, section 10.3.2: the tag resolution of the core schema
_NULL = re.compile(r"(null|Null|NULL|~|)")
_TRUE = re.compile(r"(true|True|TRUE)")
_FALSE = re.compile(r"(false|False|FALSE)")
_DECIMAL = re.compile(r"[-+]?[0-9]+")
_OCTAL = re.compile(r"0o[0-7]+")
_HEXADECIMAL = re.compile(r"0x[0-9a-fA-F]+")
_REAL = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class Numbers:
    """Readers of numbers, which note a number that no run file may have.

    Attributes:
        integer: returns a whole number from decimal digits.
        real: returns a finite number from digits.
        constant: returns a number that stands in for an infinite one.
    """

    def __init__(
        self,
        integer: Callable[[str], int],
        real: Callable[[str], float],
        constant: Callable[[str], float],
    ) -> None:
        self.integer = integer
        self.real = real
        self.constant = constant


def parse_yaml(
    text: str,
    numbers: Numbers,
    pairs: Callable[[list[tuple[str, Any]]], dict[str, Any]],
) -> Any:
    """Return the value of a YAML text.

    Args:
        numbers: readers of its numbers.
        pairs: returns the section of some keys and values, and notes a key that is there twice.
    Raises:
        ConfigError: the line and the column of a fault, and what to write instead.
    """
    try:
        return _Reader(text, numbers, pairs).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"line {mark.line + 1} column {mark.column + 1}: " if mark else ""
        problem = error.problem or error.context or "it cannot be parsed"
        raise ConfigError(f"{at}not YAML: {problem}; fix that line") from None
    except yaml.reader.ReaderError as error:
        raise ConfigError(
            f"character {error.position + 1}: not YAML: a control character; remove it"
        ) from None


class _Reader:
    """One pass over the events of a text."""

    def __init__(
        self,
        text: str,
        numbers: Numbers,
        pairs: Callable[[list[tuple[str, Any]]], dict[str, Any]],
    ) -> None:
        self._events: Iterator[Any] = yaml.parse(text, Loader=yaml.SafeLoader)
        self._numbers = numbers
        self._pairs = pairs

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
        """Return the value that begins with an event."""
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
        pairs = []
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key = self._value(event, depth + 1)
            if not isinstance(key, str):
                raise _fault(event, f"the key {show(key)}, which is no text", "put it in quotes")
            pairs.append((key, self._value(next(self._events), depth + 1)))
        return self._pairs(pairs)

    def _scalar(self, event: Any) -> Any:
        """Return the value of a word; one in quotes or in a block is text."""
        text: str = event.value
        if event.style is not None:
            return text
        if _NULL.fullmatch(text):
            return None
        if _TRUE.fullmatch(text) or _FALSE.fullmatch(text):
            return _TRUE.fullmatch(text) is not None
        if _NOT_FINITE.fullmatch(text):
            return self._numbers.constant(text)
        if _DECIMAL.fullmatch(text):
            return self._numbers.integer(text)
        for pattern, base in ((_OCTAL, 8), (_HEXADECIMAL, 16)):
            if pattern.fullmatch(text):
                # beyond 64 bits any number of that many digits is the same fault
                digits = str(int(text[2:], base)) if len(text) < 30 else "9" * len(text)
                return self._numbers.integer(digits)
        return self._numbers.real(text) if _REAL.fullmatch(text) else text


def _fault(event: Any, found: str, remedy: str) -> ConfigError:
    mark = event.start_mark
    at = f"line {mark.line + 1} column {mark.column + 1}"
    return ConfigError(f"{at}: {found}: a run file in YAML has only what JSON has; {remedy}")
