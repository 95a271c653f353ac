"""Compare classifiers that were pretrained, classifiers from scratch, and naive Bayes.

    python benchmarks/finetune.py --data shared/data                Reuters R8, Rotten Tomatoes
    python benchmarks/finetune.py --data shared/data --only tomatoes --seeds 0 --json results.json

A small encoder is pretrained to predict masked words in the texts of the training split. With
--corpus, the encoder for Rotten Tomatoes also reads the texts of that file. Then classifiers are
trained with each seed: from the pretrained encoder, from scratch, and with LoRA adapters on the
pretrained encoder. The best epoch is chosen on a tenth of the training split. Each run reads the
test split once, at its end. No setting was chosen on a test split. All runs are started by
launcher/pretrain.py and launcher/finetune.py.

The data sets are files below the folder of --data:

    cls_reuters_r8/{train,test}.jsonl.gz       the standard split
    cls_rotten_tomatoes/all.jsonl.gz           the test split has the reviews of a fifth of the
                                               films, by the hash of a film's name
"""

from __future__ import annotations

import sys

# This folder goes last: its tokenize.py would hide the module of the standard library.
sys.path.sort(key=lambda path: path.endswith("benchmarks"))

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
    "vocab_size": PIECES + 1,  # the last token is the mask
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
# Pretraining: steps; share of the samples that are from the training split if there is a corpus;
# share of masked tokens. Fine-tuning: largest number of tokens of an example; epochs.
SETS: dict[str, dict[str, Any]] = {
    "reuters": {"steps": 3000, "train_share": 1.0, "mask": 0.2, "max_length": 256, "epochs": 5},
    "tomatoes": {"steps": 5000, "train_share": 0.3, "mask": 0.5, "max_length": 64, "epochs": 4},
}
WINDOW, BATCH = 128, 16  # of pretraining, in tokens and samples
LEARNING_RATE, LORA_LEARNING_RATE = 1e-3, 2e-3
# The adapters have less than 2 % of the model's parameters.
LORA = {"rank": 8, "targets": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--corpus", type=Path, metavar="FILE", help="more text for pretraining")
    parser.add_argument("--only", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="pretraining steps; default: 3000 or 5000")
    parser.add_argument("--jobs", type=int, default=1, help="parallel fine-tunings, one core each")
    parser.add_argument("--ways", nargs="+", default=["pretrained", "scratch", "lora"])
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="working folder to keep; default: temporary"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def rows(name: str, data: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the examples of the training split and of the test split."""
    if name == "reuters":
        folder = data / "cls_reuters_r8"
        return read(folder / "train.jsonl.gz"), read(folder / "test.jsonl.gz")
    train, test = [], []
    for row in read(data / "cls_rotten_tomatoes" / "all.jsonl.gz"):
        film = int(hashlib.sha1(row["movie"].encode()).hexdigest(), 16)
        (test if film % 5 == 0 else train).append(row)
    return train, test


def naive_bayes(train: list[dict[str, Any]], test: list[dict[str, Any]]) -> float:
    """Return the test accuracy of multinomial naive Bayes on words, with add-one smoothing."""
    words: dict[Any, Counter[str]] = {}
    labels = Counter(row["label"] for row in train)
    for row in train:
        words.setdefault(row["label"], Counter()).update(_words(row["text"]))
    vocabulary = set().union(*words.values())
    totals = {label: sum(count.values()) + len(vocabulary) for label, count in words.items()}

    def log_probability(label: Any, text: str) -> float:
        counts, total = words[label], totals[label]
        terms = (math.log((counts[w] + 1) / total) for w in _words(text) if w in vocabulary)
        return math.log(labels[label] / len(train)) + sum(terms)

    def predict(text: str) -> Any:
        return max(labels, key=lambda label: log_probability(label, text))

    return sum(predict(row["text"]) == row["label"] for row in test) / len(test)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def command(work: Path, *arguments: Any, **environment: str) -> None:
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    line = [sys.executable, *map(str, arguments)]
    subprocess.run(line, cwd=work, env=environ, check=True, stdout=subprocess.DEVNULL)


def pretrain(name: str, work: Path, corpus: Path | None, steps: int | None) -> None:
    """Train the tokenizer and the encoder (run `text`), unless they exist."""
    values = SETS[name]
    if (work / "runs" / "text" / "status.json").exists():
        return
    inputs = ["train.jsonl"]
    if corpus and values["train_share"] < 1:
        inputs.append(str(corpus.resolve()))
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
    weights = [1.0] if len(inputs) == 1 else [values["train_share"], 1 - values["train_share"]]
    sources = [{"path": f"text{n}", "weight": weight} for n, weight in enumerate(weights)]
    run = {
        "name": "text",
        "model": MODEL,
        "data": {"train": sources, "sequence_length": WINDOW, "mask_documents": True},
        "objective": {
            "name": "masked",
            "mask_token_id": PIECES,
            "mask_probability": values["mask"],
        },
        "optimizer": {"lr": 2e-3, "weight_decay": 0.01, "betas": [0.9, 0.98]},
        "schedule": {"name": "linear", "warmup_steps": 100, "min_lr_ratio": 0.05},
        "training": {
            "steps": steps or values["steps"],
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


def finetune(name: str, work: Path, way: str, seed: int, **environment: str) -> dict[str, Any]:
    """Fine-tune once. Return test accuracy, best validation accuracy, and seconds."""
    values, started = SETS[name], time.monotonic()
    tuning: dict[str, Any] = {
        "task": "classification",
        "data": {
            "path": ".",
            "valid_fraction": 0.1,
            "test_split": "test",
            "max_length": values["max_length"],
            "tokenizer": "tokenizer",
        },
        "epochs": values["epochs"],
        "eval_train": False,
    }
    if way == "lora":
        tuning["adapter"] = LORA
    run = {
        "name": f"{way}{seed}",
        "model": MODEL | {"hidden_dropout": 0.2},
        "data": {"seed": seed},
        "finetune": tuning,
        "optimizer": {
            "lr": LORA_LEARNING_RATE if way == "lora" else LEARNING_RATE,
            "weight_decay": 0.01,
        },
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


def measure(name: str, arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    work.mkdir(parents=True, exist_ok=True)
    train, test = rows(name, arguments.data)
    for split, examples in (("train", train), ("test", test)):
        lines = (json.dumps({"text": r["text"], "label": r["label"]}) + "\n" for r in examples)
        (work / f"{split}.jsonl").write_text("".join(lines))
    started = time.monotonic()
    pretrain(name, work, arguments.corpus, arguments.steps)
    result: dict[str, Any] = {
        "train_rows": len(train),
        "test_rows": len(test),
        "naive_bayes": naive_bayes(train, test),
        "pretraining_seconds": time.monotonic() - started,
    }
    environment = {"OMP_NUM_THREADS": "1"} if arguments.jobs > 1 else {}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        started_runs = {
            way: [
                pool.submit(finetune, name, work, way, seed, **environment)
                for seed in arguments.seeds
            ]
            for way in arguments.ways
        }
        for way, futures in started_runs.items():
            runs = [future.result() for future in futures]
            result[way] = {key: [run[key] for run in runs] for key in ("test", "valid", "seconds")}
            result[way]["mean"] = statistics.mean(run["test"] for run in runs)
            sys.stdout.write(f"{name} {way}: {json.dumps(result[way])}\n")
            sys.stdout.flush()
    return result


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory(prefix="finetune-") as temporary:
        base = arguments.work or Path(temporary)
        result = {name: measure(name, arguments, base / name) for name in arguments.only}
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
