"""Conversations that a chat model is asked to answer: a file with one a line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.messages import TOOLS, Messages, check_messages, check_tools
from data_prep.records import Unusable
from data_prep.rows import find_source
from megalite.errors import CommandError


@dataclass(frozen=True)
class Conversation:
    """The turns before an answer, the tools that may be called, and their place in a file."""

    messages: Messages
    tools: list[Any] | None = None
    place: str = ""


def read_questions(path: str, system: str | None) -> list[Conversation]:
    """Return the conversations of a file: in each line {"messages": [...]}, maybe with "tools".

    Args:
        system: the system turn of every conversation.
    Raises:
        CommandError: no such file; a line that is no conversation, or that waits for no answer.
        DataError: a file that cannot be read.
    """
    if not Path(path).is_file():
        raise CommandError(f"--messages {path}: there is no such file; name a file of JSON lines")
    questions = []
    for row in find_source(path, "messages").rows("messages", ["messages"], [TOOLS]):
        try:
            messages = check_messages(row.get("messages"), answered=False)
            tools = check_tools(row.values.get(TOOLS))
        except Unusable as error:
            raise CommandError(f"--messages {row.place}: {error}") from None
        if messages[-1]["role"] == "assistant":
            raise CommandError(
                f"--messages {row.place}: the last turn is the assistant's; end with a user's, "
                "which is answered"
            )
        questions.append(
            Conversation(replace_system(messages, system), tools, f"--messages {row.place}")
        )
    if not questions:
        raise CommandError(f"--messages {path}: the file has no conversation; write one a line")
    return questions


def replace_system(messages: Messages, system: str | None) -> Messages:
    """Return the turns behind a system turn, which replaces one that they begin with."""
    if system is None:
        return messages
    rest = messages[1:] if messages and messages[0]["role"] == "system" else messages
    return [{"role": "system", "content": system}, *rest]
