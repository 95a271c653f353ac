"""Fixtures of all tests: a small corpus of Python's standard library, and clean logging."""

from __future__ import annotations

import json
import logging
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

# one thread per process, because tests and their ranks run in parallel
os.environ.setdefault("OMP_NUM_THREADS", "1")

from data_prep.encode import TokenizeOptions, tokenize

_MODULES = ("argparse", "ast", "calendar", "dataclasses", "enum", "inspect", "pathlib", "typing")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group tests for parallel runs (-n 2) by file. Slurm and faults are one group each."""
    for item in items:
        path = item.path.relative_to(Path(__file__).parent)
        one_group = path.parts[0] in ("slurm", "faults")
        item.add_marker(pytest.mark.xdist_group(path.parts[0] if one_group else str(path)))


@pytest.fixture(autouse=True)
def _reset_logging() -> Iterator[None]:
    """Reset the logging that a launcher has set up, so that pytest captures later messages."""
    yield
    logger = logging.getLogger("megalite")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return folders of byte-tokenized shards: `train` (some 400,000 tokens) and `valid`."""
    folder = tmp_path_factory.mktemp("corpus")
    stdlib = Path(sysconfig.get_path("stdlib"))
    texts = [(stdlib / f"{name}.py").read_text() for name in _MODULES]
    shard_folders = {}
    for split, part in {"train": texts[1:], "valid": texts[:1]}.items():
        source = folder / f"{split}.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
        shard_folders[split] = str(folder / split)
        tokenize(TokenizeOptions([str(source)], "bytes", folder / split, shard_tokens=150_000))
    return shard_folders
