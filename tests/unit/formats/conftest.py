from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from megalite.formats.index import dtype_for
from megalite.formats.manifest import ShardManifest, TokenizerInfo, write_manifest
from megalite.formats.shards import ShardWriter
from megalite.tokenizers.tokenizer import ByteTokenizer

MakeFolder = Callable[..., Path]


def save_tokenizer(folder: Path) -> TokenizerInfo:
    tokenizer = ByteTokenizer()
    (folder / "tokenizer").mkdir()
    name = tokenizer.save(folder / "tokenizer")
    return TokenizerInfo(path=f"tokenizer/{name}", sha256=tokenizer.sha256)


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Return a function that writes a folder of shards, each a list of documents of ids."""

    def make(
        shards: Sequence[Sequence[Sequence[int]]], *, vocab_size: int = 100, name: str = "shards"
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        dtype = dtype_for(vocab_size)
        infos = []
        for number, documents in enumerate(shards):
            with ShardWriter(folder, f"shard_{number:05d}", dtype, vocab_size=vocab_size) as writer:
                for document in documents:
                    writer.add_document(np.array(document, np.int64))
                infos.append(writer.close())
        manifest = ShardManifest(
            dtype=dtype.name,
            vocab_size=vocab_size,
            tokenizer=save_tokenizer(folder),
            bos=None,
            eos=None,
            documents=sum(info.documents for info in infos),
            tokens=sum(info.tokens for info in infos),
            shards=infos,
        )
        write_manifest(folder, manifest)
        return folder

    return make
