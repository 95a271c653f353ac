# covers: megalite/hub/foreign.py
"""Files and folders of other programs are recognised, with advice on how to convert them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megalite.checkpoint import open_checkpoint
from megalite.errors import CommandError
from megalite.hub import find_model
from megalite.hub.foreign import describe, transformer_folder

PEFT = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"})
LLAMA = json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
FOLDERS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "adapter": (
        {"adapter_config.json": PEFT, "adapter_model.safetensors": "x"},
        ("adapter of PEFT (LORA)", "org/base", "merge_and_unload"),
    ),
    "adapter next to a tokenizer": (
        {"adapter_config.json": PEFT, "tokenizer.json": "{}"},
        ("adapter of PEFT",),
    ),
    "gguf": ({"model-q4.gguf": "GGUF"}, ("GGUF", "gguf_file")),
    "deepspeed": (
        {"latest": "global_step10", "global_step10/mp_rank_00_model_states.pt": "x"},
        ("checkpoint of DeepSpeed", "zero_to_fp32.py", "--safe_serialization"),
    ),
    "deepspeed, one step": (
        {"zero_pp_rank_0_mp_rank_00_optim_states.pt": "x"},
        ("checkpoint of DeepSpeed",),
    ),
    "megatron": (
        {
            "latest_checkpointed_iteration.txt": "100",
            "iter_0000100/mp_rank_00/model_optim_rng.pt": "",
        },
        ("Megatron", "Hugging Face's format"),
    ),
    "megatron, distributed": (
        {"iter_0000100/common.pt": "", "iter_0000100/__0_0.distcp": ""},
        ("Megatron",),
    ),
    "dcp": ({".metadata": "", "__0_0.distcp": ""}, ("DCP", "dcp_to_torch")),
    "pickle": (
        {"config.json": LLAMA, "pytorch_model.bin": "x"},
        ("as a pickle", "LlamaForCausalLM", "save_pretrained"),
    ),
    "meta's own": (
        {"consolidated.00.pth": "x", "params.json": "{}"},
        ("consolidated", "Hugging Face's format"),
    ),
    "onnx": ({"config.json": LLAMA, "onnx/model.onnx": "x"}, ("ONNX",)),
    "flax": ({"config.json": LLAMA, "flax_model.msgpack": "x"}, ("Flax",)),
    "tensorflow": ({"config.json": LLAMA, "tf_model.h5": "x"}, ("TensorFlow",)),
    "diffusers": ({"model_index.json": "{}", "unet/config.json": "{}"}, ("diffusers",)),
    "tokenizer": ({"tokenizer.json": "{}"}, ("only a tokenizer",)),
    "weights alone": ({"model.safetensors": "x"}, ("no config.json",)),
    "no model type": ({"model.safetensors": "x", "config.json": "{}"}, ("no model_type",)),
    "a data set": ({"dataset_dict.json": "{}"}, ("holds data",)),
    "a run without checkpoints": (
        {"config.json": "{}", "status.json": "{}", "metrics.jsonl": ""},
        ("run folder that holds no checkpoint", "checkpoint.every"),
    ),
    "the hub's cache": (
        {"snapshots/abc/config.json": LLAMA, "refs/main": "abc"},
        ("snapshots/abc",),
    ),
    "a folder of models": ({"a/config.json": LLAMA, "b/readme": ""}, ("give one of them", "/a")),
    "a usable folder": ({"config.json": LLAMA, "model.safetensors": "x"}, ("as it is",)),
}


def write(folder: Path, content: dict[str, str]) -> Path:
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("kind", FOLDERS)
def test_folder_of_another_program_is_described(kind: str, tmp_path: Path) -> None:
    content, words = FOLDERS[kind]
    folder = write(tmp_path / "there", content)
    with pytest.raises(CommandError) as caught:
        open_checkpoint(folder)
    assert str(caught.value).startswith(str(folder))
    for text in words:
        assert text in str(caught.value)


def test_unknown_folder_has_no_description(tmp_path: Path) -> None:
    assert describe(write(tmp_path, {"notes.md": "x", "more/notes.md": "y"})) is None
    with pytest.raises(CommandError, match="holds no checkpoint: name a step folder"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.gguf", "GGUF"),
        ("model.safetensors", "give its folder"),
        ("pytorch_model.bin", "pickle"),
        ("model.onnx", "ONNX"),
        ("notes.txt", "is a file"),
    ],
)
def test_file_in_place_of_a_folder_is_described(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(CommandError, match=words) as caught:
        find_model(tmp_path / name, "--checkpoint")
    assert str(caught.value).startswith(f"--checkpoint {tmp_path / name}")


def test_transformer_inside_a_sentence_transformer_is_found(tmp_path: Path) -> None:
    modules = json.dumps([{"path": "0_Transformer"}, {"path": "1_Pooling"}])
    folder = write(tmp_path / "st", {"modules.json": modules, "0_Transformer/config.json": LLAMA})
    assert transformer_folder(folder) == folder / "0_Transformer"
    outside = write(
        tmp_path / "bad", {"modules.json": json.dumps([{"path": "../st/0_Transformer"}])}
    )
    assert transformer_folder(outside) == outside
    for odd in ("{", "3", '{"a": 1}', '["x"]', "[[1]]"):
        (outside / "modules.json").write_text(odd)
        assert transformer_folder(outside) == outside
