# covers: megalite/formats/quantized.py
"""Quantized folders are refused, whether config.json or only the tensors show it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalite.checkpoint import describe_start
from megalite.checkpoint.huggingface import HuggingFaceFolder
from megalite.errors import CommandError
from tests.unit.huggingface.test_huggingface_families import exported

Tensors = dict[str, torch.Tensor]


def fp8(name: str, weight: torch.Tensor) -> Tensors:
    return {name: weight.to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1, 1)}


def bits4(name: str, weight: torch.Tensor) -> Tensors:
    packed = torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8)
    return {name: packed, f"{name}.absmax": torch.ones(4), f"{name}.quant_map": torch.ones(16)}


def bits8(name: str, weight: torch.Tensor) -> Tensors:
    scale = name.replace("weight", "SCB")
    return {name: weight.to(torch.int8), scale: torch.ones(len(weight))}


def packed(name: str, weight: torch.Tensor) -> Tensors:
    words = torch.zeros(weight.shape[1] // 4, len(weight), dtype=torch.int32)
    owner = name.removesuffix("weight")
    return {f"{owner}qweight": words, f"{owner}scales": torch.ones(1, len(weight)).half()}


def compressed(name: str, weight: torch.Tensor) -> Tensors:
    return {f"{name}_packed": torch.zeros(4, 4, dtype=torch.int32), f"{name}_shape": torch.ones(2)}


def scaled(name: str, weight: torch.Tensor) -> Tensors:
    """Floats that must be multiplied by a scale."""
    return {name: weight / 8, f"{name}_scale": torch.full((1,), 8.0)}


def ints(name: str, weight: torch.Tensor) -> Tensors:
    return {name: weight.to(torch.int8)}


def plain(name: str, weight: torch.Tensor) -> Tensors:
    return {name: weight}


KINDS: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    "fp8": (fp8, {"quant_method": "fp8"}, ("by fp8", "FineGrainedFP8Config")),
    "4 bits": (
        bits4,
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        ("bitsandbytes, 4 bits", "dequantize()"),
    ),
    "8 bits": (bits8, {"load_in_8bit": True}, ("bitsandbytes, 8 bits", "dequantize()")),
    "gptq": (packed, {"quant_method": "gptq", "bits": 4}, ("gptq, 4 bits", "unquantized model")),
    "awq": (packed, {"quant_method": "awq", "bits": 4}, ("awq, 4 bits", "unquantized model")),
    "compressed": (
        compressed,
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        ("compressed-tensors, pack-quantized", "CompressedTensorsConfig"),
    ),
    "scaled": (
        scaled,
        {"quant_method": "compressed-tensors", "format": "naive-quantized"},
        ("naive-quantized", "weight_scale"),
    ),
    "other": (packed, {"quant_method": "hqq"}, ("by hqq", "unquantized model")),
    "merged": (plain, {"quant_method": "bitsandbytes", "load_in_4bit": True}, ("remove",)),
    "silent, fp8": (fp8, {}, ("does not name", "weight_scale_inv")),
    "silent, packed": (packed, {}, ("does not name", "qweight")),
    "silent, scaled": (scaled, {}, ("does not name", "weight_scale")),
    "silent, integers": (ints, {}, ("has dtype I8, not a float",)),
}


def quantize(folder: Path, change: Any, section: dict[str, Any], key: str) -> None:
    exported("llama", 0, folder)
    file, config = folder / "model.safetensors", folder / "config.json"
    tensors: Tensors = {}
    for name, weight in load_file(file).items():
        tensors |= change(name, weight) if "proj" in name else {name: weight}
    save_file(tensors, file)
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | ({key: section} if section else {})))


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_folder_is_refused_with_its_method(kind: str, tmp_path: Path) -> None:
    change, section, words = KINDS[kind]
    quantize(tmp_path / "there", change, section, "quantization_config")
    with pytest.raises(CommandError) as caught:
        describe_start(tmp_path / "there")
    for text in words:
        assert text in str(caught.value)
    assert "missing" not in str(caught.value)


def test_quantization_method_is_read_from_other_keys_and_files(tmp_path: Path) -> None:
    quantize(tmp_path / "mlx", packed, {"bits": 4, "group_size": 64}, "quantization")
    with pytest.raises(CommandError, match="by mlx, 4 bits"):
        HuggingFaceFolder(tmp_path / "mlx")
    for name, method in {"quantize_config.json": "gptq", "quant_config.json": "awq"}.items():
        folder = tmp_path / method
        quantize(folder, packed, {}, "")
        (folder / name).write_text(json.dumps({"bits": 4, "w_bit": 4}))
        with pytest.raises(CommandError, match=f"by {method}, 4 bits"):
            HuggingFaceFolder(folder)


@pytest.mark.parametrize("section", [{}, {"load_in_4bit": False, "load_in_8bit": False}])
def test_section_that_quantizes_nothing_is_read(section: dict[str, Any], tmp_path: Path) -> None:
    quantize(tmp_path / "there", plain, section, "quantization_config")
    assert HuggingFaceFolder(tmp_path / "there").missing_head == []
