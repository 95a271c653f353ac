"""Refuse secrets in a run file, because every run and checkpoint stores a copy of it.

The copy must be exact, or the run could not be resumed. So only keys with free text are searched:
paths, names and values of the model are never mistaken for a secret.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megalite.config.faults import ConfigFault, Key, dotted
from megalite.config.schema import RunConfig
from megalite.log import REDACTED, is_secret

# Sections of free text, which MegaLite passes on or displays without interpreting it.
_FREE_TEXT: tuple[Key, ...] = (
    ("deepspeed",),
    ("logging", "wandb"),
    ("logging", "samples", "prompts"),
)


def secret_faults(config: RunConfig) -> Iterator[ConfigFault]:
    """Yield every key whose value is a secret. The message does not contain the value."""
    raw = config.model_dump(mode="json")
    for section in _FREE_TEXT:
        value: Any = raw
        for part in section:
            value = value.get(part) if isinstance(value, Mapping) else None
        for key in _secrets(value, section):
            yield ConfigFault(
                (key,),
                "contains a secret (a token, a key or a password), which the run folder and every "
                "checkpoint would store; remove it, and pass secrets in environment variables such "
                "as HF_TOKEN and WANDB_API_KEY",
            )


def _secrets(value: Any, at: Key) -> Iterator[Key]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if is_secret(key):
                yield at
            yield from _secrets(item, (*at, key))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _secrets(item, (*at, str(number)))
    elif is_secret(value, key=at[-1]):
        yield at


def redacted_keys(raw: Any) -> list[str]:
    """Return the dotted keys of a stored run file whose values an earlier version redacted."""
    return [dotted(key) for key in _redacted(raw, ())]


def restore_redacted(stored: dict[str, Any], original: Mapping[str, Any]) -> list[str]:
    """Restore redacted values of a stored run file from the original one, in place.

    Returns:
        the dotted keys that were restored.
    """
    restored = []
    for key in list(_redacted(stored, ())):
        there: Any = stored
        here: Any = original
        try:
            for part in key[:-1]:
                there, here = there[_index(part, there)], here[_index(part, here)]
            there[_index(key[-1], there)] = here[_index(key[-1], here)]
        except (LookupError, TypeError):
            continue  # the original file has no such value
        restored.append(dotted(key))
    return restored


def explain_redacted(keys: list[str]) -> str:
    """Return the message about redacted values of a stored run file."""
    return (
        f"{', '.join(keys)}: an earlier version of MegaLite mistook the value for a secret and "
        f'stored "{REDACTED}" instead; resume the run with its original run file, whose value is '
        "then stored with new checkpoints"
    )


def _redacted(value: Any, at: Key) -> Iterator[Key]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _redacted(item, (*at, key))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _redacted(item, (*at, str(number)))
    elif isinstance(value, str) and REDACTED in value:
        yield at


def _index(part: str, owner: Any) -> Any:
    return int(part) if isinstance(owner, list) else part
