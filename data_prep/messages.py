"""Conversations from data sets, converted to one form: OpenAI's list of messages.

A message is an object with a `role` and text as `content`. Content may also be a list of text
parts. ShareGPT's `from` and `value` are accepted, and JSON text of a list, as in CSV files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from data_prep.records import Unusable
from data_prep.row import SourceRow, check_text

Messages: TypeAlias = "list[dict[str, Any]]"

REASONING = ("reasoning_content", "thinking", "reasoning")
_ROW_WEIGHTS = ("weight", "sample_weight", "loss_weight")
TOOLS = "tools"
_SYSTEM = "system"
OPTIONAL_COLUMNS = (TOOLS, _SYSTEM, *_ROW_WEIGHTS)  # read if a row has them
# Keys by which data sets mark turns as targets of the loss (OpenAI, axolotl, XTuner).
_FLAGS = ("weight", "train", "training", "trainable", "loss", "learn")
# ShareGPT's names of roles, except `function_call`, whose content has another form.
_SHAREGPT = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bing", "bard"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}
_TEXT_PARTS = ("text", "input_text", "output_text")


def check_messages(value: Any, *, answered: bool = True) -> Messages:
    """Return a conversation in OpenAI's form, without null values.

    A turn that is not a target has `weight` 0, whatever key the data used. The content of a turn is
    text, and may be missing if the turn has tool_calls.

    Args:
        answered: If true, the conversation is for training: at least one assistant's turn must be a
            target, and none may be empty.
    Raises:
        Unusable: it is not a conversation, or not one for training.
    """
    messages = [_message(number, item, answered) for number, item in enumerate(_items(value))]
    if not answered:
        return messages
    turns = [message for message in messages if message["role"] == "assistant"]
    if not turns:
        roles = ", ".join(dict.fromkeys(str(message["role"]) for message in messages))
        raise Unusable(f"no turn has the role 'assistant'; its roles are {roles[:80]}")
    if not any(message.get("weight", 1) for message in turns):
        raise Unusable("no turn is learned: every assistant's turn has weight 0")
    return messages


def check_tools(value: Any) -> list[Any] | None:
    """Return the descriptions of tools in a row's value, or None if it has none.

    Args:
        value: a list, JSON text of a list, or an empty value.
    Raises:
        Unusable: it is anything else.
    """
    if isinstance(value, str) and value.strip():
        value = _parsed(value, f"field {TOOLS!r}")
    if value is None or value == "" or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise Unusable(f"field {TOOLS!r} is {value!r:.40}, not a list of objects")
    return value


def read_conversation(row: SourceRow, columns: Sequence[str]) -> tuple[Messages, list[Any] | None]:
    """Return the turns and the tools of a row.

    Args:
        columns: the column of messages, or those of a prompt and a response.
    Raises:
        Unusable: the row has no conversation for training, or a weight other than 1.
    """
    for key in _ROW_WEIGHTS:
        weight = None if key in columns else row.values.get(key)
        if weight not in (None, "", 1, "1", "1.0"):
            raise Unusable(
                f"field {key!r} is {weight!r:.40}, and rows are not weighted; remove rows of "
                f"weight 0, and the field {key!r}"
            )
    if len(columns) == 2:
        roles = zip(("user", "assistant"), columns, strict=True)
        messages = [{"role": role, "content": row.text(column)} for role, column in roles]
    else:
        messages = check_messages(row.get(columns[0]))
    system = None if _SYSTEM in columns else row.values.get(_SYSTEM)
    if system not in (None, ""):
        check_text(system, f"field {_SYSTEM!r}", empty=True)
        if messages[0]["role"] == "system":
            raise Unusable(
                f"it has the field {_SYSTEM!r} and begins with a system turn; remove one"
            )
        messages = [{"role": "system", "content": system}, *messages]
    return messages, check_tools(row.values.get(TOOLS))


def strings(value: Any) -> Iterator[str]:
    """Yield every text in a JSON value, including keys of objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from strings(key)
            yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)


def _items(value: Any) -> list[Any]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _parsed(value, "the conversation")
    if hasattr(value, "tolist"):  # an array from an Arrow table
        value = value.tolist()
    if not isinstance(value, list) or not value:
        raise Unusable(f"{value!r:.40} is not a list of messages")
    return value


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unusable(f"{what} is text that is not JSON: {error}") from None


def _message(number: int, item: Any, answered: bool) -> dict[str, Any]:
    what = f"message {number}"
    if not isinstance(item, dict):
        raise Unusable(f"{what} is {item!r:.40}, not an object")
    message = {key: value for key, value in item.items() if value is not None}
    if "role" not in message and "from" in message:
        message = _from_sharegpt(message, what)
    role = message.get("role")
    if not isinstance(role, str):
        raise Unusable(f"{what} has no role; it has {', '.join(map(str, message)) or 'nothing'}")
    is_target = _take_flags(message, what)
    if "tool_calls" in message:
        message["tool_calls"] = _calls(message["tool_calls"], what)
    if isinstance(message.get("content"), list):
        message["content"] = _joined(message["content"], f"the content of {what}")
    if "content" in message or not message.get("tool_calls"):
        empty = role != "assistant" or bool(message.get("tool_calls")) or not answered
        check_text(message.get("content"), f"the content of {what}", empty=empty)
    reasoning = next((message[key] for key in REASONING if key in message), None)
    if reasoning is not None:  # templates read different names
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    if is_target and role != "assistant":
        raise Unusable(
            f"{what} is marked to be learned, but its role is {role!r}; only an assistant's turns "
            "can be learned"
        )
    if is_target is False and role == "assistant":
        message["weight"] = 0
    return message


def _from_sharegpt(message: dict[str, Any], what: str) -> dict[str, Any]:
    """Rename ShareGPT's `from` and `value` to role and content."""
    name = message.pop("from")
    role = _SHAREGPT.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise Unusable(
            f"{what} is from {name!r:.40}, not one of {', '.join(_SHAREGPT)}; write it as "
            '{"role": ..., "content": ...}'
        )
    content = message.pop("value", None)
    return {"role": role, **({} if content is None else {"content": content}), **message}


def _take_flags(message: dict[str, Any], what: str) -> bool | None:
    """Remove the keys that mark a turn as a target or not, and return the mark or None."""
    is_target: bool | None = None
    for key in _FLAGS:
        if key in message:
            value = message.pop(key)
            if value not in (0, 1):  # False and True are equal to these
                raise Unusable(
                    f"{what} has {key} {value!r:.40}: a turn is learned or not; write 1 or 0"
                )
            if is_target is not None and is_target != bool(value):
                raise Unusable(f"{what} is both to be learned and not to be learned; keep one key")
            is_target = bool(value)
    return is_target


def _joined(parts: list[Any], what: str) -> str:
    """Return the text of a content that is a list of parts."""
    texts = []
    for number, part in enumerate(parts):
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            raise Unusable(
                f"part {number} of {what} is of type {kind!r:.40}; only parts of type 'text', with "
                "a field 'text', can be learned"
            )
        texts.append(part["text"])
    return "".join(texts)


def _calls(calls: Any, what: str) -> list[Any]:
    """Return tool calls with their arguments parsed from JSON text, as templates expect."""
    if not isinstance(calls, list):
        raise Unusable(f"the tool_calls of {what} are {calls!r:.40}, not a list")
    parsed = []
    for call in calls:
        if not isinstance(call, dict):
            raise Unusable(f"a call in the tool_calls of {what} is {call!r:.40}, not an object")
        call = {key: value for key, value in call.items() if value is not None}
        inner = call.get("function")
        if isinstance(inner, dict):
            call["function"] = _with_arguments(inner)
        else:
            call = _with_arguments(call)
        parsed.append(call)
    return parsed


def _with_arguments(function: dict[str, Any]) -> dict[str, Any]:
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            return function
        if isinstance(parsed, dict):
            return {**function, "arguments": parsed}
    return function
