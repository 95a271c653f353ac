"""Damage to files: seeded changes of bytes, of JSON values, and of whole files."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

HALF = "\ud83d"  # half a surrogate pair, which JSON can express and UTF-8 cannot
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e308, float("nan"), float("inf"), 10**9, 2**63),
    *(10**40, "", "a", "0", HALF, "\x1b[2J", "\0", "../../etc/passwd", "/etc/passwd", "x" * 5000),
    *([], [None], [[]], ["a", 1], {}, {"a": {}}, {"": None}, [0] * 50, {HALF: HALF}),
)
WHOLES = (
    *(b"", b"\n", b"null", b"[]", b"{}", b"3", b'"a"', b"[null]", b'{"a": {}}', b"\xff\xfe\x00"),
    *(b"\xef\xbb\xbf{}", b"NaN", b"{" * 3, b"[" * 100_000, b'{"a":' * 50_000, b"\0" * 400),
    *(b"9" * 5000, b'{"format": "' + b"a" * 10, b'"\\ud83d"'),
)


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value within a JSON value, as keys and indices."""
    yield at
    items = (
        value.items() if isinstance(value, dict)
        else enumerate(value) if isinstance(value, list)
        else ()
    )  # fmt: skip
    for key, item in items:
        yield from paths(item, (*at, key))


def change_value(value: Any, chosen: random.Random) -> Any:
    """Return a JSON value with one to three inner values replaced, removed, renamed or nested."""
    value = copy.deepcopy(value)
    for _ in range(chosen.choice((1, 1, 1, 2, 3))):
        inner = [at for at in paths(value) if at]
        if not inner:
            return chosen.choice(VALUES)
        # each depth is equally likely
        depth = chosen.choice(sorted({len(at) for at in inner}))
        at = chosen.choice([at for at in inner if len(at) == depth])
        owner = value
        for part in at[:-1]:
            owner = owner[part]
        kind = chosen.choice(("replace",) * 6 + ("remove", "rename", "nest", "number"))
        if kind == "remove":
            del owner[at[-1]]
        elif kind == "rename" and isinstance(owner, dict):
            owner[chosen.choice(("", HALF, "\x1b[31m", "no such key"))] = owner.pop(at[-1])
        elif kind == "nest":
            for _ in range(chosen.choice((1, 50, 5000))):
                owner[at[-1]] = [owner[at[-1]]]
            return value  # too deep for another walk
        elif kind == "number" and isinstance(owner[at[-1]], int | float):
            owner[at[-1]] = chosen.choice((-1, 2, 10, 0.1)) * owner[at[-1]]
        else:
            owner[at[-1]] = copy.deepcopy(chosen.choice(VALUES))
    return value


def change_bytes(data: bytes, chosen: random.Random) -> bytes:
    """Return the data with bytes cut, flipped, inserted, removed, repeated or replaced."""
    kind = chosen.choice(("cut", "flip", "flip", "insert", "remove", "repeat", "whole", "start"))
    at = chosen.randrange(len(data) + 1)
    if kind == "cut" or not data:
        return data[:at]
    if kind == "flip":
        changed = bytearray(data)
        for _ in range(chosen.choice((1, 3, 30))):
            changed[chosen.randrange(len(data))] ^= 1 << chosen.randrange(8)
        return bytes(changed)
    if kind == "start":  # sizes and magic numbers
        changed = bytearray(data)
        changed[chosen.randrange(min(len(data), 40))] = chosen.choice((0, 1, 127, 128, 255))
        return bytes(changed)
    if kind == "whole":
        return chosen.choice(WHOLES)
    if kind == "repeat":
        return data[:at] + data
    more = chosen.choice((b"\0", b"\xff", b'"', b"{", b"]", b"\n", b"\x1b[2J", "é".encode()))
    return data[:at] + (more + data[at:] if kind == "insert" else data[at + 8 :])


def dump(value: Any) -> bytes:
    """Return a value as JSON. If it is nested too deeply for Python, return deep brackets."""
    try:
        return json.dumps(value).encode()
    except RecursionError:
        return b"[" * 20_000


def change_json(data: bytes, chosen: random.Random) -> bytes:
    """Return a JSON file with changed values, or changed bytes."""
    if chosen.random() < 0.25:
        return change_bytes(data, chosen)
    return dump(change_value(json.loads(data), chosen))


def change_rows(data: bytes, chosen: random.Random) -> bytes:
    """Return a JSONL file with one changed line, or changed bytes."""
    if chosen.random() < 0.25:
        return change_bytes(data, chosen)
    lines = data.splitlines()
    number = chosen.randrange(len(lines))
    lines[number] = dump(change_value(json.loads(lines[number]), chosen))
    return b"\n".join(lines) + b"\n"


def change_safetensors(data: bytes, chosen: random.Random) -> bytes:
    """Return a safetensors file with a changed header, or changed bytes."""
    if chosen.random() < 0.25:
        return change_bytes(data, chosen)
    size = int.from_bytes(data[:8], "little")
    header = dump(change_value(json.loads(data[8 : 8 + size]), chosen))
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


Change = Callable[[bytes, random.Random], bytes]
