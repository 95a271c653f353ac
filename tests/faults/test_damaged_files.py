"""Damaged and foreign files are read, or refused by an error of MegaLite.

A kind is a file that the project reads, and the commands that read it. Changes are seeded, so that
kind and number identify a case.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from data_prep.chat import ask
from data_prep.hf_datasets import saved_folder
from data_prep.report import inspect, verify
from megalite import errors
from megalite.checkpoint import (
    Lease,
    describe_run,
    describe_start,
    find_newest,
    load_weights,
    restore,
    set_aside_damaged,
)
from megalite.checkpoint.huggingface import HuggingFaceFolder, is_huggingface
from megalite.commands.doctor import _print_goodput
from megalite.config import load_config, load_stored
from megalite.evaluate import open_model
from megalite.formats import examples
from megalite.formats.shards import open_shards
from megalite.formats.verify import verify_folder
from megalite.observe import (
    has_resumed,
    last_layout,
    overwrite_status,
    previous_attempts,
    started_from,
)
from megalite.observe.goodput import goodput
from megalite.parallel import Grid
from megalite.plan.calibrate import read_run
from megalite.plan.devices import find_device
from megalite.report import read_records, render
from megalite.tokenizers.tokenizer import load_tokenizer
from megalite.train.interventions import InterventionLog
from megalite.train.resume import find_resume_point
from tests.helpers import damage
from tests.helpers import rows as labelled
from tests.helpers.checkpoints import reseal
from tests.helpers.folders import MAKERS
from tests.helpers.models import make_engine, world_of_one

FEW, MANY = 12, 200
SECONDS = 20

Read = Callable[[Path], object]


@dataclass(frozen=True)
class Kind:
    """A file of a folder that `make` prepares, with its changes and its readers.

    Attributes:
        sealed: whether to update the checkpoint's manifest to the change, as a forger would.
        reads: readers, called with the folder.
    """

    make: str
    file: str
    change: damage.Change
    reads: tuple[Read, ...]
    sealed: bool = False


GRID: list[Grid] = []  # the grid of this process, during the tests of this file

# --- readers ---


def step_of(folder: Path) -> Path:
    return folder / "checkpoints" / "step_00000003"


def report(folder: Path) -> None:
    render(read_records([folder]), now=2000.0).encode(errors="replace")


def records(folder: Path) -> None:
    has_resumed(folder, path="/a", job="7")
    started_from(folder, "start")
    last_layout(folder)
    overwrite_status(folder, "failed", reason="x", attempt=previous_attempts(folder))


def ledger(folder: Path) -> None:
    step = folder / "checkpoints" / "step_00000003"
    book = InterventionLog(folder, GRID[0], 8)
    book.begin(step if step.exists() else folder)
    book.gaps, book.rollbacks, book.skipped(2, 8), book.skipped(3)
    json.dumps(book.content())


def resume(folder: Path) -> None:
    """Load the checkpoint as a start of the run."""
    engine = make_engine(model={"vocab_size": 260})
    grid = GRID[0]
    newest, damaged = find_newest(folder / "checkpoints", grid)
    set_aside_damaged(damaged, grid)
    if newest is None:
        return
    origin = find_resume_point(
        engine.config,
        grid=grid,
        root=folder / "checkpoints",
        resume="auto",
        allow=("model", "tokenizer", "data", "sequence_length", "seed"),
        data_fingerprint="data",
        tokenizer_sha256="ab" * 32,
    )
    assert origin is not None
    assert origin.manifest is not None
    place, manifest = origin.folder, origin.manifest
    load_weights(engine, engine.config.model, grid=grid, folder=place, manifest=manifest)
    restore(engine, engine.config, grid=grid, folder=place, manifest=manifest)


def use(folder: Path) -> None:
    opened = open_model(folder)
    opened.tokenizer.decode(opened.tokenizer.encode("a b"))


def read_shards(folder: Path) -> None:
    shards = open_shards(folder / "shards")
    for number in range(min(3, shards.documents)):
        np.asarray(shards.document(number))


def read_examples(folder: Path) -> None:
    manifest = examples.read_examples_manifest(folder / "examples")
    for name in manifest.splits:
        split = examples.open_split(folder / "examples", manifest, name)
        for number in range(min(3, len(split))):
            split.ids(number)


def read_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("Some text, 123.")
    tokenizer.decode(ids)
    tokenizer.count_bytes(ids)
    tokenizer.pieces()
    ask(folder, tokenizer, "hello")


def tune(name: str, task: str) -> Read:
    def read(folder: Path) -> None:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        labelled.make_examples(
            str(folder / name), task, cache=str(folder / "cache"), max_bad_rows=1
        )

    return read


RUN: tuple[Read, ...] = (
    report,
    lambda folder: _print_goodput(goodput(folder)),
    records,
    lambda folder: read_run(folder),
    ledger,
    lambda folder: load_stored(folder / "config.json"),
)
CHECKPOINT: tuple[Read, ...] = (
    lambda folder: use(folder),
    lambda folder: describe_run(folder),
    lambda folder: describe_start(folder),
    ledger,
    resume,
)
TOKENIZER: tuple[Read, ...] = (
    lambda folder: read_tokenizer(folder / "hf"),
    lambda folder: use(folder / "hf"),
)
HUGGING_FACE: tuple[Read, ...] = (
    lambda folder: is_huggingface(folder / "hf"),
    lambda folder: HuggingFaceFolder(folder / "hf"),
    lambda folder: use(folder / "hf"),
)
SHARDS: tuple[Read, ...] = (
    read_shards,
    lambda folder: verify_folder(folder / "shards"),
    lambda folder: verify(folder / "shards"),
    lambda folder: inspect(folder / "shards", 1),
)
STEP = "checkpoints/step_00000003/"

KINDS: dict[str, Kind] = {
    "metrics.jsonl": Kind("run", "metrics.jsonl", damage.change_rows, RUN[:3]),
    "status.json": Kind("run", "status.json", damage.change_json, RUN[:3]),
    "plan.json": Kind("run", "plan.json", damage.change_json, (report, RUN[3])),
    "evaluation.json": Kind("run", "evaluation.json", damage.change_json, (report,)),
    "predictions.jsonl": Kind("run", "predictions.jsonl", damage.change_rows, (report,)),
    "config.json of a run": Kind(
        "run", "config.json", damage.change_json, (report, RUN[3], RUN[5])
    ),
    "interventions.jsonl": Kind("run", "interventions.jsonl", damage.change_rows, (ledger,)),
    "lease": Kind("run", ".lease.json", damage.change_json, (lambda folder: lease(folder),)),
    "manifest.json": Kind("checkpoint", STEP + "manifest.json", damage.change_json, CHECKPOINT),
    "sealed manifest.json": Kind(
        "checkpoint", STEP + "manifest.json", damage.change_json, CHECKPOINT, sealed=True
    ),
    "config.json of a checkpoint": Kind(
        "checkpoint", STEP + "config.json", damage.change_json, CHECKPOINT, sealed=True
    ),
    "ledger.json": Kind(
        "checkpoint", STEP + "ledger.json", damage.change_json, (ledger, resume), sealed=True
    ),
    "weights": Kind(
        "checkpoint", STEP + "model-*", damage.change_safetensors, CHECKPOINT, sealed=True
    ),
    "damaged weights": Kind("checkpoint", STEP + "model-*", damage.change_bytes, CHECKPOINT),
    "config.json of Hugging Face": Kind(
        "huggingface", "hf/config.json", damage.change_json, HUGGING_FACE
    ),
    "index of Hugging Face": Kind(
        "huggingface", "hf/model.safetensors.index.json", damage.change_json, HUGGING_FACE
    ),
    "weights of Hugging Face": Kind(
        "huggingface", "hf/*-00001-*.safetensors", damage.change_safetensors, HUGGING_FACE
    ),
    "tokenizer.json": Kind("huggingface", "hf/tokenizer.json", damage.change_json, TOKENIZER),
    "tokenizer_config.json": Kind(
        "huggingface", "hf/tokenizer_config.json", damage.change_json, TOKENIZER
    ),
    **{
        name: Kind("huggingface", f"hf/{name}", damage.change_json, TOKENIZER)
        for name in ("generation_config.json", "special_tokens_map.json", "added_tokens.json")
    },
    "chat template": Kind(
        "huggingface", "hf/chat_template.jinja", damage.change_bytes, (TOKENIZER[0],)
    ),
    "SentencePiece model": Kind(
        "texts",
        "trained/tokenizer.model",
        damage.change_bytes,
        (lambda folder: read_tokenizer(folder / "trained"),),
    ),
    "manifest of shards": Kind("shards", "shards/manifest.json", damage.change_json, SHARDS),
    "index of shards": Kind("shards", "shards/*.idx", damage.change_bytes, SHARDS),
    "tokens of shards": Kind("shards", "shards/*.bin", damage.change_bytes, SHARDS),
    "manifest of examples": Kind(
        "examples", "examples/manifest.json", damage.change_json, (read_examples,)
    ),
    "arrays of examples": Kind(
        "examples", "examples/train.bounds.npy", damage.change_bytes, (read_examples,)
    ),
    "labelled rows": Kind(
        "texts", "rows.jsonl", damage.change_rows, (tune("rows.jsonl", "classification"),)
    ),
    "table of rows": Kind(
        "texts", "rows.csv", damage.change_bytes, (tune("rows.csv", "classification"),)
    ),
    "data set saved to disk": Kind(
        "texts",
        "saved/dataset_dict.json",
        damage.change_json,
        (lambda folder: saved_folder(str(folder / "saved")),),
    ),
    "conversations": Kind("texts", "chat.jsonl", damage.change_rows, (tune("chat.jsonl", "sft"),)),
    "run file": Kind(
        "texts", "run.json", damage.change_json, (lambda folder: load_config(folder / "run.json"),)
    ),
    "device file": Kind(
        "texts",
        "device.json",
        damage.change_json,
        (lambda folder: find_device(str(folder / "device.json")),),
    ),
}


def lease(folder: Path) -> None:
    lock = Lease.__new__(Lease)
    lock._path, lock._nonce, lock._newer = folder / ".lease.json", "ab", None
    lock.check()


# --- cases ---


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    by_kind = {}
    with world_of_one() as grid:
        GRID[:] = [grid]
        for name, make in MAKERS.items():
            by_kind[name] = tmp_path_factory.mktemp(name)
            make(by_kind[name], grid)
        yield by_kind


@contextmanager
def in_time() -> Iterator[None]:
    """Fail a test whose reader does not end."""

    def late(*_: object) -> None:
        raise TimeoutError(f"over {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fault_of(read: Read, folder: Path) -> str | None:
    """Return the fault of a reader. None means that it read, or raised MegaLite's error."""
    try:
        with in_time():
            read(folder)
    except errors.MegaLiteError as error:
        return None if str(error).strip() else f"{type(error).__name__} without a message"
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "site-packages" not in f.filename] or frames
        at = f"{ours[-1].filename}:{ours[-1].lineno}"
        return f"{type(error).__name__}: {str(error)[:150]} at {at}"
    return None


def check(kind: Kind, pristine: Path, folder: Path, name: str, number: int) -> list[str]:
    chosen = random.Random(f"{name} {number}")
    faults = []
    for read in kind.reads:
        chosen.seed(f"{name} {number}")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(pristine, folder, symlinks=True)
        (path,) = folder.glob(kind.file)
        path.write_bytes(kind.change(path.read_bytes(), chosen))
        if kind.sealed:
            try:
                reseal(path.parent)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError):
                continue  # nothing that could be sealed
        if (fault := fault_of(read, folder)) is not None:
            faults.append(f"{name} {number}: {fault}")
    return faults


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("first", [0, pytest.param(FEW, marks=pytest.mark.slow)])
def test_damaged_file_is_read_or_refused(
    folders: dict[str, Path], tmp_path: Path, name: str, first: int
) -> None:
    kind = KINDS[name]
    numbers = range(FEW) if first == 0 else range(FEW, MANY)
    faults = [
        fault
        for number in numbers
        for fault in check(kind, folders[kind.make], tmp_path / "case", name, number)
    ]
    assert not faults, "\n".join(faults)
