# covers: data_prep/readers.py data_prep/records.py data_prep/compressed.py
from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.inputs import find_streams
from data_prep.part_reader import PartReader, read_streams
from data_prep.records import BadRecord, BadRecordCounter
from megalite.errors import DataError

TEXTS = ["one\r\ntwo  \n", "中文 \u2028 line", "  😀\t", "z" * 70_000]
LINES = b"".join(json.dumps({"text": text, "id": 7}).encode() + b"\n" for text in TEXTS)


def documents(path: Path, field: str = "text", limit: int = 0) -> list[str]:
    bad, good = BadRecordCounter(limit), []
    for record in read_streams(find_streams([str(path)]), field):
        if isinstance(record, BadRecord):
            bad.add(record)
        else:
            good.append(record)
    return good


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, "zstd", asbytes=True))


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}
COMPRESSED = {
    "a.jsonl": LINES,
    "a.jsonl.gz": gzip.compress(LINES),
    "members.jsonl.gz": gzip.compress(LINES[:100]) + gzip.compress(LINES[100:]),
    "a.jsonl.bz2": bz2.compress(LINES),
    "streams.jsonl.bz2": bz2.compress(LINES[:100]) + bz2.compress(LINES[100:]),
    "a.jsonl.xz": lzma.compress(LINES),
    "streams.jsonl.xz": lzma.compress(LINES[:100]) + bytes(8) + lzma.compress(LINES[100:]),
    "a.jsonl.zst": zstd(LINES),
    "frames.jsonl.zst": zstd(LINES[:100]) + zstd(LINES[100:]),
    "mark.jsonl": b"\xef\xbb\xbf" + LINES,
    "blank.jsonl": LINES.replace(b"\n", b"\r\n  \n"),
    "unended.jsonl": LINES[:-1],
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_json_lines_are_read_from_every_compression(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(COMPRESSED[name])
    assert documents(path) == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.py.gz", "a.c.bz2", "a.h.XZ", "a.md.zst"])
def test_text_file_is_one_unchanged_document(name: str, tmp_path: Path) -> None:
    data = TEXTS[0].encode() + TEXTS[1].encode()
    (tmp_path / name).write_bytes(PACKERS.get(Path(name).suffix.lower(), bytes)(data))
    assert documents(tmp_path / name) == [TEXTS[0] + TEXTS[1]]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_is_read_across_row_groups(kind: pa.DataType, tmp_path: Path) -> None:
    table = pa.table({"n": [1] * 600, "body": pa.array(["a", "b", "c"] * 200).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=250)
    assert documents(tmp_path / "a.parquet", "body") == ["a", "b", "c"] * 200


BAD_LINES = {
    "no field 'text'; it has id": b'{"id": 1}',
    "field 'text' is None, not text": b'{"text": null}',
    "field 'text' is ['a'], not text": b'{"text": ["a"]}',
    "[1, 2] is not a JSON object": b"[1, 2]",
    "not valid JSON: Unterminated string": b'{"text": "cut he',
    "not UTF-8 at byte 10": b'{"text": "\xff"}',
    "a NUL at character 1": b'{"text": "a\\u0000"}',
    "a NUL at byte 10": b'{"text": "\0"}',
    "not valid JSON: Extra data at character 13": b'{"text": "a"}{"text": "b"}',
    "not readable JSON": b"[" * 100_000,
    "half a surrogate pair at character 0": b'{"text": "\\ud800"}',
    "an empty document": b'{"text": ""}',
}


@pytest.mark.parametrize("reason", BAD_LINES)
def test_bad_line_is_reported_counted_and_omitted(
    reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + BAD_LINES[reason] + b'\n{"text": "after"}\n')
    with pytest.raises(DataError) as caught:
        documents(path)
    assert f"{path} line 2: {reason}" in str(caught.value)
    assert "bad record 1, more than --max-bad-records 0 allows" in str(caught.value)
    with caplog.at_level("WARNING", "megalite"):
        assert documents(path, limit=1) == ["good", "after"]
    assert f"{path} line 2: {reason}" in caplog.text


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "an empty document"), (b"ab\0", "a NUL"), (b"ab\xe4", "not UTF-8 at byte 2")],
)
def test_bad_text_file_is_reported(data: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(DataError, match=f"a.txt: {reason}"):
        documents(tmp_path / "a.txt")


def test_bad_rows_of_parquet_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    column = pa.array([b"good", None, b"", b"\xff\xfe"], pa.binary())
    invalid = pa.StringArray.from_buffers(4, *column.buffers()[1:], column.buffers()[0])
    pq.write_table(pa.table({"text": invalid}), path)
    assert documents(path, limit=3) == ["good"]
    with pytest.raises(DataError, match="row 1: null, not text; bad record 1"):
        documents(path)
    with pytest.raises(DataError, match="row 3: not UTF-8 at byte 0; bad record 3, more than"):
        documents(path, limit=2)


def test_table_without_the_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": [1], "body": ["x"]}), path)
    with pytest.raises(DataError, match=r"no column 'text'; it has n, body: choose one with"):
        documents(path, limit=100)
    with pytest.raises(DataError, match="column 'n' has int64, not strings"):
        documents(path, "n", limit=100)


def damaged(ending: str, tmp_path: Path) -> dict[str, bytes]:
    """Return truncated files, files with a changed byte or trailing data, and an empty one."""
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "whole.parquet")
    if ending == ".parquet":
        whole = (tmp_path / "whole.parquet").read_bytes()
        return {"half": whole[: len(whole) // 2], "cut": whole[:-1], "empty": b""}
    one = PACKERS[ending](LINES)
    flipped = bytearray(one + one)
    flipped[len(one) + 1] ^= 255
    return {
        "half": one[: len(one) // 2],
        "cut": one[:-1],
        "in the second's head": one + one[:3],
        "the second's head": bytes(flipped),
        "rest": one + b"rest",
        "empty": b"",
    }


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.bz2", ".jsonl.xz", ".txt.zst", ".parquet"])
def test_damaged_file_ends_the_command(ending: str, tmp_path: Path) -> None:
    """This holds for any --max-bad-records, because missing records cannot be counted."""
    path = tmp_path / f"a{ending}"
    for name, data in damaged(path.suffix, tmp_path).items():
        path.write_bytes(data)
        with pytest.raises(DataError, match=f"a{ending}: cannot be read to its end: ."):
            assert documents(path, limit=100) == name


@pytest.mark.parametrize("ending", PACKERS)
def test_damage_in_parts_is_reported(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    rows = [f'{{"text": "{number * 7919:x}"}}\n'.encode() for number in range(4000)]
    path.write_bytes(PACKERS[ending](b"".join(rows))[:-9])
    (stream,) = find_streams([str(path)], part_bytes=1000)
    with pytest.raises(DataError, match="cannot be read to its end"):
        list(read_streams([stream], "text"))
    for part in (sum(map(len, rows)) // 1000, 1 << 20):  # the last one, and one beyond the end
        with pytest.raises(DataError, match="cannot be read to its end"):
            list(PartReader("text").read(stream, part))


def test_column_of_another_type_is_refused_before_a_row_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [["a"]], "meta": [{"text": "a"}]}), path)
    for field in ("text", "meta"):
        with pytest.raises(DataError, match=f"column '{field}' has (list|struct)<.*, not string"):
            documents(path, field)
    with pytest.raises(DataError, match=r"no column 'meta.text'; it has text, meta"):
        documents(path, "meta.text")


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.gz"])
@pytest.mark.parametrize("part_bytes", [10, 10**6])
def test_file_that_changed_is_reported(name: str, part_bytes: int, tmp_path: Path) -> None:
    path = tmp_path / name
    pack = PACKERS.get(path.suffix, bytes)
    path.write_bytes(pack(LINES))
    (stream,) = find_streams([str(path)], part_bytes=part_bytes)
    path.write_bytes(pack(LINES + LINES[:40]))
    with pytest.raises(DataError, match=f"{name}: got [0-9,]+ bytes, but [0-9,]+ when the command"):
        list(read_streams([stream], "text"))
    path.unlink()
    with pytest.raises(DataError, match=f"{name}: cannot be read to its end: No such file"):
        list(read_streams([stream], "text"))


def test_empty_file_of_json_lines_has_no_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    assert documents(tmp_path / "a.jsonl") == []


def test_bad_records_are_counted_and_a_few_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n" * 50)
    with caplog.at_level("WARNING", "megalite"):
        assert documents(path, limit=50) == []
    assert len(caplog.records) == 21
