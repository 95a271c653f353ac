"""Fine-tuning from folders with larger tokenizers or other contexts, and from the hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megalite.checkpoint import StoredCheckpoint, open_checkpoint, open_model_folder
from megalite.checkpoint.huggingface import export
from megalite.config import ModelConfig, load_config
from megalite.env import Launch
from megalite.errors import CommandError
from megalite.evaluate.verify import verify
from megalite.tokenizers.tokenizer import load_tokenizer
from tests.dist.test_finetune import tuning_file, write_rows
from tests.helpers.checkpoints import publish
from tests.helpers.families import model_section
from tests.helpers.hub import stub_hub
from tests.helpers.models import run_config
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import rows, run_file, train, zero
from tests.unit.huggingface.test_huggingface_families import InMemory, random_model

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
ADDED = ("<pad>", "<|im_start|>", "<|im_end|>")
STILL = {"name": "sgd", "lr": 1e-45, "momentum": 0.0, "weight_decay": 0.0}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"parallel": {"tensor": 2}, "deepspeed": zero(1)}),
    "zero2": (2, {"deepspeed": zero(2)}),
    "zero3": (2, {"deepspeed": zero(3)}),
}


def write_model(folder: Path, family: str, number: int, vocab_size: int) -> dict[str, Any]:
    """Write a random model whose tokenizer has three special tokens more. Return its section."""
    import tokenizers

    section = model_section(family, number) | {"vocab_size": vocab_size}
    config = ModelConfig.model_validate(section)
    export(InMemory(random_model(config), config), config, load_tokenizer("bytes"), folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(list(ADDED))
    tokenizer.save(str(folder / "tokenizer.json"))
    return section


def tuned_on(folder: Path, base: Path, name: str, **sections: Any) -> dict[str, Any]:
    """Return a run file that fine-tunes the model in `base` with almost no change."""
    texts = folder / "rows"
    if not texts.exists():
        texts.mkdir()
        write_rows(texts / "train.jsonl", 16, 1)
    raw = tuning_file(texts, name, **sections)
    data = {"path": str(texts), "max_length": 32, "tokenizer": str(base)}
    data["cache"] = str(folder / "cache")
    raw["finetune"] = {"task": "language_modeling", "data": data, "epochs": 1}
    return raw | {"optimizer": STILL}


def tune(launch: Launch, raw: dict[str, Any], source: str) -> None:
    from data_prep.examples import prepare
    from megalite.checkpoint import describe_start

    model, tokenizer = describe_start(Path(source))
    raw["model"] = model | raw.get("model", {})
    options = {"prepare": lambda config: prepare(config, tokenizer=tokenizer)}
    train(launch, raw, init_from=source, **options)


def run_command(name: str, *arguments: str, **variables: str) -> Any:
    line = [sys.executable, str(ROOT / "launcher" / f"{name}.py"), *arguments]
    environ = {**os.environ, **variables}
    return subprocess.run(
        line, capture_output=True, text=True, check=False, timeout=300, env=environ
    )


@pytest.mark.parametrize(("family", "number"), [("llama", 0), ("gpt2", 1)])
def test_vocabulary_grows_to_the_tokenizer_on_any_layout(
    tmp_path: Path, family: str, number: int
) -> None:
    """New rows are the mean of the old rows. The export has the same logits in transformers."""
    base = tmp_path / "base"
    write_model(base, family, number, 258)
    before = load_file(base / "model.safetensors")
    layouts = LAYOUTS if family == "llama" else {"tp2": LAYOUTS["tp2"]}
    for name, (ranks, sections) in layouts.items():
        raw = tuned_on(tmp_path, base, name, **sections)
        raw["model"] = {}
        run_ranks(tune, ranks, raw, str(base))
        out = tmp_path / f"{name}-out"
        run = Path(raw["logging"]["directory"]) / name
        config = load_config(run / "config.json").model
        trained = StoredCheckpoint(*open_checkpoint(run))
        export(trained, config, load_tokenizer(run / "tokenizer"), out)
        error, limit = verify(out)
        assert error <= limit
        assert json.loads((out / "config.json").read_text())["vocab_size"] == 261
        after = load_file(out / "model.safetensors")
        assert before.keys() == after.keys()
        grown = [key for key in before if before[key].shape != after[key].shape]
        assert len(grown) == (1 if number == 1 else 2)  # tied or not
        for key, old in before.items():
            wanted = old
            if key in grown:
                mean = old.double().mean(dim=0, keepdim=True).float()
                wanted = torch.cat((old, mean.expand(3, -1)))
            assert torch.equal(after[key], wanted), key
        (start,) = (row for row in rows(raw, "event") if row["name"] == "start")
        assert start["changes"] == {"model.vocab_size": {"before": 258, "after": 261}}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    theirs.resize_token_embeddings(261, mean_resizing=False)
    with torch.no_grad():
        for module in {theirs.get_input_embeddings(), theirs.get_output_embeddings()}:
            module.weight[258:] = module.weight[:258].mean(dim=0)
        ids = torch.tensor([[1, 258, 3, 260]])
        logits = transformers.AutoModelForCausalLM.from_pretrained(out)(ids).logits
        torch.testing.assert_close(logits, theirs(ids).logits, rtol=0, atol=1e-4)


def test_vocabulary_larger_than_the_tokenizer_does_not_change(tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_model(base, "llama", 0, 272)
    raw = tuned_on(tmp_path, base, "padded")
    raw["model"] = {}
    run_ranks(tune, 1, raw, str(base))
    run = Path(raw["logging"]["directory"]) / "padded"
    assert json.loads((run / "config.json").read_text())["model"]["vocab_size"] == 272
    (start,) = (row for row in rows(raw, "event") if row["name"] == "start")
    assert start["changes"] == {}


def test_run_starts_from_a_checkpoint_with_another_context_and_vocabulary(
    shards: dict[str, str], tmp_path: Path
) -> None:
    """A different model is refused."""
    raw = run_file(shards, tmp_path, name="first")
    raw["training"] |= {"steps": 2, "eval_every": 0}
    raw["model"] |= {"vocab_size": 258}
    run_ranks(train, 1, raw)
    scaling = {"rope_type": "linear", "factor": 2.0}
    changed = {"vocab_size": 301, "max_position_embeddings": 128, "rope_scaling": scaling}
    second = run_file(shards, tmp_path, name="second", model={**raw["model"], **changed})
    second["training"] |= {"steps": 1, "eval_every": 0}
    second["optimizer"] = STILL
    run_ranks(_start, 2, second, str(tmp_path / "first"))
    (start,) = (row for row in rows(second, "event") if row["name"] == "start")
    assert {key: change["after"] for key, change in start["changes"].items()} == {
        "model.vocab_size": 301,
        "model.max_position_embeddings": 128,
        "model.rope_scaling": start["changes"]["model.rope_scaling"]["after"],
    }
    assert start["changes"]["model.rope_scaling"]["after"]["factor"] == 2.0
    folders = [next((tmp_path / name / "checkpoints").iterdir()) for name in ("first", "second")]
    before, after = (_weights(folder) for folder in folders)
    for name, old in before.items():
        assert torch.equal(after[name][: len(old)], old), name
        if len(after[name]) > len(old):
            mean = old.double().mean(dim=0).float().expand(43, -1)
            assert torch.equal(after[name][len(old) :], mean), name
    third = run_file(shards, tmp_path, name="third", model={**raw["model"], "activation": "geglu"})
    (tmp_path / "third.json").write_text(json.dumps(third))
    arguments = ("--config", str(tmp_path / "third.json"), "--init-from", str(tmp_path / "first"))
    done = run_command("pretrain", *arguments)
    assert done.returncode == 2
    assert "holds another model: model.activation is 'geglu', there 'swiglu'" in done.stderr
    assert not (tmp_path / "third").exists()


def _start(launch: Launch, raw: dict[str, Any], source: str) -> None:
    train(launch, raw, init_from=source)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for file in folder.glob("model-*.safetensors"):
        weights |= load_file(file)
    return weights


def test_model_of_the_hub_is_finetuned_on_several_ranks(tmp_path: Path) -> None:
    """It is downloaded once and not at a resume. The exported adapter names it."""
    base = tmp_path / "base"
    write_model(base, "llama", 0, 258)
    raw = tuned_on(tmp_path, base, "hub")
    del raw["model"]
    del raw["finetune"]["data"]["tokenizer"]
    raw["finetune"]["adapter"] = {"rank": 2}
    raw["optimizer"] = {"lr": 1e-3}
    path = tmp_path / "hub.json"
    path.write_text(json.dumps(raw))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    line = [*launch, str(ROOT / "launcher" / "finetune.py"), "--config", str(path)]
    with stub_hub() as hub:
        hub.repositories["org/tiny"] = base
        environ = {**os.environ, **hub.environment(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        for _ in range(2):
            done = subprocess.run(
                [*line, "--init-from", "org/tiny"],
                capture_output=True, text=True, check=False, timeout=300, env=environ,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
        requested = hub.requested_files()
        assert sorted(requested) == sorted(set(requested))
        assert len([path for _, path in hub.requests if "/revision/" in path]) == 1
    (start,) = (row for row in rows(raw, "event") if row["name"] == "start")
    assert start["init_name"] == "org/tiny"
    run = Path(raw["logging"]["directory"]) / "hub"
    out = tmp_path / "adapter"
    done = run_command("export", "--checkpoint", str(run), "--output", str(out), "--adapter")
    assert done.returncode == 0, done.stderr
    adapter = json.loads((out / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "org/tiny"


def _open_own(launch: Launch, pairs: list[list[str]]) -> list[str]:
    """Open different folders on each rank, as on hosts with local disks. Return the results."""
    from megalite.parallel import start

    grid, answers = start(launch), list[str]()
    for paths in pairs:
        try:
            opened = open_model_folder(Path(paths[launch.rank]), grid)
            if opened is None:
                open_checkpoint(Path(paths[launch.rank]), grid, weights_only=True)
            answers.append("opened")
        except CommandError as error:
            answers.append(str(error))
        assert grid.all_gather_objects(len(answers)) == [len(answers)] * 2  # the ranks are in step
    return answers


def test_folder_that_one_host_cannot_use_is_refused_by_all(tmp_path: Path) -> None:
    whole = tmp_path / "models--org--name" / "snapshots" / "a1"
    write_model(whole, "llama", 2, 261)
    other, lacks, damaged = (whole.parent / name for name in ("b2", "c3", "d4"))
    shutil.copytree(whole, other)
    shutil.copytree(whole, damaged)
    (damaged / "model.safetensors").write_bytes(b"cut")
    pairs = [[str(whole), str(path)] for path in (whole, other, lacks, damaged)]
    step = publish(tmp_path / "run" / "checkpoints", 5, run_config())
    pairs += [[str(path) for path in pair] for pair in ((lacks, step), (step, step))]
    first, second = run_ranks(_open_own, 2, pairs, timeout=60)
    assert first == second
    assert [first[0], first[5]] == ["opened", "opened"]
    assert "the hosts have different commits, a1, b2" in first[1]
    assert str(lacks) in first[2]
    assert str(damaged) in first[3]
    assert f"{lacks} holds no checkpoint" in first[4]
