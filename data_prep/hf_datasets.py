"""Data sets that the `datasets` library reads: from the hub, local files, or saved to disk."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.arrow_columns import check_column, column_records, rows_at_once
from data_prep.compressed import named_damage
from data_prep.records import Record
from data_prep.streams import HUB, DatasetFacts, ReaderSpec, Stream, even_parts
from megalite import env, hub
from megalite.errors import CommandError, DataError
from megalite.files import is_plain_name, read_object

_STREAMED_ROWS = 64  # read at a time; for Parquet the library holds some row groups
# Pages of a mapped data set stay in memory after they are read; after this many bytes the data set
# is mapped again.
_MAPPED_BYTES = 1 << 26


def describe_hub(name: str, streaming: bool, part_bytes: int) -> DatasetFacts:
    """Return the facts about a data set of the hub. Download it unless it is streamed.

    A streamed data set has one part for each data file. Others have equal parts of their rows.

    Raises:
        DataError: the library cannot open the data set. Its reason lists the splits or the
            configurations if one must be chosen.
    """
    try:
        builder, split = _builder(name)
        files = (builder.config.data_files or {}).get(split)
        origin = [str(builder.hash), str(builder.config.name), *map(str, files or [])]
        origin += [" ".join(map(str, data)) for data in getattr(files, "origin_metadata", ())]
        rows = _build(builder, split, streaming=streaming)
    except DataError:
        raise
    except Exception as error:  # the library's errors have no common base class
        raise _unopened(name, error) from error
    if streaming:
        return DatasetFacts(rows.num_shards, 0, [name, *origin, streaming])
    size = rows.data.nbytes
    identity = [name, *origin, rows._fingerprint, streaming]
    return DatasetFacts(even_parts(size, part_bytes), size, identity)


def check_reachable(name: str, label: str) -> None:
    """Check that a data set of the hub is in a cache, or that the hub can be reached.

    The library would try for half a minute, and takes seconds to import.

    Args:
        name: NAME, or NAME@CONFIG.
        label: name of the data set in messages.
    Raises:
        DataError: neither is true. The message has the command that downloads the data set.
    """
    from huggingface_hub import constants

    name = name.partition("@")[0]
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        return  # a path, for which the library has an error
    offline = env.variable("HF_DATASETS_OFFLINE").upper() in ("1", "TRUE", "YES", "ON")
    reason = "HF_DATASETS_OFFLINE is set" if offline else hub.unreachable()
    if reason is None:
        return
    prepared = Path(env.variable("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    downloaded = Path(constants.HF_HUB_CACHE)
    if not any(
        place.is_dir()
        for place in (
            prepared / name.replace("/", "___").lower(),
            prepared / name.replace("/", "___"),
            downloaded / f"datasets--{name.replace('/', '--')}",
        )
    ):
        raise DataError(
            f"{label}: no such file or folder here, not in the cache of data sets, and the "
            f"hub cannot be reached ({reason}); name a local file or folder, or run, on a machine "
            f"with a network,\nhf download {name} --repo-type dataset --local-dir "
            f"{name.rpartition('/')[2]}\nand give that folder"
        )
    env.set_default("HF_DATASETS_OFFLINE", "1")  # keeps the library from trying


def saved_folder(name: str) -> Path | None:
    """Return the folder of a data set that `save_to_disk` wrote, else None.

    Args:
        name: FOLDER, or FOLDER:SPLIT. The default split is train.
    Raises:
        CommandError: there is no such split.
    """
    folder = Path(name)
    split = ""
    if not folder.exists() and ":" in name:
        base, _, split = name.rpartition(":")
        folder = Path(base)
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        saved_split = _read_json(folder / "state.json").get("_split")
        if split not in ("", saved_split):
            raise CommandError(f"--input {name}: {folder} has no splits; remove :{split}")
        return folder
    if not (folder / "dataset_dict.json").is_file():
        return None
    splits = _read_json(folder / "dataset_dict.json").get("splits", [])
    if not isinstance(splits, list) or not all(map(is_plain_name, splits)):
        raise DataError(
            f"{folder}/dataset_dict.json: splits is not a list of names; save the data set again"
        )
    if (split or "train") not in splits:
        raise CommandError(
            f"--input {name}: no split {split or 'train'}; it has {', '.join(splits)}: name one "
            f"as {HUB}{folder}:{splits[0] if splits else 'SPLIT'}"
        )
    return folder / (split or "train")


def describe_saved(folder: str, streaming: bool, part_bytes: int) -> DatasetFacts:
    """Return the facts about a saved data set; DataError if the library cannot open it."""
    del streaming
    return DatasetFacts(even_parts(_open_saved(folder).data.nbytes, part_bytes))


class DatasetRows:
    """An open data set, whose parts are data files if it is streamed, else ranges of rows."""

    def __init__(self, name: str, *, saved: bool, streaming: bool) -> None:
        self._name = name
        self._saved = saved
        self._streaming = streaming and not saved
        self._label = name if saved else HUB + name
        self._rows: Any = None
        self._used = 0
        self.size: int | None = None  # rows are compared by their fingerprint
        self.ended = False
        self.consumed = 0

    def read_part(self, text_field: str, stream: Stream, part: int) -> Iterator[Record]:
        """Yield the documents of one part. Raises as `records`."""
        parts = stream.parts or 1
        yield from self.records(text_field, part, parts)
        self.consumed = stream.size // parts

    def records(self, text_field: str, part: int, parts: int) -> Iterator[Record]:
        """Yield the documents of one of `parts` parts.

        Raises:
            DataError: there is no such column, or not one of text; the data set cannot be read.
        """
        if self._rows is None or self._used > _MAPPED_BYTES:
            self.close()
            self._rows = self._open()
        place = f"{self._label} row"
        row = 0 if self._streaming else len(self._rows) * part // parts
        if self._streaming and parts > 1:
            place = f"{self._label} file {part} row"
        for table in self._tables(part, parts):
            check_column(table.schema, text_field, self._label)
            yield from column_records(table.column(text_field), place, row)
            row += len(table)

    def _open(self) -> Any:
        if self._saved:
            return _open_saved(self._name)
        try:
            return _build(*_builder(self._name), streaming=self._streaming)
        except DataError:
            raise
        except Exception as error:
            raise _unopened(self._name, error) from error

    def _tables(self, part: int, parts: int) -> Iterator[Any]:
        with named_damage(self._label, (Exception,)):
            yield from self._shard(part, parts) if self._streaming else self._slices(part, parts)

    def _shard(self, part: int, parts: int) -> Iterator[Any]:
        if self._rows.num_shards != parts:
            raise ValueError(f"{parts} data files were planned, {self._rows.num_shards} are there")
        with _no_torch():
            shard = self._rows.shard(parts, part, contiguous=True).with_format("arrow")
        yield from shard.iter(_STREAMED_ROWS)

    def _slices(self, part: int, parts: int) -> Iterator[Any]:
        rows = self._rows.with_format("arrow")
        first, stop = (len(rows) * n // parts for n in (part, part + 1))
        data = rows.data
        step = rows_at_once(data.nbytes, data.num_rows)
        self._used += data.nbytes // parts
        for row in range(first, stop, step):
            yield rows[row : min(row + step, stop)]

    def close(self) -> None:
        """Release the tables."""
        self._rows = None
        self._used = 0


def _builder(name: str) -> tuple[Any, str]:
    """Return the builder of NAME[@CONFIG][:SPLIT], and the split."""
    split = config = ""
    if not Path(name).exists():
        name, _, split = name.partition(":")
    if not Path(name).exists():
        name, _, config = name.partition("@")
    if not Path(name).exists():
        check_reachable(name, f"--input {HUB}{name}")
    import datasets

    return datasets.load_dataset_builder(name, config or None), split or "train"


def _build(builder: Any, split: str, *, streaming: bool) -> Any:
    if streaming:
        with _no_torch():
            return builder.as_streaming_dataset(split)
    builder.download_and_prepare()
    return builder.as_dataset(split)


def _open_saved(folder: str) -> Any:
    import datasets

    with named_damage(folder, (Exception,)):
        rows = datasets.load_from_disk(folder)
        state = _read_json(Path(folder, "state.json"))
        if files := state.get("_indices_data_files"):  # old versions' row order, which it ignores
            import pyarrow as pa

            tables = []
            for file in files:
                with pa.OSFile(str(Path(folder, file["filename"]))) as stream:
                    tables.append(pa.ipc.open_stream(stream).read_all())
            rows = rows.select(pa.concat_tables(tables).column(0).to_numpy())
        return rows.with_format(None)


def _read_json(path: Path) -> dict[str, Any]:
    with named_damage(str(path), (OSError, ValueError)):
        return read_object(path)


def _unopened(name: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split()) or type(error).__name__
    hint = f"; write {HUB}NAME@CONFIG[:SPLIT]" if "Config name" in reason else ""
    return DataError(f"{HUB}{name}: cannot be opened: {reason}{hint}")


@contextlib.contextmanager
def _no_torch() -> Iterator[None]:
    """Keep `datasets` from importing torch for streams, which takes seconds."""
    import datasets

    before = datasets.config.TORCH_AVAILABLE
    datasets.config.TORCH_AVAILABLE = False
    try:
        yield
    finally:
        datasets.config.TORCH_AVAILABLE = before


def _open_rows(stream: Stream) -> DatasetRows:
    saved = stream.kind == "saved"
    return DatasetRows(stream.paths[0], saved=saved, streaming=stream.streaming)


HUB_READER = ReaderSpec(open_parts=_open_rows, describe=describe_hub)
SAVED_READER = ReaderSpec(open_parts=_open_rows, describe=describe_saved)
