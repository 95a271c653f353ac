"""Small runs on this machine for benchmarks/plan.py, which compares predictions with measurements.

`LAYOUTS` x `SHAPES` are 24 pretraining runs of 6 steps. `KINDS` are typical runs: longer ones,
tensor parallelism, fine-tuning on texts of many lengths, adapters, and a Slurm step.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megalite.spawn import free_port, run_command

ROOT = Path(__file__).resolve().parent.parent

SHAPES = {  # hidden size, layers, intermediate size; the vocabulary has 8,192 tokens
    "6M": (256, 2, 704),
    "20M": (384, 8, 1024),
    "60M": (640, 10, 1728),
    "200M": (1024, 14, 2816),
}
LAYOUTS = {  # ranks, tensor-parallel size, ZeRO stage, micro-batch size, recompute
    "1 rank": (1, 1, 0, 2, "none"),
    "1 rank again": (1, 1, 1, 4, "full"),
    "2 ranks": (2, 1, 1, 2, "none"),
    "2 ranks ZeRO 2": (2, 1, 2, 2, "selective"),
    "2 ranks ZeRO 3": (2, 1, 3, 4, "none"),
    "tensor 2": (2, 2, 1, 4, "selective"),
}
SMOKE = {
    "vocab_size": 8000,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 256,
}
REUTERS = SMOKE | {
    "architecture": "encoder",
    "vocab_size": 6000,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "activation": "geglu",
    "hidden_dropout": 0.1,
}
MINILM = {
    "architecture": "encoder",
    "vocab_size": 30522,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "norm": "layernorm",
    "norm_position": "post",
    "activation": "gelu",
    "position_embedding": "learned",
    "type_vocab_size": 2,
    "embedding_norm": True,
    "attention_bias": True,
    "mlp_bias": True,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
}
SMOLLM = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
ENCODER = SMOKE | {"architecture": "encoder", "activation": "geglu", "hidden_dropout": 0.1}
LORA = {"adapter": {"rank": 8}}
# launcher, ranks, sections of the run file; "srun" is the pretraining launcher in a Slurm step
KINDS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "150 steps": ("pretrain", 2, {"model": SMOKE, "training": {"steps": 150}}),
    "150 steps in bf16": (
        "pretrain",
        2,
        {"model": SMOKE, "training": {"steps": 150, "precision": "bf16"}},
    ),
    "tensor 2": (
        "pretrain",
        2,
        {"model": SMOKE, "training": {"steps": 40}, "parallel": {"tensor": 2}},
    ),
    "2 labels": ("finetune", 1, {"model": ENCODER, "task": "classification", "path": "2"}),
    "20 labels": (
        "finetune",
        1,
        {"model": REUTERS, "task": "classification", "path": "20", "training": {"micro_batch": 32}},
    ),
    "LoRA, MiniLM": (
        "finetune",
        1,
        {"model": MINILM, "task": "classification", "path": "2", "finetune": LORA, "length": 128},
    ),
    "LoRA, SmolLM-135M": (
        "finetune",
        1,
        {
            "model": SMOLLM,
            "task": "sft",
            "path": "chat",
            "finetune": LORA,
            "training": {"micro_batch": 2},
        },
    ),
    "Slurm step": ("srun", 2, {"model": SMOKE, "training": {"steps": 6}}),
}


def write_data(work: Path) -> None:
    """Write shards of a corpus, labelled texts of many lengths, and conversations."""
    corpus = work / "corpus.txt"
    stdlib = Path(os.__file__).parent
    corpus.write_text("\n".join(p.read_text() for p in sorted(stdlib.glob("*.py"))[:60]))
    prep = [sys.executable, "-m", "data_prep", "tokenize", "--input", str(corpus)]
    prep += ["--tokenizer", "bytes", "--output", str(work / "shards")]
    subprocess.run(prep, check=True, env=_environ(), capture_output=True)
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=n % 8 + 2)) for n in range(2000)]

    def text(shortest: int, longest: int) -> str:
        length = int(shortest * (longest / shortest) ** draw.random())
        return " ".join(draw.choices(words, k=length))

    for labels, count in ((2, 160), (20, 400)):
        rows = [{"text": text(8, 400), "label": f"l{n % labels}"} for n in range(count)]
        _write_rows(work / f"{labels}.jsonl", rows)
    turns = [(text(3, 20), text(5, 60)) for _ in range(32)]
    roles = ("user", "assistant")
    chat = [[{"role": r, "content": t} for r, t in zip(roles, turn, strict=True)] for turn in turns]
    _write_rows(work / "chat.jsonl", [{"messages": messages} for messages in chat])


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def shape_runs(work: Path) -> Iterator[dict[str, Any]]:
    """Run every shape on every layout. Yield the predicted and measured numbers."""
    for (shape, sizes), (name, layout) in itertools.product(SHAPES.items(), LAYOUTS.items()):
        run = work / "runs" / f"{shape}-{name}".replace(" ", "-")
        raw = _shape_file(run, sizes, layout)
        yield {"shape": shape, "layout": name, "folder": str(run)} | _run(
            "pretrain", layout[0], raw
        )


def kind_runs(work: Path, names: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Run the named kinds, or all. Yield the predicted and measured numbers."""
    for number, (name, (launcher, ranks, sections)) in enumerate(KINDS.items()):
        if names and name not in names:
            continue
        raw = _kind_file(work, f"kind-{number}", ranks, sections)
        yield {"kind": name} | _run(launcher, ranks, raw)


def _environ() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def _run(launcher: str, ranks: int, raw: dict[str, Any]) -> dict[str, Any]:
    """Run a run file to its end. Return the content of the run's plan.json."""
    file = Path(raw["logging"]["directory"]).parent / "run.json"
    file.write_text(json.dumps(raw))
    if launcher == "srun":
        _run_step(file, ranks)
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        command += ["--master-port", str(free_port())]
        command += [str(ROOT / f"launcher/{launcher}.py"), "--config", str(file)]
        subprocess.run(command, check=True, env=_environ(), capture_output=True)
    folder = Path(raw["logging"]["directory"]) / raw["name"]
    record: dict[str, Any] = json.loads((folder / "plan.json").read_text())
    return record


def _run_step(file: Path, ranks: int) -> None:
    """Run the ranks with the environment variables that srun sets in a step."""
    base = _environ() | {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "127.0.0.1",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_STEP_TASKS_PER_NODE": str(ranks),
        "SLURM_NTASKS": str(ranks),
        "SLURM_NODEID": "0",
        "MASTER_PORT": str(free_port()),
    }
    command = [sys.executable, str(ROOT / "launcher/pretrain.py"), "--config", str(file)]
    numbers = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(ranks)]
    run_command(command, [base | number for number in numbers], quiet=True)


def _shape_file(run: Path, sizes: tuple[int, int, int], layout: tuple[Any, ...]) -> dict[str, Any]:
    """Return the run file of a shape on a layout; `run` is the run folder."""
    hidden, layers, intermediate = sizes
    ranks, tensor, stage, micro_batch, recompute = layout
    return {
        "name": run.name,
        "model": {
            "vocab_size": 8192,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // 64,
            "max_position_embeddings": 256,
        },
        "data": {"train": [{"path": str(run.parents[1] / "shards")}], "sequence_length": 256},
        "optimizer": {"lr": 1e-4},
        "parallel": {"tensor": tensor},
        "training": {
            "steps": 6,
            "global_batch_size": 2 * micro_batch * ranks // tensor,
            "micro_batch_size": micro_batch,
            "activation_checkpointing": recompute,
            "precision": "fp32",
            "log_every": 1,
        },
        "deepspeed": {"zero_optimization": {"stage": stage}},
        "checkpoint": {"every": 0},
        "logging": {"directory": str(run.parent), "tensorboard": False},
    }


def _kind_file(work: Path, name: str, ranks: int, sections: dict[str, Any]) -> dict[str, Any]:
    """Return the run file of a typical run."""
    training = {"precision": "fp32", "log_every": 1} | sections.get("training", {})
    micro_batch = training.pop("micro_batch", 8)
    training |= {"micro_batch_size": micro_batch, "global_batch_size": 2 * micro_batch}
    raw = {
        "name": name,
        "model": sections["model"],
        "optimizer": {"lr": 1e-4},
        "schedule": {"warmup_steps": 2},
        "training": training,
        "parallel": sections.get("parallel", {}),
        "checkpoint": {"every": 50 if ranks > 1 else 0, "keep": 1},
        "logging": {"directory": str(work / "runs")},
    }
    if "task" not in sections:
        shards = [{"path": str(work / "shards")}]
        raw["data"] = {"train": shards, "valid": shards, "sequence_length": 256}
        training |= {"eval_every": 0, "eval_batches": 2}
        return raw
    data = {
        "path": str(work / f"{sections['path']}.jsonl"),
        "max_length": sections.get("length", 256),
        "tokenizer": "bytes",
        "test_fraction": 0.1,
        "cache": str(work / "cache"),
    }
    tuning = {"task": sections["task"], "data": data, "epochs": 2, "eval_train": False}
    return raw | {"finetune": tuning | sections.get("finetune", {})}
