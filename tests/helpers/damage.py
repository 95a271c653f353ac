"""Damage to files: seeded changes of bytes, of JSON values, and of what a file holds as a whole."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

HALF = "\ud83d"  # of a surrogate pair: JSON can write it, UTF-8 cannot
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


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of every value within a JSON value, as keys and indices."""
    yield at
    items = (
        value.items() if isinstance(value, dict)
        else enumerate(value) if isinstance(value, list)
        else ()
    )  # fmt: skip
    for key, item in items:
        yield from places(item, (*at, key))


def change_value(value: Any, chosen: random.Random) -> Any:
    """Return a JSON value with one to three of the values in it replaced, removed, renamed or
    nested.
    """
    value = copy.deepcopy(value)
    for _ in range(chosen.choice((1, 1, 1, 2, 3))):
        spots = [at for at in places(value) if at]
        if not spots:
            return chosen.choice(VALUES)
        # as often near the root as deep within it
        depth = chosen.choice(sorted({len(at) for at in spots}))
        at = chosen.choice([at for at in spots if len(at) == depth])
        owner = value
        for part in at[:-1]:
            owner = owner[part]
        way = chosen.choice(("replace",) * 6 + ("remove", "rename", "nest", "number"))
        if way == "remove":
            del owner[at[-1]]
        elif way == "rename" and isinstance(owner, dict):
            owner[chosen.choice(("", HALF, "\x1b[31m", "no such key"))] = owner.pop(at[-1])
        elif way == "nest":
            for _ in range(chosen.choice((1, 50, 5000))):
                owner[at[-1]] = [owner[at[-1]]]
            return value  # too deep to be walked again
        elif way == "number" and isinstance(owner[at[-1]], int | float):
            owner[at[-1]] = chosen.choice((-1, 2, 10, 0.1)) * owner[at[-1]]
        else:
            owner[at[-1]] = copy.deepcopy(chosen.choice(VALUES))
    return value


def change_bytes(data: bytes, chosen: random.Random) -> bytes:
    """Return bytes that are cut, flipped, repeated, or have others among them."""
    way = chosen.choice(("cut", "flip", "flip", "insert", "remove", "repeat", "whole", "start"))
    place = chosen.randrange(len(data) + 1)
    if way == "cut" or not data:
        return data[:place]
    if way == "flip":
        changed = bytearray(data)
        for _ in range(chosen.choice((1, 3, 30))):
            changed[chosen.randrange(len(data))] ^= 1 << chosen.randrange(8)
        return bytes(changed)
    if way == "start":  # where sizes and magic numbers are
        changed = bytearray(data)
        changed[chosen.randrange(min(len(data), 40))] = chosen.choice((0, 1, 127, 128, 255))
        return bytes(changed)
    if way == "whole":
        return chosen.choice(WHOLES)
    if way == "repeat":
        return data[:place] + data
    more = chosen.choice((b"\0", b"\xff", b'"', b"{", b"]", b"\n", b"\x1b[2J", "é".encode()))
    return data[:place] + (more + data[place:] if way == "insert" else data[place + 8 :])


def dump(value: Any) -> bytes:
    """JSON as Python writes it, however deep it nests."""
    try:
        return json.dumps(value).encode()
    except RecursionError:
        return b"[" * 20_000


def change_json(data: bytes, chosen: random.Random) -> bytes:
    """Return the text of a JSON value, its values or its bytes changed."""
    if chosen.random() < 0.25:
        return change_bytes(data, chosen)
    return dump(change_value(json.loads(data), chosen))


def change_rows(data: bytes, chosen: random.Random) -> bytes:
    """Return lines of JSON, one of them changed or the bytes."""
    if chosen.random() < 0.25:
        return change_bytes(data, chosen)
    lines = data.splitlines()
    number = chosen.randrange(len(lines))
    lines[number] = dump(change_value(json.loads(lines[number]), chosen))
    return b"\n".join(lines) + b"\n"


def change_safetensors(data: bytes, chosen: random.Random) -> bytes:
    """Return a safetensors file, its header changed or its bytes."""
    if chosen.random() < 0.25:
        return change_bytes(data, chosen)
    size = int.from_bytes(data[:8], "little")
    header = dump(change_value(json.loads(data[8 : 8 + size]), chosen))
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


Change = Callable[[bytes, random.Random], bytes]
