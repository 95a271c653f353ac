"""What pretraining is worth: classifiers from it and from scratch, next to naive Bayes.

    python benchmarks/finetune.py --data shared/data                Reuters R8, Rotten Tomatoes
    python benchmarks/finetune.py --data shared/data --only tomatoes --seeds 0 --json results.json

A small encoder is pretrained on hidden words of the training split's texts and of a corpus, then
fine-tuned, with every seed, from there, from scratch, and with LoRA adapters. A tenth of the
training split chooses the epoch, and the test split is read once a seed, by the run itself. Sets
are `DATA/cls_reuters_r8/{train,test}.jsonl.gz` in their canonical split, and
`DATA/cls_rotten_tomatoes/all.jsonl.gz`, whose test rows are those of every fifth film by the hash
of its name. All through the front door; no setting was chosen on a test split.
"""

from __future__ import annotations

import sys

sys.path.sort(key=lambda path: path.endswith("benchmarks"))  # last, for it has a tokenize.py

import argparse
import gzip
import hashlib
import json
import math
import os
import re
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PIECES = 8000
MODEL: dict[str, Any] = {
    "architecture": "encoder",
    "vocab_size": PIECES + 1,  # the last is the mask
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "norm": "rmsnorm",
    "activation": "geglu",
    "position_embedding": "rope",
    "tie_word_embeddings": True,
}
# Pretraining: steps, the part of them on the training split's own texts if there is a corpus,
# the part of the words it hides. Fine-tuning: tokens of an example, epochs.
SETS: dict[str, dict[str, Any]] = {
    "reuters": {"steps": 3000, "own": 1.0, "mask": 0.2, "longest": 256, "epochs": 5},
    "tomatoes": {"steps": 5000, "own": 0.3, "mask": 0.5, "longest": 64, "epochs": 4},
}
WINDOW, BATCH = 128, 16
RATE, LORA_RATE = 1e-3, 2e-3
# under 2 % of the model
LORA = {"rank": 8, "targets": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--corpus", type=Path, metavar="FILE", help="more text, of general words")
    parser.add_argument("--only", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of pretraining; default: each set's own")
    parser.add_argument("--jobs", type=int, default=1, help="fine-tunings at once, a core each")
    parser.add_argument("--ways", nargs="+", default=["pretrained", "scratch", "lora"])
    parser.add_argument("--work", type=Path, metavar="DIR", help="kept; default: a scratch folder")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def rows(name: str, data: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the training and the test split, {text, label} each."""
    if name == "reuters":
        folder = data / "cls_reuters_r8"
        return read(folder / "train.jsonl.gz"), read(folder / "test.jsonl.gz")
    train, test = [], []
    for row in read(data / "cls_rotten_tomatoes" / "all.jsonl.gz"):
        film = int(hashlib.sha1(row["movie"].encode()).hexdigest(), 16)
        (test if film % 5 == 0 else train).append(row)
    return train, test


def naive_bayes(train: list[dict[str, Any]], test: list[dict[str, Any]]) -> float:
    """Accuracy of a bag of words, counts smoothed by one."""
    words: dict[Any, Counter[str]] = {}
    labels = Counter(row["label"] for row in train)
    for row in train:
        words.setdefault(row["label"], Counter()).update(_words(row["text"]))
    known = set().union(*words.values())
    totals = {label: sum(count.values()) + len(known) for label, count in words.items()}

    def chance(label: Any, text: str) -> float:
        counts, total = words[label], totals[label]
        each = (math.log((counts[w] + 1) / total) for w in _words(text) if w in known)
        return math.log(labels[label] / len(train)) + sum(each)

    right = sum(max(labels, key=lambda at: chance(at, r["text"])) == r["label"] for r in test)
    return right / len(test)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def command(work: Path, *arguments: Any, **environment: str) -> None:
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    line = [sys.executable, *map(str, arguments)]
    subprocess.run(line, cwd=work, env=environ, check=True, stdout=subprocess.DEVNULL)


def pretrain(name: str, work: Path, corpus: Path | None, steps: int | None) -> None:
    """The tokenizer and the run `text`, which are made once."""
    own = SETS[name]
    if (work / "runs" / "text" / "status.json").exists():
        return
    inputs = ["train.jsonl", *([str(corpus.resolve())] if corpus and own["own"] < 1 else [])]
    prep = ("-m", "data_prep")
    if not (work / "tokenizer").exists():
        command(
            work,
            *(*prep, "train-tokenizer", "--input", "train.jsonl"),
            *("--vocab-size", PIECES, "--output", "tokenizer"),
        )
    for number, source in enumerate(inputs):
        if not (work / f"text{number}").exists():
            command(
                work,
                *(*prep, "tokenize", "--input", source, "--tokenizer", "tokenizer"),
                *("--output", f"text{number}"),
            )
    weights = [1.0] if len(inputs) == 1 else [own["own"], 1 - own["own"]]
    sources = [{"path": f"text{n}", "weight": weight} for n, weight in enumerate(weights)]
    run = {
        "name": "text",
        "model": MODEL,
        "data": {"train": sources, "sequence_length": WINDOW, "mask_documents": True},
        "objective": {"name": "masked", "mask_token_id": PIECES, "mask_probability": own["mask"]},
        "optimizer": {"lr": 2e-3, "weight_decay": 0.01, "betas": [0.9, 0.98]},
        "schedule": {"name": "linear", "warmup_steps": 100, "min_lr_ratio": 0.05},
        "training": {
            "steps": steps or own["steps"],
            "global_batch_size": BATCH,
            "micro_batch_size": BATCH,
            "compile": True,
            "log_every": 50,
        },
        "checkpoint": {"every": 0, "keep": 1},
        "logging": {"directory": "runs", "tensorboard": False},
    }
    (work / "text.json").write_text(json.dumps(run))
    command(work, ROOT / "launcher" / "pretrain.py", "--config", "text.json")


def tune(name: str, work: Path, way: str, seed: int, **environment: str) -> dict[str, Any]:
    """Fine-tune once and return its last evaluation, on the test split."""
    own, started = SETS[name], time.monotonic()
    tuning: dict[str, Any] = {
        "task": "classification",
        "data": {
            "path": ".",
            "valid_fraction": 0.1,
            "test_split": "test",
            "max_length": own["longest"],
            "tokenizer": "tokenizer",
        },
        "epochs": own["epochs"],
        "eval_train": False,
    }
    if way == "lora":
        tuning["adapter"] = LORA
    run = {
        "name": f"{way}{seed}",
        "model": MODEL | {"hidden_dropout": 0.2},
        "data": {"seed": seed},
        "finetune": tuning,
        "optimizer": {"lr": LORA_RATE if way == "lora" else RATE, "weight_decay": 0.01},
        "schedule": {"name": "linear", "warmup_steps": 50, "min_lr_ratio": 0.0},
        "training": {
            "global_batch_size": 32,
            "micro_batch_size": 32,
            "seed": seed,
            "log_every": 50,
        },
        "checkpoint": {"every": 0, "keep": 1},
        "logging": {"directory": "runs", "tensorboard": False},
    }
    file = f"{way}{seed}.json"
    (work / file).write_text(json.dumps(run))
    start = [] if way == "scratch" else ["--init-from", "runs/text"]
    command(work, ROOT / "launcher" / "finetune.py", "--config", file, *start, **environment)
    lines = (work / "runs" / f"{way}{seed}" / "metrics.jsonl").read_text().splitlines()
    measured = [row for row in map(json.loads, lines) if row["kind"] == "valid"]
    seconds = time.monotonic() - started
    valid = max(row["accuracy"] for row in measured if row["split"] == "valid")
    return {"test": measured[-1]["accuracy"], "valid": valid, "seconds": seconds}


def measure(name: str, chosen: argparse.Namespace, work: Path) -> dict[str, Any]:
    work.mkdir(parents=True, exist_ok=True)
    train, test = rows(name, chosen.data)
    for split, found in (("train", train), ("test", test)):
        lines = (json.dumps({"text": r["text"], "label": r["label"]}) + "\n" for r in found)
        (work / f"{split}.jsonl").write_text("".join(lines))
    started = time.monotonic()
    pretrain(name, work, chosen.corpus, chosen.steps)
    result: dict[str, Any] = {
        "train_rows": len(train),
        "test_rows": len(test),
        "naive_bayes": naive_bayes(train, test),
        "pretraining_seconds": time.monotonic() - started,
    }
    alone = {"OMP_NUM_THREADS": "1"} if chosen.jobs > 1 else {}
    with ThreadPoolExecutor(chosen.jobs) as pool:
        begun = {
            way: [pool.submit(tune, name, work, way, seed, **alone) for seed in chosen.seeds]
            for way in chosen.ways
        }
        for way, futures in begun.items():
            every = [future.result() for future in futures]
            result[way] = {
                key: [one[key] for one in every] for key in ("test", "valid", "seconds")
            } | {"mean": statistics.mean(one["test"] for one in every)}
            sys.stdout.write(f"{name} {way}: {json.dumps(result[way])}\n")
            sys.stdout.flush()
    return result


def main() -> None:
    chosen = parse()
    with tempfile.TemporaryDirectory(prefix="finetune-") as scratch:
        base = chosen.work or Path(scratch)
        result = {name: measure(name, chosen, base / name) for name in chosen.only}
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    if chosen.json:
        chosen.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
