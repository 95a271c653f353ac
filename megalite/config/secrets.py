"""Secrets in a run file: refused, because every run and checkpoint keeps a copy of the file.

The copy is exact, or it could not be resumed. So a secret is looked for only where free text
stands: paths, names and the model's own values are never taken for one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megalite.config.faults import Fault, Key, dotted
from megalite.config.schema import RunConfig
from megalite.log import REDACTED, is_secret

# Values that MegaLite passes on, or shows, without a meaning of their own.
_FREE_TEXT: tuple[Key, ...] = (
    ("deepspeed",),
    ("logging", "wandb"),
    ("logging", "samples", "prompts"),
)


def secret_faults(config: RunConfig) -> Iterator[Fault]:
    """Yield every key whose value is a secret; the value itself is not shown."""
    raw = config.model_dump(mode="json")
    for section in _FREE_TEXT:
        value: Any = raw
        for part in section:
            value = value.get(part) if isinstance(value, Mapping) else None
        for key in _secrets(value, section):
            yield Fault(
                (key,),
                "it holds a secret (a token, a key or a password), which the run folder and every "
                "checkpoint would keep; remove it, and pass secrets in environment variables such "
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
    """Return the dotted keys of a stored run file that lost a value to an earlier version's
    redaction.
    """
    return [dotted(key) for key in _redacted(raw, ())]


def restore_redacted(stored: dict[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Take values that redaction replaced in a stored run file from the run's own, in place.

    Returns:
        the dotted keys that were restored.
    """
    restored = []
    for key in list(_redacted(stored, ())):
        there: Any = stored
        here: Any = own
        try:
            for part in key[:-1]:
                there, here = there[_index(part, there)], here[_index(part, here)]
            there[_index(key[-1], there)] = here[_index(key[-1], here)]
        except (LookupError, TypeError):
            continue  # the run's own file has no such value
        restored.append(dotted(key))
    return restored


def explain_redacted(keys: list[str]) -> str:
    """Say what happened to a stored run file, and the way out."""
    return (
        f"{', '.join(keys)}: an earlier version of MegaLite took the value for a secret and stored "
        f'"{REDACTED}" instead; continue the run with its own run file: it supplies the value, and '
        "the checkpoints saved from then on hold it"
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
