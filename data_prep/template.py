"""A Jinja chat template, in the sandbox and with the names that transformers gives it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from typing import Any, NoReturn, TypeAlias

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data_prep.records import Unusable
from megalite.errors import DataError
from megalite.formats.tokenizer import Tokenizer

Spans: TypeAlias = "list[tuple[int, int]]"


class _Generation(Extension):
    """`{% generation %}` ... `{% endgeneration %}`: where the assistant's words are."""

    tags = {"generation"}  # noqa: RUF012

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.used, self.blocks, self.spans = False, list[str](), list[tuple[int, int]]()

    def parse(self, parser: Parser) -> nodes.Node:
        self.used, line = True, next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        text, start = str(caller()), sum(map(len, self.blocks))
        self.spans.append((start, start + len(text)))
        return text


class Template:
    """A compiled template, with the tokenizer whose names of BOS and EOS it may write.

    Attributes:
        spans: of the last rendering, the characters between `generation` tags.
        has_tags: whether there are such tags.
    Raises:
        DataError: not a Jinja template.
    """

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        pieces, ends = tokenizer.pieces(), {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
        self._names = {f"{key}_token": pieces[id] for key, id in ends.items() if id is not None}
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=(_Generation, "jinja2.ext.loopcontrols"),
        )
        environment.filters["tojson"] = _to_json
        # one time for all renderings, or those of one conversation could differ
        environment.globals |= {"raise_exception": _refuse, "strftime_now": datetime.now().strftime}
        marks: Any = environment.extensions[_Generation.identifier]
        self._marks = marks
        try:
            self._compiled = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template is no Jinja that can be read: {error}") from error
        self.has_tags: bool = self._marks.used
        self.mentions = cache(lambda word: re.search(rf"\b{re.escape(word)}\b", source) is not None)

    @property
    def spans(self) -> Spans:
        return list(self._marks.spans)

    def render(
        self,
        messages: Sequence[Any],
        tools: list[Any] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """Return the text of a conversation.

        Raises:
            Unusable: the template refuses it, or fails.
        """
        marks = self._marks
        marks.blocks, marks.spans = [], []
        seen = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        seen |= {"tools": tools, "documents": None}
        try:
            for block in self._compiled.generate(**seen, **self._names):
                marks.blocks.append(block)
        except Exception as error:  # a template can fail in any way
            raise Unusable(f"the chat template refuses it: {error}") from error
        return "".join(marks.blocks)


def _to_json(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
    """Without the escapes of HTML that Jinja's own filter makes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **how)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
