"""The built-in readers: how each kind of input is read, by the ending of a file's name.

A new reader is one class and one call of `registry.readers.register`. A package's reader is an
entry point `reader.NAME` whose object is a `ReaderSpec`; it reads files that end in `.NAME`, or the
`suffixes` that `part.NAME` states. Modules of readers import no other reader.
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
    """A file that is one document."""

    def records(self, text_field: str) -> Iterator[Record]:
        """Yield the whole file as one document; `text_field` has no meaning for plain text."""
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
    """Return the name of the reader of a file, by its ending; "text" if no other reader has it."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    for kind in registry.readers.names if suffixes else ():  # built-in ones come first
        if suffixes[-1] in registry.readers.facts(kind).get("suffixes", (f".{kind}",)):
            return kind
    return "text"
