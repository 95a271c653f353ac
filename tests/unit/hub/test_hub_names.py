# covers: megalite/formats/start.py megalite/hub/resolve.py megalite/hub/first_rank.py
"""Names on the hub in place of folders: downloads, the cache, and refusals."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from megalite.env import Launch
from megalite.errors import CommandError
from megalite.formats.start import find_start
from megalite.hub import find_model, find_tokenizer, first_rank, parse_name
from megalite.hub import resolve as hub
from megalite.tokenizers.tokenizer import load_tokenizer
from tests.helpers.hub import COMMIT, StubHub, stub_hub

ALONE = Launch(0, 1, 0, 1, "127.0.0.1", 0, "python")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    """Start a hub with one model, an empty cache, and a working directory without folders."""
    model = tmp_path / "served"
    model.mkdir()
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        (model / name).write_text(json.dumps({"model_type": "llama", "file": name}))
    for name in ("model.safetensors", "consolidated.safetensors", "pytorch_model.bin", "README.md"):
        (model / name).write_text(name)
    (model / "onnx").mkdir()
    (model / "onnx" / "config.json").write_text("{}")
    load_tokenizer("bytes").export(model)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(hub.env, "find_launch", lambda: ALONE)
    with stub_hub() as started:
        started.repositories["org/model"] = model
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", started.endpoint)
        template = started.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield started


def test_model_of_the_hub_is_downloaded_once(server: StubHub, tmp_path: Path) -> None:
    folder = find_model("org/model", "--checkpoint")
    assert folder == tmp_path / "cache" / "models--org--model" / "snapshots" / COMMIT
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not {"pytorch_model.bin", "consolidated.safetensors", "onnx", "README.md"} & names
    assert (folder / "model.safetensors").read_text() == "model.safetensors"
    assert len(server.requested_files()) == len(names)
    server.requests.clear()
    assert find_model("org/model", "--checkpoint") == folder
    assert find_model(f"org/model@{COMMIT}", "--checkpoint") == folder
    assert server.requested_files() == []


def test_cached_model_is_used_without_a_network(
    server: StubHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = find_model("org/model@v1", "--checkpoint")
    server.repositories["org/model"] = 503  # an error of the hub
    assert find_model("org/model@v1", "--checkpoint") == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.requests.clear()
    assert find_model("org/model@v1", "--checkpoint") == folder
    assert server.requests == []
    (folder / "model.safetensors").unlink()  # an incomplete download
    with pytest.raises(CommandError, match="hf download org/model --revision v1 --local-dir model"):
        find_model("org/model@v1", "--checkpoint")


def silence(*_: Any, **__: Any) -> Any:
    """Block as an unreachable name server does."""
    time.sleep(5)
    raise OSError("no answer")


def test_name_below_an_existing_folder_is_taken_as_a_folder(
    server: StubHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/mine").mkdir(parents=True)
    with pytest.raises(CommandError) as caught:
        find_model("runs/mien", "--checkpoint")
    text = str(caught.value)
    assert text.startswith('--checkpoint runs/mien: no such folder in runs; did you mean "mine"?')
    assert "hf download" not in text


@pytest.mark.parametrize("how", ["offline", "refused", "silent"])
def test_unreachable_hub_is_reported_within_a_second(
    server: StubHub, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif how == "refused":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    else:
        monkeypatch.setattr(hub.socket, "create_connection", silence)
    began = time.monotonic()
    with pytest.raises(CommandError) as caught:
        find_model("org/other", "--init-from")
    assert time.monotonic() - began < 1
    text = str(caught.value)
    assert text.startswith("--init-from org/other: no such folder here")
    assert "\nhf download org/other --local-dir other\n" in text
    assert {"offline": "HF_HUB_OFFLINE", "refused": "refused", "silent": "not answer"}[how] in text


def test_refusals_of_the_hub_are_explained(server: StubHub, tmp_path: Path) -> None:
    server.repositories |= {"org/private": 401, "org/gated": 403}
    for name, words in {
        "org/none": "the hub has no such model",
        "org/private": "none that you may see",
        "org/gated": "accept the terms",
        "org/model@v9": "has no revision 'v9'",
    }.items():
        with pytest.raises(CommandError, match=words):
            find_model(name, "--checkpoint")
    kinds = {"gguf": "GGUF", "bin": "pickles", "md": "no safetensors file"}
    for ending, words in kinds.items():
        folder = tmp_path / ending
        folder.mkdir()
        (folder / f"weights.{ending}").write_text("x")
        server.repositories[f"org/{ending}x"] = folder
        with pytest.raises(CommandError, match=words):
            find_model(f"org/{ending}x", "--checkpoint")
    assert not server.requested_files()


def test_local_path_has_priority(server: StubHub, tmp_path: Path) -> None:
    (tmp_path / "here" / "org" / "model").mkdir(parents=True)
    assert find_model("org/model", "--checkpoint") == Path("org/model")
    assert find_tokenizer("org/model") is None
    assert server.requests == []


def test_parse_name_accepts_only_names_on_the_hub() -> None:
    for name in ("org/model", "Qwen/Qwen3-0.6B", "a/b_c.d", "org/model@v1", "org/m@refs/pr/3"):
        model = parse_name(name)
        assert model is not None
        assert str(model) == name
    for name in (
        *(
            "gpt2",
            "a/b/c",
            "/a/b",
            "./a/b",
            "../a",
            "~/a",
            "a/",
            "/a",
            "a/b@",
            "a b/c",
            "a/b c",
            "",
        ),
        *("a/b.json", "a/b.gguf", "a--b/c", "runs/x/..", "-a/b"),
    ):
        assert parse_name(name) is None, name


@pytest.mark.parametrize("name", ["gpt2", "a/b/c", "", "./none", "x" * 300, "a\0b"])
def test_find_model_refuses_a_name_that_is_no_folder(server: StubHub, name: str) -> None:
    with pytest.raises(CommandError, match=r"no such folder; .*hub"):
        find_model(name, "--checkpoint")
    assert server.requests == []


def test_misspelt_folder_is_corrected_in_the_message(server: StubHub, tmp_path: Path) -> None:
    (tmp_path / "here" / "runs" / "smoke" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CommandError, match='did you mean "smoke"'):
        find_model(tmp_path / "here" / "runs" / "smoek", "--checkpoint")


def test_run_that_has_checkpoints_needs_no_start(server: StubHub, tmp_path: Path) -> None:
    assert find_start(None, tmp_path) is None
    (tmp_path / "checkpoints" / "step_00000003").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000003" / "manifest.json").write_text("{}")
    assert find_start("org/model", tmp_path / "checkpoints") == "org/model"
    assert server.requests == []
    assert str(find_start("org/model", None)).endswith(COMMIT)


def test_tokenizer_on_the_hub_is_downloaded_without_weights(server: StubHub) -> None:
    tokenizer = load_tokenizer("org/model")
    assert tokenizer.vocab_size == load_tokenizer("bytes").vocab_size
    assert tokenizer.encode("é") == list("é".encode())
    assert not [name for name in server.requested_files() if name.endswith(".safetensors")]


def test_first_rank_of_a_host_downloads(server: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = [Launch(n, 2, n, 2, "127.0.0.1", 29517, "torchrun") for n in range(2)]
    monkeypatch.setattr(hub.env, "find_launch", lambda: launches[0])
    folder = find_model("org/model", "--checkpoint")
    server.requests.clear()
    monkeypatch.setattr(hub.env, "find_launch", lambda: launches[1])
    assert find_model("org/model", "--checkpoint") == folder
    assert server.requests == []
    monkeypatch.setattr(first_rank, "_STARTED", 0.0)  # before the other rank's note
    monkeypatch.setattr(hub.env, "find_launch", lambda: launches[0])
    with pytest.raises(CommandError, match="no such model"):
        find_model("org/none", "--checkpoint")
    monkeypatch.setattr(hub.env, "find_launch", lambda: launches[1])
    with pytest.raises(CommandError, match="no such model"):
        find_model("org/none", "--checkpoint")


def test_ranks_wait_while_the_first_one_is_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = tmp_path / "cache" / ".locks" / "megalite" / "note.json"
    monkeypatch.setattr(first_rank, "_RENEWAL", 0.05)
    monkeypatch.setattr(first_rank, "_SILENCE", 0.5)
    folders: list[Path] = []

    def wait() -> None:
        folders.append(first_rank.share_folder(note, False, Path, "--init-from org/model"))

    def download() -> Path:
        time.sleep(1.2)
        return tmp_path

    other = threading.Thread(target=wait)
    other.start()
    assert first_rank.share_folder(note, True, download, "--init-from org/model") == tmp_path
    other.join(30)
    assert folders == [tmp_path]


@pytest.mark.parametrize("has_started", [True, False])
def test_ranks_stop_waiting_for_a_first_rank_that_died(
    has_started: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = tmp_path / "cache" / ".locks" / "megalite" / "note.json"
    monkeypatch.setattr(first_rank, "_SILENCE", 0.3)

    def die() -> Path:
        raise SystemExit

    if has_started:
        with pytest.raises(SystemExit):
            first_rank.share_folder(note, True, die, "--init-from org/model")
    with pytest.raises(CommandError, match="--init-from org/model: the first rank of this host"):
        first_rank.share_folder(note, False, Path, "--init-from org/model")
