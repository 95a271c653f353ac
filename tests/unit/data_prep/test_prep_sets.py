# covers: data_prep/hf_datasets.py data_prep/arrow_columns.py
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest

from data_prep.inputs import find_streams
from data_prep.part_reader import PartReader, read_streams
from data_prep.records import BadRecord, Record
from data_prep.streams import Stream
from megalite.errors import CommandError, DataError, UserError

TEXTS: list[str | None] = [f"document {number}" for number in range(100)]


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def saved(folder: Path, texts: list[str | None] = TEXTS, files: int = 3) -> str:
    rows = datasets.Dataset.from_dict({"n": list(range(len(texts))), "text": texts})
    rows.save_to_disk(folder, num_shards=files)
    return str(folder)


def backwards(streams: list[Stream]) -> list[Record]:
    """Return all records, reading each stream's parts from the last to the first."""
    records: list[Record] = []
    for stream in streams:
        assert stream.parts
        reader = PartReader("text")
        parts = [list(reader.read(stream, part)) for part in reversed(range(stream.parts))]
        records += [record for part in reversed(parts) for record in part]
    return records


@pytest.mark.parametrize("part_bytes", [1, 100, 777, 10**6])
@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_saved_set_is_read_in_parts(prefix: str, part_bytes: int, tmp_path: Path) -> None:
    streams = find_streams([prefix + saved(tmp_path / "set")], part_bytes=part_bytes)
    assert [(stream.kind, stream.paths) for stream in streams] == [
        ("saved", (str(tmp_path / "set"),))
    ]
    assert streams[0].parts is not None
    assert (streams[0].parts > 1) == (part_bytes < 10**6)
    assert list(read_streams(streams, "text")) == backwards(streams) == TEXTS


def test_saved_set_reports_missing_splits(tmp_path: Path) -> None:
    folder = tmp_path / "sets"
    for split in ("train", "test"):
        saved(folder / split, [f"{split} 0", f"{split} 1"], 1)
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for name, split in (("", "train"), (":train", "train"), (":test", "test")):
        for prefix in ("", "hf:"):
            streams = find_streams([f"{prefix}{folder}{name}"])
            assert list(read_streams(streams, "text")) == [f"{split} 0", f"{split} 1"]
    with pytest.raises(CommandError, match="no split valid; it has train, test: name one as hf:"):
        find_streams([f"{folder}:valid"])
    with pytest.raises(CommandError, match="has no splits; remove :test"):
        find_streams([f"{folder}/train:test"])
    (folder / "dataset_dict.json").write_text('{"splits": ["test"]}')
    with pytest.raises(CommandError, match="no split train; it has test"):
        find_streams([str(folder)])


def test_saved_set_with_an_index_is_read_in_its_order(tmp_path: Path) -> None:
    """Old versions of the library wrote the row numbers of a selection to an index."""
    folder = Path(saved(tmp_path / "set"))
    order = np.random.default_rng(1).permutation(100)[:70].astype(np.uint64)
    table = pa.table({"indices": order})
    with pa.ipc.new_stream(str(folder / "indices.arrow"), table.schema) as stream:
        stream.write_table(table)
    state = json.loads((folder / "state.json").read_text())
    state["_indices_data_files"] = [{"filename": "indices.arrow"}]
    (folder / "state.json").write_text(json.dumps(state))
    streams = find_streams([str(folder)], part_bytes=200)
    assert backwards(streams) == [TEXTS[number] for number in order]


def test_saved_set_reports_bad_rows_and_damage(tmp_path: Path) -> None:
    name = saved(tmp_path / "set", ["good", None, "", "a\0", "last"], 2)
    (stream,) = find_streams([name], part_bytes=30)
    assert list(read_streams([stream], "text")) == [
        "good",
        BadRecord(f"{name} row 1", "null, not text"),
        BadRecord(f"{name} row 2", "an empty document"),
        BadRecord(f"{name} row 3", "a NUL at character 1"),
        "last",
    ]
    with pytest.raises(DataError, match="set: no column 'body'; it has n, text"):
        list(read_streams([stream], "body"))
    with pytest.raises(DataError, match="set: column 'n' has int64, not strings"):
        list(read_streams([stream], "n"))
    (arrow, *_) = sorted((tmp_path / "set").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[: arrow.stat().st_size // 2])
    with pytest.raises(DataError, match="cannot be read to its end"):
        find_streams([name])
    arrow.unlink()
    with pytest.raises(DataError, match="cannot be read to its end"):
        find_streams([name])
    (tmp_path / "set/state.json").write_text("{")
    with pytest.raises(DataError, match=r"state\.json: cannot be read to its end"):
        find_streams([name])


def hub(tmp_path: Path, rows: Callable[[str, int], list[dict[str, Any]]]) -> str:
    folder = tmp_path / "hub"
    folder.mkdir()
    for split in ("train", "test"):
        for number in range(3):
            lines = [json.dumps(row) + "\n" for row in rows(split, number)]
            (folder / f"{split}-{number}.jsonl").write_text("".join(lines))
    return f"hf:{folder}"


@pytest.mark.parametrize("streaming", [True, False])
def test_folder_of_data_files_is_read_by_its_split(streaming: bool, tmp_path: Path) -> None:
    name = hub(tmp_path, lambda split, file: [{"text": f"{split} {file} {n}"} for n in range(5)])
    for suffix, split in (("", "train"), (":test", "test")):
        streams = find_streams([name + suffix], streaming=streaming, part_bytes=90)
        assert [(one.kind, str(one)) for one in streams] == [("hub", name + suffix)]
        assert streams[0].parts in ([3] if streaming else [2, 3])
        wanted = [f"{split} {file} {n}" for file in range(3) for n in range(5)]
        assert list(read_streams(streams, "text")) == backwards(streams) == wanted
        again = find_streams([name + suffix], streaming=streaming, part_bytes=90)
        assert again == streams
    with pytest.raises(UserError, match=r"none: cannot be opened: .*train.*test"):
        find_streams([f"{name}:none"], streaming=streaming)
    with pytest.raises(UserError, match="hub/none: cannot be opened: "):
        find_streams([f"{name}/none"], streaming=streaming)


@pytest.mark.parametrize("streaming", [True, False])
def test_hub_data_set_reports_bad_rows(streaming: bool, tmp_path: Path) -> None:
    name = hub(tmp_path, lambda split, file: [{"text": "a"}, {"text": None if file else ""}])
    streams = find_streams([name], streaming=streaming)
    faults = [one for one in read_streams(streams, "text") if isinstance(one, BadRecord)]
    places = [f" file {n} row 1" if streaming else f" row {2 * n + 1}" for n in range(3)]
    assert [fault.place for fault in faults] == [name + place for place in places]
    assert faults[0].reason == "an empty document"
    with pytest.raises(DataError, match="hub: no column 'body'; it has text"):
        list(read_streams(streams, "body"))


def test_identity_of_a_data_set_depends_on_its_files(tmp_path: Path) -> None:
    name = hub(tmp_path, lambda split, file: [{"text": "a"}])

    def identity(suffix: str = "") -> str:
        return find_streams([name + suffix])[0].identity

    first = identity()
    assert first == identity()
    assert first != identity(":test")
    (tmp_path / "hub/train-1.jsonl").write_text('{"text": "other"}\n')
    assert identity() != first


def test_hub_configuration_is_chosen_by_name(tmp_path: Path) -> None:
    name = hub(tmp_path, lambda split, file: [{"text": f"{split} {file}"}])
    (tmp_path / "hub/README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: train-1.jsonl\n"
        "- config_name: two\n  data_files: train-2.jsonl\n---\n"
    )
    for config, number in (("one", 1), ("two", 2)):
        assert list(read_streams(find_streams([f"{name}@{config}:train"]), "text")) == [
            f"train {number}"
        ]
    with pytest.raises(DataError, match=r"\['one', 'two'\].*; write hf:NAME@CONFIG\[:SPLIT\]"):
        find_streams([name])
