"""Conversations for a chat model to continue, from a file with one on each line."""

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
    """Turns that a chat model continues.

    Attributes:
        tools: descriptions of the tools that the model may call.
        place: name of the conversation's place in messages.
    """

    messages: Messages
    tools: list[Any] | None = None
    place: str = ""


def read_questions(path: str, system: str | None) -> list[Conversation]:
    """Return the conversations of a file, {"messages": [...]} with optional "tools" on each line.

    Args:
        system: text of a system turn that replaces those in the file. None means to keep them.
    Raises:
        CommandError: there is no such file, or a line is not a conversation with a turn to answer.
        DataError: the file cannot be read.
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
                f"--messages {row.place}: the last turn is the assistant's; end with a user's "
                "turn, which is answered"
            )
        questions.append(
            Conversation(replace_system(messages, system), tools, f"--messages {row.place}")
        )
    if not questions:
        raise CommandError(f"--messages {path}: the file has no conversation; write one a line")
    return questions


def replace_system(messages: Messages, system: str | None) -> Messages:
    """Return the turns with a system turn in front, instead of their own. None changes nothing."""
    if system is None:
        return messages
    rest = messages[1:] if messages and messages[0]["role"] == "system" else messages
    return [{"role": "system", "content": system}, *rest]
