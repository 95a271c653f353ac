# covers: data_prep/part_reader.py data_prep/jsonl.py data_prep/parquet.py
"""Parts of any size, read in any order, add up to the input."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.inputs import find_streams
from data_prep.part_reader import PartReader, read_streams
from data_prep.records import BadRecord, Record
from data_prep.streams import Stream


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, "zstd", asbytes=True)) if data else b""


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}
BOM = b"\xef\xbb\xbf"

text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
good = text.map(lambda value: json.dumps({"text": value}, ensure_ascii=False).encode())
bad = st.sampled_from(
    [b"{}", b'{"text": ""}', b'{"text": "\xff"}', b'{"te', b"\0", b'"\xef\xbb\xbf"']
)
blank = st.sampled_from([b"", b" ", b"\t "])
line = st.one_of(good, good, bad, blank)
ends = st.sampled_from([b"\n", b"\r\n"])
files = st.builds(
    lambda mark, lines, last: mark + b"".join(lines) + last,
    st.sampled_from([b"", b"", BOM]),
    st.lists(st.builds(bytes.__add__, line, ends), max_size=12),
    st.one_of(st.just(b""), line),
)
part_sizes = st.one_of(st.integers(1, 50), st.integers(1, 1000))
relaxed = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def expected(path: Path, data: bytes, part_bytes: int) -> dict[int, list[Record]]:
    """Return the records of each part by splitting the whole file into lines."""
    parts: dict[int, list[Record]] = {}
    offset = 0
    for number, piece in enumerate(data.split(b"\n"), 1):
        part, offset = offset // part_bytes, offset + len(piece) + 1
        content = (piece.removeprefix(BOM) if number == 1 else piece).strip()
        if not content:
            continue
        try:
            record: Record = str(json.loads(content.decode())["text"])
        except (ValueError, KeyError, TypeError):
            record = ""
        parts.setdefault(part, []).append(record or BadRecord(f"{path} line {number}", ""))
    return parts


def plain(records: Sequence[Record]) -> list[Record]:
    """Return the records, with bad records reduced to their places."""
    return [BadRecord(one.place, "") if isinstance(one, BadRecord) else one for one in records]


def in_any_order(
    stream: Stream, count: int, draw: random.Random
) -> dict[int, tuple[list[Record], bool]]:
    """Read the parts with one reader in a random order, some twice and some only partly."""
    parts: dict[int, tuple[list[Record], bool]] = {}
    reader = PartReader("text")
    order = list(range(count)) * 2
    draw.shuffle(order)
    for part in order:
        if draw.random() < 0.2:
            begun: Iterator[Record] = reader.read(stream, part)
            list(islice(begun, 1))
            del begun
        now = plain(list(reader.read(stream, part))), reader.ended
        assert parts.setdefault(part, now) == now
    reader.close()
    return parts


@pytest.mark.parametrize("ending", PACKERS)
@relaxed
@given(data=files, part_bytes=part_sizes, cut=st.floats(0, 1), draw=st.randoms())
def test_parts_of_json_lines_add_up_to_the_file(
    ending: str, data: bytes, part_bytes: int, cut: float, draw: random.Random, tmp_path: Path
) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    pack = PACKERS[ending]
    data = data or b"{}"
    at = int(len(data) * cut)
    path.write_bytes(pack(data[:at]) + pack(data[at:]))
    (stream,) = find_streams([str(path)], part_bytes=part_bytes)
    size = part_bytes if stream.parts != 1 else 1 << 30
    wanted = expected(path, data, size)
    count = max(1, -(-len(data) // size))
    assert stream.parts == (count if not ending or stream.parts else None)
    parts = in_any_order(stream, count + 2, draw)
    assert {part: records for part, (records, _) in parts.items() if records} == wanted
    assert [parts[part][1] for part in range(count + 2)] == [False] * (count - 1) + [True] * 3
    whole = [record for part in sorted(wanted) for record in wanted[part]]
    assert plain(list(read_streams([stream], "text"))) == whole


@relaxed
@given(
    groups=st.lists(st.lists(st.one_of(st.none(), st.just(""), text), max_size=5), max_size=8),
    part_bytes=st.integers(1, 3000),
    draw=st.randoms(),
)
def test_parts_of_parquet_add_up_to_the_file(
    groups: list[list[str | None]], part_bytes: int, draw: random.Random, tmp_path: Path
) -> None:
    path = tmp_path / "a.parquet"
    schema = pa.schema([("n", pa.int64()), ("text", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for group in groups:
            writer.write_table(pa.table([[0] * len(group), group], schema), row_group_size=5)
    rows = [row for group in groups for row in group]
    wanted = [row or BadRecord(f"{path} row {number}", "") for number, row in enumerate(rows)]
    (stream,) = find_streams([str(path)], part_bytes=part_bytes)
    assert stream.parts is not None
    parts = in_any_order(stream, stream.parts + 1, draw)
    assert [record for part in sorted(parts) for record in parts[part][0]] == wanted
    assert [parts[part][1] for part in sorted(parts)] == [False] * (stream.parts - 1) + [True] * 2


@relaxed
@given(
    sizes=st.lists(
        st.tuples(st.sampled_from(["a.txt", "a.jsonl", "b.jsonl.gz"]), st.integers(0, 9))
    ),
    part_bytes=st.integers(1, 600),
)
def test_small_files_are_read_in_groups_in_order(
    sizes: list[tuple[str, int]], part_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("files")
    wanted: list[Record] = []
    for number, (name, count) in enumerate(sizes):
        path = folder / f"{number:03d}{name}"
        texts = [f"{number} {n}" for n in range(count)]
        if name == "a.txt":
            path.write_text("\n".join(texts))
            wanted.append("\n".join(texts) or BadRecord(str(path), ""))
        else:
            data = b"".join(b'{"text": "%s"}\n' % one.encode() for one in texts) + b"!\n"
            path.write_bytes(data if path.suffix != ".gz" else gzip.compress(data))
            wanted += [*texts, BadRecord(f"{path} line {count + 1}", "")]
    streams = find_streams([str(folder)], part_bytes=part_bytes) if sizes else []
    assert plain(list(read_streams(streams, "text"))) == wanted
    assert [path for stream in streams for path in stream.paths] == sorted(
        str(path) for path in folder.iterdir()
    )
    for stream in streams:
        weights = [4 * size if path.endswith(".gz") else size for path, size in on_disk(stream)]
        assert len(stream.paths) == 1 or sum(weights) <= part_bytes
        assert stream.size == sum(size for _, size in on_disk(stream))


def on_disk(stream: Stream) -> list[tuple[str, int]]:
    return [(path, Path(path).stat().st_size) for path in stream.paths]


def test_parts_inside_a_long_line_are_empty(tmp_path: Path) -> None:
    data = b'{"text": "' + b"z" * 1000 + b'"}\n{"text": "after"}\n'
    for ending, pack in PACKERS.items():
        path = tmp_path / f"a.jsonl{ending}"
        path.write_bytes(pack(data))
        (stream,) = find_streams([str(path)], part_bytes=40)
        reader = PartReader("text")
        parts = [list(reader.read(stream, part)) for part in range(30)]
        assert [n for n, part in enumerate(parts) if part] == [0, 1013 // 40]
        assert list(reader.read(stream, 7)) == []
        assert not reader.ended


@pytest.mark.parametrize("ending", PACKERS)
def test_consumed_bytes_of_parts_add_up_to_the_size(ending: str, tmp_path: Path) -> None:
    draw = random.Random(1)
    rows = [f'{{"text": "{draw.getrandbits(512):x}"}}\n'.encode() for _ in range(40_000)]
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(PACKERS[ending](b"".join(rows)))
    (stream,) = find_streams([str(path)], part_bytes=500_000)
    reader, part, consumed = PartReader("text"), 0, 0
    while not reader.ended:
        assert len(list(reader.read(stream, part))) > 0
        consumed += reader.consumed
        part += 1
    assert part == -(-sum(map(len, rows)) // 500_000)
    assert consumed == pytest.approx(stream.size, rel=0.1)
