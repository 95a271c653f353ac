"""Conversations as tokens: a Jinja chat template's rendering, and which of it the assistant wrote.

Templates see what Hugging Face transformers shows them and run in the same sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from data_prep.records import Unusable
from data_prep.rows import check_text
from data_prep.sandbox import TemplateSandbox, collect, in_time
from megalite.errors import DataError
from megalite.files import parse_json
from megalite.formats.tokenizer import Tokenizer

TEMPLATE = "chat_template.jinja"
CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{% generation %}
{{- message['content'] + '<|im_end|>' -}}
{% endgeneration %}
{% else %}
{{- message['content'] + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
_REASONING = ("reasoning_content", "thinking", "reasoning")

Messages: TypeAlias = "list[dict[str, Any]]"
Spans: TypeAlias = "list[tuple[int, int]]"


def find_template(file: str | None, given: str | None, tokenizer: str | Path | None) -> str:
    """The text of `file`, else `given`, else what lies beside the tokenizer, else ChatML.

    Raises:
        DataError: a file that cannot be read.
    """
    try:
        if file is not None:
            return Path(file).read_text(encoding="utf-8")
        if given is not None or tokenizer is None or str(tokenizer) == "bytes":
            return given or CHATML
        place = Path(tokenizer)
        folder = place if place.is_dir() else place.parent
        if (folder / TEMPLATE).is_file():
            return (folder / TEMPLATE).read_text(encoding="utf-8")
        config = folder / "tokenizer_config.json"
        if config.is_file():
            found = parse_json(config.read_bytes()).get("chat_template") or CHATML
            if isinstance(found, list):  # several, by name
                found = {one["name"]: one["template"] for one in found}.get("default", CHATML)
            return str(found)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        where = file or f"the one beside {tokenizer}"
        raise DataError(f"finetune.data.chat_template: cannot read {where}: {error}") from error
    return CHATML


def ask(folder: Path, tokenizer: Tokenizer, text: str) -> tuple[str, str]:
    """`Chat.ask` by the template that lies beside a tokenizer."""
    return Chat(find_template(None, None, folder), tokenizer).ask(text)


def check_messages(value: Any) -> Messages:
    """A conversation with an assistant's turn, without what is null; `Unusable` where it is none.

    A turn's content is text, and may be null beside tool_calls; an assistant's is not empty.
    """
    if not isinstance(value, list) or not value:
        raise Unusable(f"{value!r:.40} is not a list of messages")
    messages = []
    for number, message in enumerate(value):
        what = f"message {number}"
        if not isinstance(message, dict):
            raise Unusable(f"{what} is {message!r:.40}, not an object")
        message = {key: item for key, item in message.items() if item is not None}
        if not isinstance(message.get("role"), str):
            raise Unusable(f"{what} has no role; it has {', '.join(message) or 'nothing'}")
        if "content" in message or not message.get("tool_calls"):
            empty = message["role"] != "assistant" or bool(message.get("tool_calls"))
            check_text(message.get("content"), f"the content of {what}", empty=empty)
        reasoning = next((message[key] for key in _REASONING if key in message), None)
        if reasoning is not None:  # under each name that templates read
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        messages.append(message)
    if all(message["role"] != "assistant" for message in messages):
        roles = ", ".join(dict.fromkeys(str(message["role"]) for message in messages))
        raise Unusable(f"no turn has the role 'assistant'; its roles are {roles[:80]}")
    return messages


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


class Chat:
    """A template with the tokenizer whose names of BOS and EOS it may write.

    Raises:
        DataError: not a Jinja template.
    """

    def __init__(self, template: str, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        pieces, ends = tokenizer.pieces(), {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
        self._names = {f"{key}_token": pieces[id] for key, id in ends.items() if id is not None}
        extensions = (_Generation, "jinja2.ext.loopcontrols")
        environment = TemplateSandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        self._marks: Any = environment.extensions[_Generation.identifier]
        try:
            with in_time():
                self._compiled = environment.from_string(template)
        except (jinja2.TemplateError, RecursionError, SyntaxError, MemoryError) as error:
            raise DataError(f"the chat template is no Jinja that can be read: {error}") from error

    def encode(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """The ids of a conversation, and which of them the assistant wrote, if only in part.

        Raises:
            Unusable: the template refuses the conversation.
            DataError: the template does not tell the assistant's turns apart.
        """
        text, spans = self.render(messages)
        ids, places = self._tokenizer.encode_with_offsets(text)
        learned, current = [False] * len(ids), 0
        for token, (start, stop) in enumerate(places):
            while current < len(spans) and start >= spans[current][1]:
                current += 1
            learned[token] = current < len(spans) and stop > spans[current][0]
        return ids, learned

    def render(self, messages: Messages) -> tuple[str, Spans]:
        """The text of a conversation, and from and to which characters the assistant wrote."""
        text = self._render(messages)
        if self._marks.used:
            return text, list(self._marks.spans)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._render(messages[:number], add_generation_prompt=True)
                through = self._render(messages[: number + 1])
                if not (through.startswith(before) and text.startswith(through)):
                    raise DataError(
                        "the chat template writes the first turns of a conversation in another way "
                        "when others follow, so that the assistant's words cannot be found; put "
                        "{% generation %} and {% endgeneration %} around them, in a file that "
                        "finetune.data.chat_template names"
                    )
                spans.append((len(before), len(through)))
        return text, spans

    def ask(self, text: str) -> tuple[str, str]:
        """A user's one turn as far as the assistant's answer; and what ends such an answer.

        Raises:
            DataError: the template refuses a lone turn of a user.
        """
        turn, mark = [{"role": "user", "content": text}], "\N{REPLACEMENT CHARACTER}"
        try:
            through = self._render([*turn, {"role": "assistant", "content": mark}])
            return self._render(turn, add_generation_prompt=True), through.rpartition(mark)[
                2
            ].strip()
        except Unusable as error:
            raise DataError(str(error)) from error

    def _render(self, messages: Sequence[Any], *, add_generation_prompt: bool = False) -> str:
        marks = self._marks
        marks.blocks, marks.spans = [], []
        seen = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            with in_time():
                pieces = self._compiled.generate(tools=None, documents=None, **seen, **self._names)
                collect(pieces, marks.blocks)
        except Exception as error:  # a template can fail in any way
            reason = str(error) or type(error).__name__
            raise Unusable(f"the chat template refuses it: {reason}") from error
        return check_text("".join(marks.blocks), "the conversation as the template writes it")


def _to_json(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
    """Without the escapes of HTML that Jinja's own filter makes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **how)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
