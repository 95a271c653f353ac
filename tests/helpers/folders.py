"""Folders of every kind that the project reads, for tests that damage them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.chat import CHATML, TEMPLATE
from data_prep.encode import TokenizeOptions, tokenize
from data_prep.train import TrainOptions, train_tokenizer
from megalite import files
from megalite.checkpoint import StoredCheckpoint, open_checkpoint
from megalite.checkpoint.huggingface import export
from megalite.parallel import Grid
from megalite.tokenizers.tokenizer import ByteTokenizer
from tests.helpers import rows as labelled
from tests.helpers.checkpoints import reseal, save_checkpoint
from tests.helpers.models import make_engine, run_config
from tests.helpers.runs import BASE


def make_run(folder: Path, _: Grid) -> None:
    """Write a run folder with every kind of record."""
    row = {"time": 1000.0, "attempt": 0}
    seconds = {"setup": 1.0, "step": 2.0}
    rows: list[dict[str, Any]] = [
        {"kind": "event", "step": 0, "name": "start", "world_size": 1, "data": {"windows": 9}},
        {"kind": "train", "step": 1, "loss": 5.0, "lr": 1e-3, "tokens": 64, "mfu": None},
        {"kind": "valid", "step": 1, "loss": 5.5, "epoch": 1, "accuracy": 0.5, "f1": 0.4},
        {"kind": "sample", "step": 1, "prompt": "a", "text": "b"},
        {"kind": "event", "step": 2, "name": "rollback", "to": 1, "gap": [0, 8], "reason": "x"},
        {"kind": "event", "step": 2, "name": "resume", "path": str(folder), "job": "7"},
        {"kind": "event", "step": 3, "name": "end", "seconds": seconds},
    ]
    lines = [json.dumps({**row, **one, "time": 1000.0 + n}) for n, one in enumerate(rows)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    files.write_json(folder / "config.json", run_config().model_dump(mode="json"))
    status = {"state": "done", "step": 3, "attempt": 0, "last_checkpoint": None, "reason": None}
    files.write_json(folder / "status.json", status)
    numbers = {"step_seconds": 0.5, "memory_bytes": 1e9, "tokens_per_second": 10.0, "mfu": 0.1}
    plan = {"device": "cpu", "hosts": 1, "per_host": 1, "predicted": numbers, "measured": numbers}
    files.write_json(folder / "plan.json", plan)
    one = {"precision": 0.5, "recall": 0.5, "f1": 0.5, "count": 3}
    evaluation: dict[str, Any] = {
        "step": 3,
        "split": "test",
        "accuracy": 0.5,
        "confusion": [[1, 2], [3, 4]],
    }
    evaluation["per_class"] = {"a": one, "b": one}
    files.write_json(folder / "evaluation.json", evaluation)
    answer = {"id": 3, "label": "a", "prediction": "b", "probabilities": [0.2, 0.8]}
    (folder / "predictions.jsonl").write_text(json.dumps(answer) + "\n")
    entries = [
        {"kind": "start"},
        {"kind": "skip", "step": 2, "samples": 8, "reason": "x"},
        {"kind": "rollback", "step": 5, "samples": 20, "to": 3, "gap": [16, 24], "reason": "x"},
        {"kind": "measured", "step": 3, "samples": 12, "score": 0.5},
    ]
    (folder / "interventions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in entries))
    (folder / ".lease.json").write_text('{"job": "7", "restart_count": 0, "nonce": "ab"}')
    files.write_json(folder / "wandb.json", {"id": "abc"})


def make_checkpoint(folder: Path, grid: Grid) -> None:
    """Write a run's checkpoint with a byte tokenizer."""
    engine = make_engine(model={"vocab_size": 260})
    checkpoint = save_checkpoint(engine, grid, folder / "checkpoints")
    content = {"entries": [{"kind": "skip", "step": 2, "samples": 8}], "recent": [[1.0, 2.0]]}
    files.write_json(checkpoint / "ledger.json", content)
    manifest = files.read_json(checkpoint / "manifest.json")
    manifest["files"]["ledger.json"] = {"bytes": 0, "sha256": ""}
    files.write_json(checkpoint / "manifest.json", manifest)
    reseal(checkpoint)


def make_huggingface(folder: Path, grid: Grid) -> None:
    """Write a Hugging Face folder whose weights are in two files with an index."""
    engine = make_engine(model={"vocab_size": 260})
    checkpoint = save_checkpoint(engine, grid, folder / "run" / "checkpoints")
    _, manifest = open_checkpoint(checkpoint)
    model = engine.config.model
    stored = StoredCheckpoint(checkpoint, manifest)
    export(stored, model, ByteTokenizer(), folder / "hf", shard_bytes=20_000)
    others = {
        "generation_config.json": {"eos_token_id": [257, 3], "bos_token_id": 256, "top_k": 5},
        "special_tokens_map.json": {"eos_token": {"content": "</s>", "lstrip": False}},
        "added_tokens.json": {"<|im_end|>": 258, "<|im_start|>": 259},
    }
    for name, content in others.items():
        files.write_json(folder / "hf" / name, content)
    (folder / "hf" / TEMPLATE).write_text(CHATML)


def make_shards(folder: Path, _: Grid) -> None:
    """Write byte-tokenized shards and their source."""
    (folder / "text.jsonl").write_text('{"text": "one two three"}\n' * 40)
    options = TokenizeOptions([str(folder / "text.jsonl")], "bytes", folder / "shards")
    tokenize(options)


def make_examples(folder: Path, _: Grid) -> None:
    """Write examples and their rows."""
    path = labelled.write_jsonl(str(folder / "rows" / "train.jsonl"), labelled.ROWS)
    labelled.make_examples(path, cache=str(folder / "cache")).rename(folder / "examples")


def make_texts(folder: Path, _: Grid) -> None:
    """Write files as users make them: rows, chats, run files, saved data sets."""
    labelled.write_jsonl(str(folder / "rows.jsonl"), labelled.ROWS[:4])
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    labelled.write_jsonl(str(folder / "chat.jsonl"), [{"messages": turns}] * 3)
    (folder / "run.json").write_text(json.dumps(BASE))
    (folder / "rows.csv").write_text('text,label\n"one, two",a\nthree,b\n')
    saved = {"_split": None, "_data_files": [{"filename": "data.arrow"}]}
    (folder / "saved").mkdir()
    files.write_json(folder / "saved" / "dataset_dict.json", {"splits": ["train", "test"]})
    (folder / "saved" / "train").mkdir()
    for name, content in {"state.json": saved, "dataset_info.json": {"features": {}}}.items():
        files.write_json(folder / "saved" / "train" / name, content)
    (folder / "words.txt").write_text(" ".join(f"word{n} text {n * n}" for n in range(400)))
    train_tokenizer(TrainOptions([str(folder / "words.txt")], 280, folder / "trained"))
    device = {"extends": "h100-80gb", "name": "mine", "bandwidth": 1e12, "efficiencies": {}}
    (folder / "device.json").write_text(json.dumps(device))


MAKERS: dict[str, Callable[[Path, Grid], None]] = {
    "run": make_run,
    "checkpoint": make_checkpoint,
    "huggingface": make_huggingface,
    "shards": make_shards,
    "examples": make_examples,
    "texts": make_texts,
}
