from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.inputs import Unit, find_units
from data_prep.readers import BadRecords, read_documents
from megalite.errors import DataError

TEXTS = ["one\r\ntwo  \n", "中文 \u2028 line", "  😀\t", "z" * 70_000]
LINES = b"".join(json.dumps({"text": text, "id": 7}).encode() + b"\n" for text in TEXTS)


def unit(path: Path) -> Unit:
    return find_units([str(path)])[0]


def documents(path: Path, field: str = "text", limit: int = 0) -> list[str]:
    return list(read_documents(unit(path), field, BadRecords(limit)))


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, "zstd", asbytes=True))


PACKED = {
    "a.jsonl": LINES,
    "a.jsonl.gz": gzip.compress(LINES),
    "members.jsonl.gz": gzip.compress(LINES[:100]) + gzip.compress(LINES[100:]),
    "a.jsonl.zst": zstd(LINES),
    "frames.jsonl.zst": zstd(LINES[:100]) + zstd(LINES[100:]),
    "mark.jsonl": b"\xef\xbb\xbf" + LINES,
    "blank.jsonl": LINES.replace(b"\n", b"\r\n  \n"),
    "unended.jsonl": LINES[:-1],
}


@pytest.mark.parametrize("name", PACKED)
def test_json_lines_are_read_however_packed(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(PACKED[name])
    assert documents(path) == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.py.gz", "a.md.zst"])
def test_a_text_file_is_one_document_unchanged(name: str, tmp_path: Path) -> None:
    data = TEXTS[0].encode() + TEXTS[1].encode()
    packed = {".gz": gzip.compress, ".zst": zstd}.get(Path(name).suffix, bytes)(data)
    (tmp_path / name).write_bytes(packed)
    assert documents(tmp_path / name) == [TEXTS[0] + TEXTS[1]]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_parquet_is_read_across_row_groups(kind: pa.DataType, tmp_path: Path) -> None:
    table = pa.table({"n": [1] * 600, "body": pa.array(["a", "b", "c"] * 200, kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=250)
    assert documents(tmp_path / "a.parquet", "body") == ["a", "b", "c"] * 200


BAD_LINES = {
    "no field 'text'; it has id": b'{"id": 1}',
    "field 'text' is None, not text": b'{"text": null}',
    "field 'text' is ['a'], not text": b'{"text": ["a"]}',
    "[1, 2] is not a JSON object": b"[1, 2]",
    "not whole JSON: Unterminated string": b'{"text": "cut he',
    "not UTF-8 at byte 10": b'{"text": "\xff"}',
    "a NUL at character 1": b'{"text": "a\\u0000"}',
    "half a surrogate pair at character 0": b'{"text": "\\ud800"}',
    "an empty document": b'{"text": ""}',
}


@pytest.mark.parametrize("reason", BAD_LINES)
def test_a_bad_line_is_named_counted_and_left_out(
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
def test_a_bad_text_file_is_named(data: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(DataError, match=f"a.txt: {reason}"):
        documents(tmp_path / "a.txt")


def test_bad_rows_of_parquet_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    column = pa.array([b"good", None, b"", b"\xff\xfe"], pa.binary())
    invalid = pa.StringArray.from_buffers(4, *column.buffers()[1:], column.buffers()[0])
    pq.write_table(pa.table({"text": invalid}), path)
    bad = BadRecords(3)
    assert list(read_documents(unit(path), "text", bad)) == ["good"]
    assert bad.count == 3
    with pytest.raises(DataError, match="row 3: not UTF-8 at byte 0; bad record 3, more than"):
        documents(path, limit=2)


def test_a_table_without_the_column_ends_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": [1], "body": ["x"]}), path)
    with pytest.raises(DataError, match=r"no column 'text'; it has n, body: choose one with"):
        documents(path, limit=100)
    with pytest.raises(DataError, match="column 'n' holds int64, not strings"):
        documents(path, "n", limit=100)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.txt.gz"])
def test_a_cut_file_ends_the_command(name: str, tmp_path: Path) -> None:
    """However many bad records are allowed: what is missing cannot be counted."""
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "whole.parquet")
    whole = {
        ".gz": gzip.compress(LINES),
        ".zst": zstd(LINES),
        ".parquet": (tmp_path / "whole.parquet").read_bytes(),
    }[Path(name).suffix]
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=f"{name}: cannot be read to its end: "):
        documents(tmp_path / name, limit=100)


def test_many_bad_records_are_counted_but_not_all_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n" * 50)
    bad = BadRecords(50)
    with caplog.at_level("WARNING", "megalite"):
        assert list(read_documents(unit(path), "text", bad)) == []
    assert bad.count == 50
    assert len(caplog.records) == 21


def test_a_hub_data_set_is_read_by_its_split(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(
            f'{{"text": "{split} 0"}}\n{{"text": "{split} 1"}}\n{{"text": ""}}\n'
        )
    for name in (f"hf:{tmp_path}", f"hf:{tmp_path}:test"):
        bad = BadRecords(1)
        (part,) = find_units([name])
        found = "test" if name.endswith(":test") else "train"
        assert list(read_documents(part, "text", bad)) == [f"{found} 0", f"{found} 1"]
        assert bad.count == 1
    (missing,) = find_units([f"hf:{tmp_path}:none"])
    with pytest.raises(DataError, match="none: cannot be read to its end: Bad split"):
        list(read_documents(missing, "text", BadRecords(0)))
