"""The built-in readers of each kind of input, by the ending of a file's name.

A new reader needs one class and one call of `registry.readers.register`. An installed package adds
a reader by an entry point `reader.NAME` whose object is a `ReaderSpec`. It reads files that end in
`.NAME`, or in the `suffixes` of its entry point `part.NAME`. Readers do not import each other.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

from data_prep import hf_datasets, jsonl, parquet
from data_prep.compressed import COMPRESSED, InputFile, named_damage
from data_prep.records import Record, records, text_of_bytes
from data_prep.streams import ReaderSpec
from megalite import registry


class TextFile(InputFile):
    """A file with a single document."""

    def records(self, text_field: str) -> Iterator[Record]:
        """Yield the whole file as one document. `text_field` is ignored."""
        del text_field
        with named_damage(self.path):
            data = self.bytes.read().removeprefix(codecs.BOM_UTF8)
        return records([data], text_of_bytes, lambda _: self.path)


registry.readers.register("text", suffixes=())(ReaderSpec(open_file=TextFile))
registry.readers.register("jsonl", suffixes=(".jsonl", ".ndjson", ".json"))(jsonl.READER)
registry.readers.register("parquet", suffixes=(".parquet",))(parquet.READER)
registry.readers.register("hub", suffixes=())(hf_datasets.HUB_READER)
registry.readers.register("saved", suffixes=())(hf_datasets.SAVED_READER)


def find_reader(kind: str) -> ReaderSpec:
    """Return the reader of a kind of input."""
    reader: ReaderSpec = registry.readers.load(kind)
    return reader


def kind_of(path: Path) -> str:
    """Return the name of a file's reader by its ending, or "text" if no reader has the ending."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    for kind in registry.readers.names if suffixes else ():  # built-in readers come first
        if suffixes[-1] in registry.readers.facts(kind).get("suffixes", (f".{kind}",)):
            return kind
    return "text"
