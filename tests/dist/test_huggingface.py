# covers: launcher/export.py megalite/evaluate/loss.py
# covers: megalite/commands/export.py
"""Import of Hugging Face folders on any layout, and export, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalite.checkpoint import StoredCheckpoint, open_checkpoint
from megalite.checkpoint.huggingface import export
from megalite.config import ModelConfig
from megalite.tokenizers.tokenizer import load_tokenizer
from tests.helpers.families import FAMILIES, model_section
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import run_file, train, zero
from tests.parity.test_families import family_run
from tests.unit.huggingface.test_huggingface_families import InMemory, exported, random_model

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]


def _from(launch: Any, raw: dict[str, Any], source: str) -> None:
    train(launch, raw, init_from=source)


def command(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(ROOT / "launcher" / f"{name}.py"), *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.parametrize("family", FAMILIES)
def test_model_is_unchanged_by_import_and_export(
    shards: dict[str, str], tmp_path: Path, family: str
) -> None:
    """The run in between trains with the smallest possible learning rate."""
    layouts = {"tp2": (2, {"tensor": 2}, 1), "zero3": (2, {}, 3)}
    raw = family_run(shards, tmp_path, family)
    config = ModelConfig.model_validate(raw["model"])
    stored = InMemory(random_model(config), config)
    export(stored, config, load_tokenizer("bytes"), tmp_path / "in")
    before = load_file(tmp_path / "in" / "model.safetensors")
    for name, (ranks, parallel, stage) in layouts.items():
        raw = family_run(
            shards, tmp_path, family, name=name, parallel=parallel, deepspeed=zero(stage)
        )
        raw["training"] |= {"steps": 1, "eval_every": 0}
        # the smallest positive learning rate, without decay
        raw["optimizer"] = {"name": "sgd", "lr": 1e-45, "momentum": 0.0, "weight_decay": 0.0}
        run_ranks(_from, ranks, raw, str(tmp_path / "in"))
        out = tmp_path / f"{name}-out"
        trained = StoredCheckpoint(*open_checkpoint(tmp_path / name))
        export(trained, config, load_tokenizer("bytes"), out)
        after = load_file(out / "model.safetensors")
        assert before.keys() == after.keys()
        assert [key for key in before if not torch.equal(before[key], after[key])] == []
        configs = [json.loads((f / "config.json").read_text()) for f in (tmp_path / "in", out)]
        assert configs[0] == configs[1]


def test_exported_model_gives_the_same_text_in_transformers(
    shards: dict[str, str], tmp_path: Path
) -> None:
    """The text has 200 greedy tokens of a model that is trained here."""
    training = {"steps": 60, "global_batch_size": 16}
    model = {"max_position_embeddings": 256, "vocab_size": 258}
    raw = run_file(shards, tmp_path, training=training, model=model, optimizer={"lr": 1e-2})
    run_ranks(train, 1, raw)
    run, out = tmp_path / "run", tmp_path / "out"
    done = command("export", "--checkpoint", str(run), "--output", str(out), "--verify")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "largest difference of the logits" in done.stdout
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    prompt = "def main("
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    assert ids[0].tolist() == list(prompt.encode())
    settings = {"do_sample": False, "max_new_tokens": 200, "eos_token_id": 257}
    wanted = theirs.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0].tolist()
    texts = []
    for checkpoint in (run, out):
        options = ["--prompt", prompt, "--temperature", "0", "--max-new-tokens", "200"]
        done = command("generate", "--checkpoint", str(checkpoint), *options)
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout)
    wanted_text = bytes(i for i in wanted if i < 256).decode(errors="replace") + "\n"
    assert texts[0] == texts[1] == wanted_text
    assert len(wanted) == len(prompt) + 200
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    line = [*launch, str(ROOT / "launcher" / "generate.py"), "--checkpoint", str(run), *options]
    shared = subprocess.run(line, capture_output=True, text=True, check=False, timeout=300)
    assert shared.stdout == texts[0], shared.stderr


def test_folders_that_cannot_be_imported_are_refused(
    shards: dict[str, str], tmp_path: Path
) -> None:
    exported("llama", 1, tmp_path / "good")
    raw = run_file(shards, tmp_path, name="mine")
    path = tmp_path / "run.json"
    path.write_text(json.dumps(raw))

    def refused(folder: Path, *said: str) -> None:
        done = command("pretrain", "--config", str(path), "--init-from", str(folder))
        assert done.returncode == 2, done.stderr
        assert all(text in done.stderr for text in said), done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "mine").exists()

    refused(tmp_path / "good", "holds another model", "model.hidden_size is 48", '"model": {')
    config = json.loads((tmp_path / "good" / "config.json").read_text())
    tensors = load_file(tmp_path / "good" / "model.safetensors")

    def changed(name: str, values: dict[str, Any], weights: dict[str, torch.Tensor]) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config | values))
        save_file(weights, folder / "model.safetensors")
        return folder

    refused(
        changed("unknown", {"model_type": "mamba"}, tensors), "'mamba'", "llama, marian, mistral"
    )
    refused(changed("act", {"hidden_act": "gelu"}, tensors), "hidden_act 'gelu'", "'silu'")
    less = {k: v for k, v in tensors.items() if "layers.1.mlp.down" not in k}
    refused(changed("less", {}, less), "model.layers.1.mlp.down_proj.weight is missing")
    other = tensors | {"model.norm.weight": torch.ones(3)}
    refused(changed("shape", {}, other), "model.norm.weight is [3], not")
    pickled = changed("pickle", {}, tensors)
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    refused(pickled, "as a pickle", "LlamaForCausalLM", "save_pretrained")
    broken = changed("broken", {}, tensors)
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[:40])
    refused(broken, "cannot be read")


def test_exported_adapter_gives_the_same_logits_in_peft(
    shards: dict[str, str], tmp_path: Path
) -> None:
    """PEFT loads the adapter next to the base model; MegaLite merges both."""
    peft = pytest.importorskip("peft")
    from tests.dist.test_finetune import tuning_file, write_rows

    base, section = tmp_path / "base", model_section("llama", 1) | {"vocab_size": 301}
    config = ModelConfig.model_validate(section)
    stored = InMemory(random_model(config), config)
    export(stored, config, load_tokenizer("bytes"), base)
    (tmp_path / "rows").mkdir()
    write_rows(tmp_path / "rows" / "train.jsonl", 24, 1)
    raw = tuning_file(tmp_path / "rows", "lora", model=section)
    data = raw["finetune"]["data"] | {"valid_fraction": None, "test_split": None, "max_length": 16}
    targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
    adapter = {"rank": 4, "alpha": 12.0, "targets": targets}
    raw["finetune"] |= {"task": "language_modeling", "data": data, "adapter": adapter}
    data["tokenizer"] = str(base)
    raw["optimizer"]["lr"] = 0.05
    run_ranks(_tuned, 2, raw, str(base))
    run = str(tmp_path / "runs" / "lora")
    alone, whole = tmp_path / "alone", tmp_path / "whole"
    for output, more in ((alone, ["--adapter"]), (whole, ["--verify"])):
        done = command("export", "--checkpoint", run, "--output", str(output), *more)
        assert done.returncode == 0, done.stdout + done.stderr
    ids = torch.randint(301, (2, 12), generator=torch.Generator().manual_seed(1))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        before = theirs(ids).logits
        logits = peft.PeftModel.from_pretrained(theirs, alone)(ids).logits
        expected = transformers.AutoModelForCausalLM.from_pretrained(whole)(ids).logits
    assert float((logits - before).abs().max()) > 0.01
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    trained = load_file(alone / "adapter_model.safetensors")
    assert len(trained) == 2 * len(targets) * config.num_hidden_layers


def _tuned(launch: Any, raw: dict[str, Any], source: str) -> None:
    from tests.dist.test_finetune import tune

    tune(launch, raw, init_from=source)


def test_imported_encoder_is_evaluated_on_any_layout(tmp_path: Path) -> None:
    """The shards are made with its tokenizer. Two models are on two tensor ranks each."""
    import tokenizers

    from data_prep.encode import TokenizeOptions, tokenize

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    text = [" ".join(f"w{(7 * n * n + k) % 90}" for k in range(40)) for n in range(60)]
    words.train_from_iterator(text, tokenizers.trainers.WordLevelTrainer(special_tokens=names))
    (tmp_path / "words").mkdir()
    words.save(str(tmp_path / "words" / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "words")
    section = model_section("bert", 1) | {"vocab_size": tokenizer.vocab_size}
    config = ModelConfig.model_validate(section)
    export(InMemory(random_model(config), config), config, tokenizer, tmp_path / "bert")
    rows_file = tmp_path / "text.jsonl"
    rows_file.write_text("".join(json.dumps({"text": line}) + "\n" for line in text))
    out = tmp_path / "shards"
    tokenize(TokenizeOptions([str(rows_file)], str(tmp_path / "bert"), out, lossy=True))
    paths = str(tmp_path / "bert"), str(tmp_path / "shards")
    (alone,) = run_ranks(_measured, 1, *paths, 1)
    every = run_ranks(_measured, 4, *paths, 2)
    assert alone["tokens"] > 200
    assert 0 < alone["accuracy"] < 1
    for metrics in every:
        assert metrics["tokens"] == alone["tokens"]
        assert metrics["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert metrics["accuracy"] == pytest.approx(alone["accuracy"], abs=1e-6)


def _measured(launch: Any, folder: str, shards: str, tensor: int) -> dict[str, Any]:
    from megalite.evaluate import open_model, score_data
    from megalite.parallel import start

    grid = start(launch, tensor=tensor)
    return score_data(open_model(folder, grid), grid, data=shards, micro_batch_size=3)
