"""A small real corpus for tests that train: sources of Python's standard library, in bytes."""

from __future__ import annotations

import json
import logging
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

# one thread a process: tests run side by side's ranks
os.environ.setdefault("OMP_NUM_THREADS", "1")

from data_prep.encode import TokenizeOptions, tokenize

_MODULES = ("argparse", "ast", "calendar", "dataclasses", "enum", "inspect", "pathlib", "typing")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run side by side (-n 2), those of a file stay together, and a cluster is one."""
    for item in items:
        path = item.path.relative_to(Path(__file__).parent)
        alone = path.parts[0] in ("slurm", "faults")
        item.add_marker(pytest.mark.xdist_group(path.parts[0] if alone else str(path)))


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """A launcher sets up logging for its process; here the process goes on, and pytest listens."""
    yield
    logger = logging.getLogger("megalite")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of byte-tokenized shards: `train` (some 400,000 tokens) and `valid`."""
    folder = tmp_path_factory.mktemp("corpus")
    stdlib = Path(sysconfig.get_path("stdlib"))
    texts = [(stdlib / f"{name}.py").read_text() for name in _MODULES]
    made = {}
    for split, part in {"train": texts[1:], "valid": texts[:1]}.items():
        source = folder / f"{split}.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
        made[split] = str(folder / split)
        tokenize(TokenizeOptions([str(source)], "bytes", folder / split, shard_tokens=150_000))
    return made
