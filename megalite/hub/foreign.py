"""Recognition of other programs' files and folders, with advice on how to convert each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from megalite import files

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
_LONGEST_POINTER = 1024  # bytes; every safetensors file is larger

_MERGE = (
    'python -c "from peft import {model} as M; '
    "M.from_pretrained('{path}').merge_and_unload().save_pretrained('{path}-merged')\""
)
# PEFT's classes by the task type in adapter_config.json.
_PEFT_CLASSES = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
}
_USABLE_MODEL = "give a model folder with config.json and safetensors files"


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or an empty one if the file has none."""
    with suppress(OSError, ValueError, RecursionError):
        content = files.read_json(path)
        return content if isinstance(content, dict) else {}
    return {}


def describe(path: Path) -> str | None:
    """Describe a file or folder of another program, and say what to do with it.

    Args:
        path: a file or folder that is neither a checkpoint nor a usable model folder.
    Returns:
        the rest of a sentence that begins with the path, or None if the format is not recognised.
    """
    with suppress(OSError):
        if path.is_file():
            return _describe_file(path)
        for check in _CHECKS:
            if (description := check(path)) is not None:
                return description
    return None


def convert_command(path: Path | str, architecture: str = "AutoModel") -> str:
    """Return a command that rewrites pickled weights as safetensors with transformers."""
    imports = f"{architecture} as M"
    return rewrite_command(path, f"{path}-safetensors", imports, "M.from_pretrained(p)")


def rewrite_command(path: Path | str, output: str, imports: str, model: str) -> str:
    """Return a command that saves a model and its tokenizer again with transformers.

    Args:
        imports: what to import from transformers.
        model: Python expression that makes the model from the path `p`.
    """
    return (
        f'python -c "from transformers import {imports}, AutoTokenizer as T; '
        f"p, o = '{path}', '{output}'; {model}.save_pretrained(o); "
        'T.from_pretrained(p).save_pretrained(o)"'
    )


def is_pointer(path: Path) -> bool:
    """Return whether a file is a Git LFS pointer."""
    with suppress(OSError):
        if path.stat().st_size <= _LONGEST_POINTER:
            return path.read_bytes().startswith(b"version https://git-lfs")
    return False


def transformer_folder(path: Path) -> Path:
    """Return the Transformer's subfolder of a sentence-transformers folder, else `path`."""
    if "model_type" in read_object(path / CONFIG):
        return path
    with suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
        for module in files.read_json(path / "modules.json"):
            inner = path / str(module.get("path"))
            inside = inner.resolve().is_relative_to(path.resolve())
            if inside and "model_type" in read_object(inner / CONFIG):
                return inner
    return path


def _describe_file(path: Path) -> str:
    name = path.name.lower()
    if name.endswith(".safetensors"):
        return f"is one file of a model: give its folder, {path.parent}, with its config.json"
    if name.endswith(".gguf") or _begins(path, b"GGUF"):
        return f"is a GGUF file of llama.cpp, which is not read: {_gguf_advice()}"
    if name.endswith((".bin", ".pt", ".pth", ".ckpt")):
        return f"is a pickle, which runs what is in it and is not read: {_USABLE_MODEL}"
    if name.endswith(".onnx"):
        return f"is an ONNX graph, which is not read: {_USABLE_MODEL}"
    return f"is a file: {_USABLE_MODEL}, a step folder or a run folder"


def _gguf_advice() -> str:
    return (
        "use the model it was made from, or convert it with transformers' "
        "from_pretrained(FOLDER, gguf_file=FILE) and save_pretrained"
    )


def _begins(path: Path, magic: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(magic)) == magic


def _any(path: Path, *patterns: str) -> Path | None:
    """Return the first file or folder in `path` that matches one of the patterns."""
    return next((match for pattern in patterns for match in sorted(path.glob(pattern))), None)


def _adapter(path: Path) -> str | None:
    if not (path / ADAPTER).is_file() and _any(path, "adapter_model.*") is None:
        return None
    config = read_object(path / ADAPTER)
    base = config.get("base_model_name_or_path")
    kind = config.get("task_type")
    merge = _MERGE.format(path=path, model=_PEFT_CLASSES.get(str(kind), "AutoPeftModel"))
    return (
        f"holds an adapter of PEFT ({config.get('peft_type', 'LORA')}), not a model: start from "
        f"its base model, {base or 'which it does not name'}, or first merge both with\n{merge}\n"
        "and copy the tokenizer's files there"
    )


def _gguf(path: Path) -> str | None:
    if _any(path, "*.gguf") is None:
        return None
    return f"holds a GGUF file of llama.cpp, which is not read: {_gguf_advice()}"


def _deepspeed(path: Path) -> str | None:
    states = ("*_model_states.pt", "global_step*/*_model_states.pt", "*_optim_states.pt")
    if _any(path, *states) is None and not (
        (path / "latest").is_file() and _any(path, "global_step*") is not None
    ):
        return None
    return (
        "is a checkpoint of DeepSpeed, a pickle for each rank, which is not read: if it is "
        f"trusted, run\npython zero_to_fp32.py {path} {path}-fp32 --safe_serialization\n"
        f"(the script is in the checkpoint) and put the model's {CONFIG} and tokenizer there"
    )


def _megatron(path: Path) -> str | None:
    patterns = (
        *("latest_checkpointed_iteration.txt", "mp_rank_*", "iter_*/mp_rank_*", "*.nemo"),
        *("iter_*/metadata.json", "iter_*/common.pt", "common.pt", "model_weights/common.pt"),
    )
    if _any(path, *patterns) is None:
        return None
    return (
        "is a checkpoint of Megatron-LM or NeMo, which is not read: export it to Hugging Face's "
        "format there (Megatron Bridge, or tools/checkpoint/convert.py)"
    )


def _distributed(path: Path) -> str | None:
    if _any(path, "*.distcp", ".metadata", "*/*.distcp") is None:
        return None
    return (
        "is a distributed checkpoint of PyTorch (DCP), which is not read: if it is trusted, "
        f"run\npython -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} model.pt\n"
        "load that state dict into the model's class, and call its save_pretrained"
    )


def _original(path: Path) -> str | None:
    if _any(path, "consolidated*", "original/consolidated*") is None:
        return None
    return (
        "holds weights in the vendor's format (consolidated), which is not read: use the "
        "model in Hugging Face's format, or convert it with transformers' convert_*_weights_to_hf"
    )


def _diffusers(path: Path) -> str | None:
    if not (path / "model_index.json").is_file():
        return None
    return (
        "is a pipeline of diffusers, for pictures, but MegaLite trains language models: "
        f"{_USABLE_MODEL}"
    )


def _pickles(path: Path) -> str | None:
    if _any(path, "pytorch_model*.bin", "*.bin", "*.pt", "*.pth", "*.ckpt") is None:
        return None
    classes = read_object(path / CONFIG).get("architectures") or ["AutoModel"]
    command = convert_command(path, str(classes[0]) if isinstance(classes, list) else "AutoModel")
    return (
        "holds its weights as a pickle, which runs whatever is in it and is not read; if it is "
        f"trusted, convert it with\n{command}"
    )


def _other_frameworks(path: Path) -> str | None:
    kinds = {
        "ONNX": ("*.onnx", "onnx/*.onnx"),
        "TensorFlow": ("tf_model*.h5", "saved_model.pb", "*.ckpt.index", "*.tflite"),
        "Flax": ("flax_model*.msgpack",),
        "MLX": ("weights*.npz",),
        "TensorRT-LLM": ("*.engine",),
        "OpenVINO": ("openvino_model.*",),
        "Core ML": ("*.mlpackage", "*.mlmodel"),
    }
    for kind, patterns in kinds.items():
        if _any(path, *patterns) is not None:
            return f"holds a model in {kind}'s format, which is not read: {_USABLE_MODEL}"
    return None


def _data(path: Path) -> str | None:
    patterns = ("dataset_info.json", "dataset_dict.json", "state.json", "*.parquet", "*.jsonl")
    if _any(path, *patterns) is None or (path / "status.json").is_file():
        return None
    return f"holds data, not a model: {_USABLE_MODEL}, a step folder or a run folder"


def _cached(path: Path) -> str | None:
    snapshots = sorted((path / "snapshots").glob("*/config.json"))
    if not snapshots:
        return None
    return f"is a repository in the hub's cache: give its snapshot, {snapshots[-1].parent}"


def _run(path: Path) -> str | None:
    if not (path / "status.json").is_file() or not (path / CONFIG).is_file():
        return None
    return (
        "is a run folder that holds no checkpoint: let the run train to its first save "
        "(checkpoint.every), or give another run"
    )


def _tokenizer(path: Path) -> str | None:
    if (path / CONFIG).is_file() or _any(path, "tokenizer.json", "*.model") is None:
        return None
    if _any(path, "*.safetensors") is not None:
        return None
    return f"holds only a tokenizer, no model: {_USABLE_MODEL}"


def _without_config(path: Path) -> str | None:
    if _any(path, "*.safetensors") is None or "model_type" in read_object(path / CONFIG):
        return None
    state = f"a {CONFIG} that names no model_type" if (path / CONFIG).is_file() else f"no {CONFIG}"
    return f"holds safetensors files and {state}: put the model's {CONFIG} there"


def _several(path: Path) -> str | None:
    inner = [each for each in sorted(path.iterdir()) if "model_type" in read_object(each / CONFIG)]
    if not inner:
        return None
    names = ", ".join(str(each) for each in inner[:3])
    return f"holds no model, but its subfolders do: give one of them, such as {names}"


def _usable(path: Path) -> str | None:
    if "model_type" not in read_object(transformer_folder(path) / CONFIG):
        return None
    return (
        "is a Hugging Face model folder, which generate.py, eval.py and --init-from accept as it "
        "is; this needs a checkpoint: give a step folder or a run folder"
    )


# The first match counts: checks that identify a format come before those that only suggest one.
_CHECKS: tuple[Callable[[Path], str | None], ...] = (
    *(_adapter, _diffusers, _cached, _run, _megatron, _deepspeed, _distributed, _gguf),
    *(
        _original,
        _pickles,
        _other_frameworks,
        _data,
        _tokenizer,
        _without_config,
        _usable,
        _several,
    ),
)


def missing_shards(path: Path) -> Iterator[str]:
    """Yield the missing files that the folder's index names."""
    index = read_object(path / INDEX).get("weight_map")
    names = index.values() if isinstance(index, dict) else ()
    for name in dict.fromkeys(name for name in names if isinstance(name, str)):
        if not (path / name).is_file():
            yield name
