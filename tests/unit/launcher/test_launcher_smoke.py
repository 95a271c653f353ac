# covers: launcher/smoke.py
"""`make smoke` with replaced commands: corpus, started commands, accepted results."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]


class Commands:
    """Replacement of subprocess.run that records commands and writes the files they would write."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []
        self.state, self.perplexities, self.code = "done", [8123.4, 90.0, 26.26], 0

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        words = [str(word) for word in command]
        self.seen.append(words)
        if "--output" in words:
            output = Path(words[words.index("--output") + 1])
            output.mkdir(parents=True)
            (output / "manifest.json").write_text(json.dumps({"tokens": 3}))
        if "launcher/pretrain.py" in words:
            run = Path("runs/smoke")
            run.mkdir(parents=True)  # fails if an earlier run was not removed
            (run / "status.json").write_text(json.dumps({"state": self.state}))
            rows = [{"kind": "valid", "perplexity": p, "loss": 2.0} for p in self.perplexities]
            lines = [json.dumps(row) for row in [{"kind": "event"}, *rows]]
            (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        return subprocess.CompletedProcess(command, self.code, "def read_lines(path):\n", "oh dear")

    def named(self, word: str) -> list[list[str]]:
        return [words for words in self.seen if word in words]


@pytest.fixture
def smoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return launcher/smoke.py, which works in a new folder on a library of two files."""
    spec = importlib.util.spec_from_file_location("smoke", ROOT / "launcher/smoke.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    stdlib = tmp_path / "stdlib"
    stdlib.mkdir()
    (stdlib / "a.py").write_text("a = 1\n")
    (stdlib / "b.py").write_text("b = 2\n")
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(stdlib))
    monkeypatch.setattr(module, "CONFIG", ROOT / "configs/smoke.json")
    monkeypatch.setattr(module, "os", SimpleNamespace(chdir=lambda path: None))
    monkeypatch.chdir(tmp_path)
    assert (
        Path.cwd() == tmp_path
    )  # smoke removes runs/smoke, which must not be that of this checkout
    return module


@pytest.fixture
def commands(smoke: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Return the commands that the smoke run starts."""
    fake = Commands()
    monkeypatch.setattr(smoke.subprocess, "run", fake)
    return fake


def test_corpus_contains_sources_without_tests(smoke: ModuleType, tmp_path: Path) -> None:
    stdlib, corpus = tmp_path / "lib", tmp_path / "corpus"
    for name in ("json/decoder.py", "test/test_x.py", "json/tests/y.py", "site-packages/z.py"):
        (stdlib / name).parent.mkdir(parents=True, exist_ok=True)
        (stdlib / name).write_text(f"# {name}\n")
    (stdlib / "json/__init__.py").write_text("")
    (stdlib / "odd.py").write_bytes(b"x = '\xff\0'\n")
    for number in range(200):
        (stdlib / f"m{number}.py").write_text(f"n = {number}\n")
    summary = smoke.collect(stdlib, corpus)
    texts = {
        split: [json.loads(line)["text"] for line in (corpus / f"{split}.jsonl").open()]
        for split in ("train", "valid")
    }
    everything = texts["train"] + texts["valid"]
    assert sorted(everything) == sorted(
        ["# json/decoder.py\n", "x = ''\n", *(f"n = {number}\n" for number in range(200))]
    )
    assert 2 <= len(texts["valid"]) <= 25
    assert summary == f"{len(texts['train'])} files to train on, {len(texts['valid'])} held out"
    before = (corpus / "valid.jsonl").read_bytes()
    smoke.collect(stdlib, corpus)
    assert (corpus / "valid.jsonl").read_bytes() == before


def test_second_smoke_run_reuses_the_shards_and_trains_again(
    smoke: ModuleType, commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    smoke.main()
    verbs = ("train-tokenizer", "tokenize", "launcher/pretrain.py", "launcher/generate.py")
    assert [len(commands.named(verb)) for verb in verbs] == [1, 2, 1, 1]
    smoke.main()
    assert [len(commands.named(verb)) for verb in verbs] == [1, 2, 2, 2]
    (pretrain, _) = commands.named("launcher/pretrain.py")
    assert pretrain[1:3] == ["--num_gpus", "2"]
    assert pretrain[-2:] == ["--set", "training.micro_batch_size=8"]
    shown = capsys.readouterr().out
    assert "2 ranks, held-out perplexity 8,123 -> 26.3, " in shown
    assert "def read_lines(path):" in shown
    assert shown.splitlines()[-1].endswith("tensorboard --logdir runs/smoke")


@pytest.mark.parametrize(("gpus", "ranks", "micro"), [(1, 1, 8), (3, 2, 8), (4, 4, 4), (64, 8, 2)])
def test_batch_is_split_over_gpus(
    smoke: ModuleType,
    commands: Commands,
    monkeypatch: pytest.MonkeyPatch,
    gpus: int,
    ranks: int,
    micro: int,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    smoke.collect(Path(smoke.sysconfig.get_path("stdlib")), smoke.DATA / "corpus")
    smoke.prepare(smoke.DATA / "valid")
    smoke.train()
    command = commands.seen[-1]
    assert command[1:3] == ["--num_gpus", str(ranks)]
    assert command[-1] == f"training.micro_batch_size={micro}"


@pytest.mark.parametrize(
    ("state", "perplexities", "message"),
    [
        ("stopped", [8000.0, 30.0], "stopped"),
        ("done", [8000.0, 41.0], "41.0"),
        ("done", [8000.0, None], "None"),
    ],
)
def test_smoke_run_that_did_not_learn_is_a_failure(
    smoke: ModuleType, commands: Commands, state: str, perplexities: list[float], message: str
) -> None:
    commands.state, commands.perplexities = state, perplexities
    with pytest.raises(SystemExit, match=message):
        smoke.train()


def test_bits_per_byte_count_the_text_and_not_the_tokens(smoke: ModuleType) -> None:
    corpus, valid = smoke.DATA / "corpus", smoke.DATA / "valid"
    corpus.mkdir(parents=True)
    valid.mkdir()
    (corpus / "valid.jsonl").write_text(json.dumps({"text": "é" * 6}) + "\n")  # 12 bytes
    (valid / "manifest.json").write_text(json.dumps({"tokens": 3}))
    assert smoke.bits_per_byte(2.0) == pytest.approx(2.0 / 0.693147 * 3 / 12, rel=1e-5)


def test_phases_are_announced_before_they_begin(
    smoke: ModuleType, commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    smoke.main()
    words = [line.split(" ")[0] for line in capsys.readouterr().out.splitlines()]
    phases = ("corpus", "tokenizer", "train", "valid", "pretrain", "generate")
    assert [words.count(phase) for phase in phases] == [2] * len(phases)


def test_failed_command_ends_the_smoke_run_with_its_output(
    smoke: ModuleType, commands: Commands
) -> None:
    commands.code = 2
    with pytest.raises(SystemExit, match=r"(?s)oh dear.*failed: .*train-tokenizer"):
        smoke.main()
    assert len(commands.seen) == 1
