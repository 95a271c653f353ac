# covers: launcher/finetune.py launcher/eval.py launcher/explain.py
# covers: megalite/commands/finetune.py megalite/commands/eval.py megalite/commands/explain.py
"""Fine-tuned models, from the launcher to answers and labels, without their initial model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from data_prep.chat import CHATML
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import run_file, train

ROOT = Path(__file__).resolve().parents[2]


def _launch(name: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(ROOT / "launcher" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=False, timeout=120)


def test_chat_model_is_finetuned_and_answers(shards: dict[str, str], tmp_path: Path) -> None:
    model = {"vocab_size": 258, "max_position_embeddings": 96}
    first = run_file(shards, tmp_path, name="text", model=model)
    first["training"] |= {"steps": 2, "eval_every": 0}
    run_ranks(train, 1, first)
    turns = [{"prompt": f"{n}?", "response": str(n)} for n in range(12)]
    (tmp_path / "turns.jsonl").write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    data = {"path": str(tmp_path / "turns.jsonl"), "cache": str(tmp_path / "cache")}
    data |= {"prompt_column": "prompt", "response_column": "response", "tokenizer": "bytes"}
    raw = {
        "name": "tuned",
        "finetune": {"task": "sft", "data": data | {"max_length": 96, "test_fraction": 0.2}},
        "optimizer": {"lr": 1e-3},
        "training": {
            "steps": 2,
            "global_batch_size": 4,
            "micro_batch_size": 4,
            "precision": "fp32",
        },
        "logging": {"directory": str(tmp_path), "tensorboard": False},
    }
    file, run = tmp_path / "tuned.json", tmp_path / "tuned"
    file.write_text(json.dumps(raw))

    refused = _launch("pretrain", "--config", "configs/finetune/imdb.json")
    assert refused.returncode == 2
    assert "it has a finetune section; start megalite finetune" in refused.stderr
    refused = _launch("finetune", "--config", file)
    assert refused.returncode == 2
    assert "model: is missing; add this section, or name a model to start from" in refused.stderr
    assert not run.exists()
    began = _launch("finetune", "--config", file, "--init-from", tmp_path / "text")
    assert began.returncode == 0, began.stderr
    (tmp_path / "text").rename(tmp_path / "gone")
    for start in ((), ("--init-from", tmp_path / "text")):
        steps = 3 + len(start)
        more = ("--set", f"training.steps={steps}")
        went_on = _launch("finetune", "--config", file, *more, *start)
        assert went_on.returncode == 0, went_on.stderr
        assert json.loads((run / "status.json").read_text())["step"] == steps

    for checkpoint in (run, tmp_path / "exported"):
        arguments = ("--prompt", "1?", "2?", "--max-new-tokens", 3, "--temperature", 0)
        answered = _launch("generate", "--checkpoint", checkpoint, "--chat", *arguments)
        assert answered.returncode == 0, answered.stderr
        assert "<|im_start|>" not in answered.stdout
        if checkpoint == run:
            words = answered.stdout
            exported = _launch("export", "--checkpoint", run, "--output", tmp_path / "exported")
            assert exported.returncode == 0, exported.stderr
        assert answered.stdout == words
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "exported").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]
    assert (tmp_path / "exported" / "chat_template.jinja").read_text() == CHATML

    shards_asked = _launch("eval", "--checkpoint", run, "--data", shards["valid"])
    assert shards_asked.returncode == 2
    assert "these are shards, but a fine-tuned model is evaluated on rows" in shards_asked.stderr


def test_classifier_is_finetuned_and_labels_new_texts(tmp_path: Path) -> None:
    kinds = {"good": "a warm film", "bad": "a dull film"}
    rows = [{"text": f"{kinds[name]} {n}", "label": name} for n in range(8) for name in kinds]
    (tmp_path / "old.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(tmp_path / "old.jsonl"), "cache": str(tmp_path / "cache")}
    raw = {
        "name": "labels",
        "model": {"vocab_size": 258, "hidden_size": 16, "intermediate_size": 32}
        | {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32},
        "finetune": {
            "task": "classification",
            "data": data | {"tokenizer": "bytes", "max_length": 32},
        },
        "optimizer": {"lr": 1e-3},
        "training": {
            "steps": 2,
            "global_batch_size": 4,
            "micro_batch_size": 4,
            "precision": "fp32",
        },
        "logging": {"directory": str(tmp_path), "tensorboard": False},
    }
    file, run, predictions = tmp_path / "labels.json", tmp_path / "labels", tmp_path / "told.jsonl"
    file.write_text(json.dumps(raw))
    began = _launch("finetune", "--config", file)
    assert began.returncode == 0, began.stderr
    assert json.loads((run / "status.json").read_text())["state"] == "done"

    (tmp_path / "new.csv").write_text("id,text\n7,a warm one\n8,a dull one\n9,\n")
    arguments = ("--checkpoint", run, "--data", tmp_path / "new.csv")
    refused = _launch("eval", *arguments)
    assert refused.returncode == 2
    assert "no column 'label'" in refused.stderr
    assert "rows without labels are for --predictions FILE" in refused.stderr
    refused = _launch("eval", *arguments, "--predictions", tmp_path / "new.csv")
    assert refused.returncode == 2
    assert "it is the input" in refused.stderr
    answered = _launch("eval", *arguments, "--predictions", predictions, "--json")
    assert answered.returncode == 0, answered.stderr
    metrics = json.loads(answered.stdout)
    assert (metrics["examples"], metrics["labelled"], metrics["left_out"]) == (2, 0, 1)
    assert "row 2 (to line 4): field 'text' is empty; omitted" in answered.stderr
    lines = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert [(line["id"], line["label"]) for line in lines] == [(0, None), (1, None)]
    assert all(line["prediction"] in kinds for line in lines)

    measured = _launch("eval", "--checkpoint", run, "--json")
    assert measured.returncode == 0, measured.stderr
    assert json.loads(measured.stdout)["accuracy"] is not None
    (tmp_path / "old.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[2:]))
    refused = _launch("eval", "--checkpoint", run)
    assert refused.returncode == 2
    assert "the rows of its run have changed since the training" in refused.stderr
