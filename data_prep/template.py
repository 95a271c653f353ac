"""Jinja chat templates, in a sandbox and with the variables that transformers provides."""

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

from data_prep.records import Unusable
from data_prep.row import check_text
from data_prep.sandbox import TemplateSandbox, TooSlow, collect, in_time
from megalite.errors import DataError
from megalite.tokenizers.tokenizer import Tokenizer

Spans: TypeAlias = "list[tuple[int, int]]"


class _Generation(Extension):
    """Jinja tags `{% generation %}` ... `{% endgeneration %}` around the assistant's words."""

    tags = {"generation"}  # noqa: RUF012

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.used = False
        self.blocks = list[str]()
        self.spans = list[tuple[int, int]]()

    def parse(self, parser: Parser) -> nodes.Node:
        self.used = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        text = str(caller())
        start = sum(map(len, self.blocks))
        self.spans.append((start, start + len(text)))
        return text


class Template:
    """A compiled template, with the names of a tokenizer's BOS and EOS.

    Attributes:
        spans: character spans between `generation` tags in the last rendering.
        has_tags: whether the template has such tags.
    Raises:
        DataError: the source is not a valid Jinja template.
    """

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        pieces = tokenizer.pieces()
        ends = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
        self._names = {f"{key}_token": pieces[id] for key, id in ends.items() if id is not None}
        environment = TemplateSandbox(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=(_Generation, "jinja2.ext.loopcontrols"),
        )
        environment.filters["tojson"] = _to_json
        # A constant time, so that renderings of one conversation do not differ.
        environment.globals |= {"raise_exception": _refuse, "strftime_now": datetime.now().strftime}
        marks: Any = environment.extensions[_Generation.identifier]
        self._marks = marks
        try:
            with in_time():
                self._compiled = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError, SyntaxError, MemoryError) as error:
            raise DataError(f"the chat template is no Jinja that can be read: {error}") from error
        self.has_tags = bool(self._marks.used)
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
            Unusable: the template refuses the conversation, or fails.
            DataError: the rendering takes too long.
        """
        marks = self._marks
        marks.blocks = []
        marks.spans = []
        variables = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        variables |= {"tools": tools, "documents": None}
        try:
            with in_time():
                collect(self._compiled.generate(**variables, **self._names), marks.blocks)
        except TooSlow as error:  # the next rows would be as slow
            raise DataError(f"the chat template cannot be used: {error}") from error
        except Exception as error:  # a template can fail in any way
            reason = str(error) or type(error).__name__
            raise Unusable(f"the chat template refuses it: {reason}") from error
        return check_text(
            "".join(marks.blocks), "the conversation as the template writes it", empty=True
        )


def _to_json(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
    """Return JSON without the HTML escapes of Jinja's filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **how)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
