"""Encoding of conversations by a Jinja chat template, with a loss mask of the assistant's turns.

Templates get the same variables as in Hugging Face transformers, and run in the same sandbox.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep.messages import REASONING, Messages, check_messages, strings
from data_prep.records import Unusable
from data_prep.sentinels import find_names, insert, new_sentinel, remove_sentinels
from data_prep.template import Spans, Template
from data_prep.turns import TurnFinder
from megalite.errors import DataError
from megalite.files import parse_json
from megalite.log import logger
from megalite.tokenizers.tokenizer import Tokenizer

TEMPLATE = "chat_template.jinja"
CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{% generation %}
{{- message['content'] or '' }}
{%- for call in message['tool_calls'] or [] %}
{%- set function = call['function'] or call %}
{{- '\\n' if message['content'] or not loop.first }}
{{- '<tool_call>\\n{"name": ' + function['name'] | tojson }}
{{- ', "arguments": ' + (function['arguments'] or {}) | tojson + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>' -}}
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
# Replacements for missing content: a missing key (as in transformers), null, or "". Templates
# differ in which of them they accept.
_NO_CONTENT: tuple[dict[str, Any], ...] = ({}, {"content": None}, {"content": ""})
_ALWAYS_READ = {"role", "content", "weight", "tool_calls", "function_call"}
_ENOUGH = 20  # rows in which a key changes nothing, after which it counts as not read


def find_template(file: str | None, text: str | None, tokenizer: str | Path | None) -> str:
    """Return the chat template: the file, else `text`, else the tokenizer's, else ChatML.

    Args:
        file: path of a template.
        text: text of a template.
        tokenizer: a tokenizer's file or folder.
    Raises:
        DataError: a file cannot be read.
    """
    try:
        if file is not None:
            return Path(file).read_text(encoding="utf-8")
        if text is not None or tokenizer is None or str(tokenizer) == "bytes":
            return text or CHATML
        place = Path(tokenizer)
        folder = place if place.is_dir() else place.parent
        if (folder / TEMPLATE).is_file():
            return (folder / TEMPLATE).read_text(encoding="utf-8")
        config = folder / "tokenizer_config.json"
        if config.is_file():
            template = parse_json(config.read_bytes()).get("chat_template") or CHATML
            if isinstance(template, list):  # several, by name
                names = {one["name"]: one["template"] for one in template}
                template = names.get("default", CHATML)
            return str(template)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        source = file or f"the template of {tokenizer}"
        raise DataError(f"finetune.data.chat_template: cannot read {source}: {error}") from error
    return CHATML


def ask(folder: Path, tokenizer: Tokenizer, text: str) -> tuple[list[int], str]:
    """Return `Chat.ask` with the template in a tokenizer's folder."""
    return Chat(find_template(None, None, folder), tokenizer).ask(text)


class Chat:
    """A chat template with a tokenizer.

    Only the template writes control tokens: their names in a message or in the description of a
    tool stay text. `report` logs the rows for which this cannot be guaranteed.

    Raises:
        DataError: the template is not valid Jinja.
    """

    def __init__(self, template: str, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._template = Template(template, tokenizer)
        self._turns = TurnFinder(self._template)
        self._has_warned = False
        self._remarks = Counter[str]()
        self._unread = Counter[str]()
        self._read = set[str]()

    def encode(
        self, messages: Messages, tools: list[Any] | None = None
    ) -> tuple[list[int], list[bool]]:
        """Return the ids of a conversation, and its loss mask.

        Ids of the assistant's text are targets, even if only partly, except in turns of weight 0.

        Raises:
            Unusable: the template refuses the conversation, or ignores a part of it.
            DataError: the assistant's turns cannot be located in the rendering.
        """
        text, spans = self.render(messages, tools)
        plain = self._plain(self._readable(messages, tools), tools, text)
        ids, offsets = self._tokenizer.encode_with_offsets(text, plain)
        loss_mask = [False] * len(ids)
        current = 0
        for token, (start, stop) in enumerate(offsets):
            while current < len(spans) and start >= spans[current][1]:
                current += 1
            loss_mask[token] = current < len(spans) and stop > spans[current][0]
        return ids, loss_mask

    def render(self, messages: Messages, tools: list[Any] | None = None) -> tuple[str, Spans]:
        """Return the text of a conversation, and the character spans of its targets."""
        self._check_keys(messages, tools)
        weights = [m.get("weight", 1) for m in messages if m["role"] == "assistant"]
        messages = self._readable(messages, tools)
        text = self._template.render(messages, tools)
        spans = self._template.spans
        self._note_keys(messages, tools, text)
        if self._template.has_tags:
            if not all(weights):
                if len(spans) != len(weights):
                    raise Unusable(
                        f"the chat template marks {len(spans)} of the assistant's {len(weights)} "
                        "turns, so that those of weight 0 cannot be found; remove the turns that "
                        "it does not write from the conversation"
                    )
                spans = [span for span, weight in zip(spans, weights, strict=True) if weight]
            return text, spans
        turns = [number for number, m in enumerate(messages) if m["role"] == "assistant"]
        pairs = zip(turns, weights, strict=True)
        return text, [self._turns.find(messages, n, tools, text) for n, weight in pairs if weight]

    def ask(
        self, messages: str | Messages, tools: list[Any] | None = None
    ) -> tuple[list[int], str]:
        """Return the ids of a conversation up to the assistant's answer, and the answer's end.

        Args:
            messages: the turns, or the text of a single user's turn.
        Returns:
            the ids, and the text that the template writes after an answer.
        Raises:
            DataError: the template refuses the conversation.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        try:
            messages = check_messages(messages, answered=False)
            sentinel = new_sentinel("".join(strings([messages, tools])))
            self._check_keys(messages, tools)
            messages = self._readable(messages, tools)
            answered = [*messages, {"role": "assistant", "content": sentinel}]
            end = self._template.render(answered, tools).rpartition(sentinel)[2].strip()
            text = self._template.render(messages, tools, add_generation_prompt=True)
            plain = self._plain(messages, tools, text, add_generation_prompt=True)
        except Unusable as error:
            raise DataError(str(error)) from error
        for message in messages:
            content = str(message.get("content") or "").strip()
            if message["role"] == "system" and content not in text and not self._has_warned:
                logger.warning("the chat template does not write the system turn as it is")
                self._has_warned = True
        return self._tokenizer.encode_with_offsets(text, plain)[0], end

    def report(self, title: str) -> None:
        """Log the remarks since the last report, with their numbers of rows.

        Args:
            title: name of the rows in messages.
        """
        for remark, rows in self._remarks.items():
            logger.warning("%s: %s (rows: %s)", title, remark, f"{rows:,}")
        for key, rows in self._unread.items():
            if key not in self._read:
                remark = f"the chat template does not read {key!r:.40} of messages"
                logger.warning("%s: %s (rows: %s)", title, remark, f"{rows:,}")
        self._remarks.clear()
        self._unread.clear()

    # ---- parts of messages that the template reads

    def _check_keys(self, messages: Messages, tools: list[Any] | None) -> None:
        """Raise Unusable if the template does not write the tools or their calls."""
        if tools and not self._template.mentions("tools"):
            raise Unusable(
                "it has tools, which the chat template does not write; name one that does by "
                "finetune.data.chat_template"
            )
        for number, message in enumerate(messages):
            for key in ("tool_calls", "function_call"):
                if message.get(key) and not self._template.mentions(key):
                    raise Unusable(
                        f"message {number} has {key}, which the chat template does not write; name "
                        "one that does by finetune.data.chat_template"
                    )

    def _note_keys(self, messages: Messages, tools: list[Any] | None, text: str) -> None:
        """Count the rows in which a key does not change the rendering, until it does in one."""
        keys = {"reasoning" if key in REASONING else key for m in messages for key in m}
        for key in keys - _ALWAYS_READ - self._read:
            if self._unread[key] < _ENOUGH:
                names = REASONING if key == "reasoning" else (key,)
                fewer = [{k: v for k, v in m.items() if k not in names} for m in messages]
                with suppress(Unusable):
                    if self._template.render(fewer, tools) == text:
                        self._unread[key] += 1
                        continue
                self._read.add(key)
            else:
                self._unread[key] += 1

    def _readable(self, messages: Messages, tools: list[Any] | None) -> Messages:
        """Return the messages, with a value for missing content that the template accepts."""
        shown = [{k: v for k, v in message.items() if k != "weight"} for message in messages]
        bare = [message for message in shown if "content" not in message]
        if not bare:
            return shown
        names = [_function(call).get("name", "") for m in bare for call in m.get("tool_calls", ())]
        fault: Unusable | None = None
        for content in _NO_CONTENT:
            tried = [message if "content" in message else message | content for message in shown]
            try:
                text = self._template.render(tried, tools)
            except Unusable as error:
                fault = fault or error
                continue
            if all(str(name) in text for name in names):
                return tried
        raise fault or Unusable("the chat template does not write the calls of tools")

    # ---- control token names that are text

    @cached_property
    def _controls(self) -> re.Pattern[str] | None:
        """Pattern of control token names: tokens without text, which text never becomes."""
        tokenizer = self._tokenizer
        names = [
            name
            for id, name in enumerate(tokenizer.pieces())
            if len(name) > 1
            and not tokenizer.decode([id])
            and tokenizer.encode_with_offsets(name)[0] == [id] != tokenizer.encode(name)
        ]
        longest = sorted(map(re.escape, names), key=len, reverse=True)
        return re.compile("|".join(longest)) if names else None

    def _plain(self, messages: Messages, tools: list[Any] | None, text: str, **how: bool) -> Spans:
        """Return the spans of the rendering `text` in which messages or tools name control tokens.

        Raises:
            Unusable: the template reads such a name in a turn that is not the assistant's.
        """
        units = [*messages, tools]
        names_of_units = [find_names(strings(unit), self._controls) for unit in units]
        if not any(names_of_units):
            return []
        sentinel = new_sentinel("".join([text, *strings(units)]))

        def locate(names: Sequence[Sequence[str]]) -> Spans | None:
            """Return the spans of these names, or None if sentinels change the rendering."""
            pairs = zip(units, names, strict=True)
            *marked, marked_tools = [insert(unit, sentinel, some) for unit, some in pairs]
            try:
                shown, places = remove_sentinels(
                    self._template.render(marked, marked_tools, **how), sentinel
                )
            except Unusable:
                return None
            longest = sorted({name for some in names for name in some}, key=len, reverse=True)
            lengths = [
                next((len(n) for n in longest if shown[at - 1 :].startswith(n)), 1) for at in places
            ]
            spans = [(at - 1, at - 1 + size) for at, size in zip(places, lengths, strict=True)]
            return spans if shown == text else None

        spans = locate(names_of_units)
        if spans is not None:
            return spans
        # The template searches for some of the names, such as </think>. Ignore those.
        names_to_find = list(names_of_units)
        for unit, names in enumerate(names_of_units):
            for name in names:
                if locate([[name] if n == unit else [] for n in range(len(units))]) is None:
                    names_to_find[unit] = [other for other in names_to_find[unit] if other != name]
                    self._note_reading(units[unit], unit, name)
        spans = locate(names_to_find)
        if spans is None:
            raise Unusable("words that look like control tokens cannot be found in the rendering")
        return spans

    def _note_reading(self, unit: Any, number: int, name: str) -> None:
        if not isinstance(unit, dict) or unit["role"] != "assistant":
            what = f"message {number}" if isinstance(unit, dict) else "a tool"
            raise Unusable(
                f"{what} has the control token {name!r}, which the chat template reads as its own; "
                "remove it from the text"
            )
        self._remarks[
            f"the chat template reads {name!r} in an assistant's turn, and may become a "
            "control token"
        ] += 1


def _function(call: Any) -> dict[str, Any]:
    inner = call.get("function")
    return inner if isinstance(inner, dict) else dict(call)
