"""Search for an assistant's turns in the rendering of a template without `generation` tags.

A turn starts after its generation prompt and includes the text that closes it.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from data_prep.messages import Messages
from data_prep.records import Unusable
from data_prep.sentinels import new_sentinel, remove_sentinels
from data_prep.template import Template
from megalite.errors import DataError

_USER = {"role": "user", "content": "x"}


class TurnFinder:
    """Search for an assistant's turn in the rendering of a conversation."""

    def __init__(self, template: Template) -> None:
        self._template = template

    def find(
        self, messages: Messages, number: int, tools: list[Any] | None, text: str
    ) -> tuple[int, int]:
        """Return the span of turn `number` in `text`, the rendering of all messages.

        Raises:
            DataError: the turn cannot be found.
        """
        for search in (self._by_prefixes, self._around_content, self._between_neighbours):
            try:
                span = search(messages, number, tools, text)
            except Unusable:  # the template refuses a part of the conversation, or an empty one
                continue
            if span is not None:
                return span
        raise DataError(
            "the chat template writes the first turns of a conversation in another way when "
            "others follow, so that the assistant's words cannot be found; put "
            "{% generation %} and {% endgeneration %} around them, in a file that "
            "finetune.data.chat_template names"
        )

    def _by_prefixes(
        self, messages: Messages, number: int, tools: list[Any] | None, text: str
    ) -> tuple[int, int] | None:
        """Find the turn by rendering the messages before it, and those up to it."""
        before = self._template.render(messages[:number], tools, add_generation_prompt=True)
        through = self._template.render(messages[: number + 1], tools)
        if through.startswith(before) and text.startswith(through):
            return len(before), len(through)
        return None

    def _around_content(
        self, messages: Messages, number: int, tools: list[Any] | None, text: str
    ) -> tuple[int, int] | None:
        """Find the turn by sentinels around its content, if the closing text follows."""
        content = str(messages[number].get("content") or "")
        sentinel = new_sentinel(text + content)
        lead, core, trail = _trimmed(content)
        # The second form is for templates that strip the content.
        for marked in (sentinel + content + sentinel, lead + sentinel + core + sentinel + trail):
            turns = [*messages]
            turns[number] = messages[number] | {"content": marked}
            shown, places = remove_sentinels(self._template.render(turns, tools), sentinel)
            if not core or shown != text or len(places) != 2:
                continue
            for end in (self._ending, self._ending.rstrip()):
                if text.startswith(end, places[1]):
                    return places[0], places[1] + len(end)
        return None

    def _between_neighbours(
        self, messages: Messages, number: int, tools: list[Any] | None, text: str
    ) -> tuple[int, int] | None:
        """Find the turn between its neighbours' contents, by the prompt and the closing text.

        This also finds turns of which a part is omitted, such as reasoning, when others follow.
        """
        sentinel = new_sentinel(text)
        turns = [*messages]
        neighbours = []
        for other in (number - 1, number + 1):
            if 0 <= other < len(messages):
                lead, core, trail = _trimmed(str(messages[other].get("content") or ""))
                marked = (
                    lead + core + sentinel + trail
                    if other < number
                    else lead + sentinel + core + trail
                )
                turns[other] = messages[other] | {"content": marked}
                neighbours.append(other)
                if not core:
                    return None
        shown, places = remove_sentinels(self._template.render(turns, tools), sentinel)
        if shown != text or len(places) != len(neighbours):
            return None
        lower = places[0] if number > 0 else 0
        upper = places[-1] if number + 1 < len(messages) else len(text)
        start = text.find(self._prompt, lower, upper) + len(self._prompt)
        for end in (self._ending, self._ending.rstrip()):
            stop = text.rfind(end, start, upper) + len(end)
            if self._prompt.strip() and end.strip() and lower + len(self._prompt) <= start < stop:
                return start, stop
        return None

    @cached_property
    def _ending(self) -> str:
        """The text after an answer to a single user's turn."""
        sentinel = new_sentinel("")
        pair = [_USER, {"role": "assistant", "content": sentinel}]
        return self._template.render(pair).rpartition(sentinel)[2]

    @cached_property
    def _prompt(self) -> str:
        """The generation prompt after a single user\'s turn, which may be empty."""
        before = self._template.render([_USER])
        asking = self._template.render([_USER], add_generation_prompt=True)
        return asking[len(before) :] if asking.startswith(before) else ""


def _trimmed(content: str) -> tuple[str, str, str]:
    """Return the white space before a text, the text, and the white space after it."""
    core = content.strip()
    lead = content[: len(content) - len(content.lstrip())]
    return lead, core, content[len(lead) + len(core) :]
