# covers: launcher/generate.py
# covers: megalite/commands/generate.py
"""launcher/generate.py on a small checkpoint: texts follow the logits of the model."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megalite import arch, files
from megalite.config import RunConfig, parse_config
from megalite.formats import checkpoint as disk
from megalite.model import LanguageModel, build
from megalite.tokenizers.tokenizer import load_tokenizer

LAUNCHER = Path(__file__).resolve().parents[3] / "launcher/generate.py"
POSITIONS = 8


def tiny_config() -> RunConfig:
    model = {
        "vocab_size": 258,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": POSITIONS,
        "position_embedding": "learned",
    }
    data: dict[str, Any] = {"train": [{"path": "x"}], "sequence_length": POSITIONS}
    training = {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1}
    run = {"name": "tiny", "model": model, "data": data, "training": training}
    return parse_config({**run, "optimizer": {"lr": 0.1}})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a step folder with random weights, outside of a run folder."""
    folder: Path = tmp_path_factory.mktemp("runs") / "step_00000001"
    (folder / "tokenizer").mkdir(parents=True)
    load_tokenizer("bytes").save(folder / "tokenizer")
    config = tiny_config()
    files.write_json(folder / "config.json", config.model_dump(mode="json"))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(tensor.shape, generator=generator)
        for name, tensor in arch.tensors(config.model).items()
    }
    save_file(tensors, folder / "weights.safetensors")
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    manifest = disk.CheckpointManifest(
        format="megalite-checkpoint-1",
        step=1,
        samples=1,
        tokens=POSITIONS,
        progress={},
        optimizer={},
        data_fingerprint="",
        tokenizer_sha256="",
        versions={},
        tensors={
            name: disk.TensorEntry(
                shape=list(value.shape),
                states={"weight": disk.StateEntry(file="weights.safetensors", sha256="")},
            )
            for name, value in tensors.items()
        },
        files={
            name: disk.FileEntry(
                bytes=(folder / name).stat().st_size, sha256=files.sha256_file(folder / name)
            )
            for name in names
        },
    )
    disk.write_manifest(folder, manifest)
    return folder


def generate(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    """Run the launcher in this process, and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["generate.py", *arguments])
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(LAUNCHER), run_name="__main__")
    return ended.value.code


def greedy(checkpoint: Path, prompt: str, count: int) -> str:
    """Return the expected text: each byte is the most likely after the last POSITIONS bytes."""
    from megalite.checkpoint import StoredCheckpoint, load_into

    config = tiny_config().model
    model: LanguageModel = build(config).eval()
    load_into(model, config, StoredCheckpoint(checkpoint, disk.read_manifest(checkpoint)))
    ids = list(prompt.encode())
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model.logits(torch.tensor([ids[-POSITIONS:]]))[0, -1].argmax()))
    assert max(ids) < 256, "this model ends documents; another seed is needed"
    return bytes(ids).decode(errors="replace")


def test_prompts_are_continued_beyond_the_window(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", str(checkpoint), "--prompt", "ab", "Once", "--temperature", "0"]
    assert generate(monkeypatch, *arguments, "--max-new-tokens", "12") == 0
    expected = [greedy(checkpoint, prompt, 12) for prompt in ("ab", "Once")]
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in expected)


def test_seed_and_stop_string_have_an_effect(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", str(checkpoint), "--prompt", "ab", "--max-new-tokens", "30"]
    texts = []
    for seed in ("1", "1", "2"):
        generate(monkeypatch, *arguments, "--temperature", "2", "--seed", seed)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    stop = texts[0][6:8]
    generate(monkeypatch, *arguments, "--temperature", "2", "--seed", "1", "--stop", stop)
    assert capsys.readouterr().out == texts[0][: texts[0].index(stop, 2)] + "\n"


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--top-p", "2"], 2), (["--checkpoint", "absent"], 2)]
)
def test_user_errors_have_their_exit_code(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int
) -> None:
    command = ["--checkpoint", str(checkpoint), "--prompt", "ab", *arguments]
    assert generate(monkeypatch, *command) == code
