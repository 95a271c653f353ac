"""The table of readers: how each kind of input is read, by the ending of a file's name.

A new reader is one class and one entry of `READERS`. Modules of readers import no other reader.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

from data_prep import hf_datasets, jsonl, parquet
from data_prep.compressed import COMPRESSED, InputFile, named_damage
from data_prep.records import Record, records, text_of_bytes
from data_prep.streams import ReaderSpec


class TextFile(InputFile):
    """A file that is one document."""

    def records(self, text_field: str) -> Iterator[Record]:
        """Yield the whole file as one document; `text_field` has no meaning for plain text."""
        del text_field
        with named_damage(self.path):
            data = self.bytes.read().removeprefix(codecs.BOM_UTF8)
        return records([data], text_of_bytes, lambda _: self.path)


READERS: dict[str, ReaderSpec] = {
    "text": ReaderSpec(open_file=TextFile),
    "jsonl": jsonl.READER,
    "parquet": parquet.READER,
    "hub": hf_datasets.HUB_READER,
    "saved": hf_datasets.SAVED_READER,
}


def kind_of(path: Path) -> str:
    """Return the name of the reader of a file, by its ending; "text" if no other reader has it."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    kinds = {suffix: kind for kind, reader in READERS.items() for suffix in reader.suffixes}
    return kinds.get(suffixes[-1], "text") if suffixes else "text"
