"""Export of a checkpoint to a folder that `transformers` loads without our code.

Memory holds the tensors of one output file at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megalite import arch, files
from megalite.checkpoint.huggingface.family import Family
from megalite.checkpoint.huggingface.folder import TensorLocation, location_of
from megalite.checkpoint.huggingface.mapping import family_of, to_config
from megalite.checkpoint.stored import TensorSource
from megalite.config import ModelConfig
from megalite.errors import CommandError
from megalite.tokenizers.special_tokens import GENERATION_CONFIG
from megalite.tokenizers.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class _Output:
    """A tensor of the exported folder, and the canonical tensors that it consists of."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[arch.CanonicalTensor, TensorLocation], ...]

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()


def export(
    source: TensorSource,
    model: ModelConfig,
    tokenizer: Tokenizer,
    output: Path,
    *,
    dtype: str = "float32",
    shard_bytes: int = 5 * 10**9,
    chat_template: str | None = None,
    ends: Sequence[int] = (),
) -> Family:
    """Write a model folder, which appears at `output` when it is complete.

    Args:
        ends: further ids that end a text, such as a chat's end of turn.
    Raises:
        CommandError: no Hugging Face family fits the model, or `output` exists.
    """
    family = family_of(model)
    with _staged(output) as staging:
        ids = _ids(tokenizer, model, ends)
        config = to_config(model, family)
        config = {**config, **ids, **_pad(config, tokenizer, model)}
        files.write_json(staging / "config.json", config | {"dtype": dtype})
        _write_tensors(
            staging, source, _outputs(family, model), dtype=DTYPES[dtype], shard_bytes=shard_bytes
        )
        tokenizer.export(staging)
        if model.architecture != "encoder":
            generation = _generation_config(tokenizer, config)
            files.write_json(staging / GENERATION_CONFIG, generation)
        if chat_template is not None:
            (staging / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    return family


def export_adapter(
    source: TensorSource, model: ModelConfig, output: Path, *, base: str = ""
) -> Family:
    """Write only the adapters, as a PEFT folder.

    Args:
        base: folder or hub name of the base model.
    Raises:
        CommandError: the model has no adapters, or has them at weights that the family stores
            transposed or fused.
    """
    if model.adapter is None:
        raise CommandError("--adapter: this model has no adapters; remove it")
    family = family_of(arch.base_model(model))
    adapter = model.adapter
    table = arch.tensors(model)
    tensors = dict[str, Tensor]()
    targets = set[str]()
    for name, tensor in table.items():
        owner, _, kind = name.rpartition(".")
        if kind not in ("lora_A", "lora_B"):
            continue
        weight = table[f"{owner}.weight"]
        place = location_of(family, weight, model)
        if place.transposed or place.shape != weight.shape:
            raise CommandError(
                f"{family.model_type} stores {owner} transposed or fused, which PEFT's adapters do "
                "not fit; remove --adapter, and the export adds the adapters to the weights"
            )
        theirs = place.name.removesuffix(".weight")
        targets.add(theirs.rpartition(".")[2])
        value = torch.empty(tensor.shape)
        source.read(name, "weight", value, tuple(slice(0, n) for n in tensor.shape))
        tensors[f"base_model.model.{theirs}.{kind}.weight"] = value
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if model.architecture == "decoder" else None,
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": adapter.scale * adapter.rank,
        "lora_dropout": adapter.dropout,
        "target_modules": sorted(targets),
        "bias": "none",
        "inference_mode": True,
    }
    with _staged(output) as staging:
        files.write_json(staging / "adapter_config.json", config)
        path = staging / "adapter_model.safetensors"
        _save(tensors, path)
    return family


@contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """Yield a folder to write to, which is renamed to `output` when it is complete."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CommandError(f"--output {output} exists; name a folder that does not exist")
    staging = output.with_name(f".{output.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        yield staging
        if output.exists():
            output.rmdir()
        files.publish(staging, output)
    except OSError as error:
        raise CommandError(f"--output {output} cannot be written: {error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _ids(tokenizer: Tokenizer, model: ModelConfig, ends: Sequence[int]) -> dict[str, Any]:
    """Return BOS and all ids that end a text, except those beyond the model's vocabulary."""
    bos, size = tokenizer.bos_id, model.vocab_size
    eos = [id for id in dict.fromkeys([*tokenizer.end_ids, *ends]) if id < size]
    return {
        "bos_token_id": bos if bos is not None and bos < size else None,
        "eos_token_id": eos if len(eos) > 1 else next(iter(eos), None),
    }


def _pad(config: Mapping[str, Any], tokenizer: Tokenizer, model: ModelConfig) -> dict[str, Any]:
    """Return the padding token if it is not also EOS.

    transformers does not train the embedding of the padding token.
    """
    pad = tokenizer.pad_id
    if "pad_token_id" in config or pad is None or pad in tokenizer.end_ids:
        return {}
    return {"pad_token_id": pad} if pad < model.vocab_size else {}


def _generation_config(tokenizer: Tokenizer, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the generation_config.json of the model that training started from, with our ids."""
    values = {k: v for k, v in tokenizer.generation_config.items() if k != "transformers_version"}
    keys = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    values |= {key: config[key] for key in keys if config.get(key) is not None}
    if values.get("pad_token_id") is None and (eos := config["eos_token_id"]) is not None:
        values["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
    return values


def _write_tensors(
    folder: Path,
    source: TensorSource,
    outputs: Sequence[_Output],
    *,
    dtype: torch.dtype,
    shard_bytes: int,
) -> None:
    width = torch.finfo(dtype).bits // 8
    groups: list[list[_Output]] = [[]]
    for output in outputs:
        if groups[-1] and width * sum(o.elements for o in [*groups[-1], output]) > shard_bytes:
            groups.append([])
        groups[-1].append(output)
    weight_map = dict[str, str]()
    for number, group in enumerate(groups, 1):
        single = len(groups) == 1
        name = "model" if single else f"model-{number:05d}-of-{len(groups):05d}"
        tensors = {output.name: _build(source, output).to(dtype) for output in group}
        path = folder / f"{name}.safetensors"
        _save(tensors, path)
        weight_map |= dict.fromkeys(tensors, path.name)
        del tensors  # before the next ones are built
    if len(groups) > 1:
        total = width * sum(output.elements for output in outputs)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        files.write_json(folder / "model.safetensors.index.json", index)


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    path.touch()  # safetensors would create a file that only its owner can read
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(mode)
    files.sync_file(path)


def _outputs(family: Family, model: ModelConfig) -> Sequence[_Output]:
    """Return the tensors to export, in the order of the model's."""
    parts: dict[str, list[tuple[arch.CanonicalTensor, TensorLocation]]] = {}
    for tensor in arch.tensors(model).values():
        place = location_of(family, tensor, model)
        parts.setdefault(place.name, []).append((tensor, place))
    outputs = [_Output(name, group[0][1].shape, tuple(group)) for name, group in parts.items()]
    table = arch.tensors(model)
    for name, canonical in family.copies(model).items():
        place = location_of(family, table[canonical], model)
        outputs.append(_Output(name, place.shape, ((table[canonical], place),)))
    outputs += [_Output(name, shape, ()) for name, shape in family.buffers(model).items()]
    return outputs


def _build(source: TensorSource, output: _Output) -> Tensor:
    value = torch.zeros(output.shape)
    for tensor, place in output.parts:
        if tensor.shape == output.shape and not place.transposed:  # avoids a copy
            source.read(tensor.name, "weight", value, tuple(slice(0, n) for n in tensor.shape))
            continue
        part = torch.empty(tensor.shape)
        source.read(tensor.name, "weight", part, tuple(slice(0, n) for n in tensor.shape))
        rows = slice(place.first, place.first + tensor.shape[0])
        transposed = place.transposed and part.dim() == 2
        value[(slice(None), rows) if transposed else (rows,)] = part.t() if transposed else part
    return value
