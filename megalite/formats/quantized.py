"""Detection of quantized model folders, whose tensors cannot be read as weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megalite.hub.foreign import read_object, rewrite_command

# Tensors that quantizers add to a weight, or write instead of it.
_PARTS = (
    *("weight_scale", "weight_scale_inv", "weight_scale_2", "input_scale", "output_scale"),
    *("activation_scale", "k_scale", "v_scale", "qweight", "qzeros", "scales", "g_idx", "biases"),
    *("absmax", "quant_map", "nested_absmax", "nested_quant_map", "SCB", "CB", "weight_format"),
    *("weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx", "weight_blocks"),
    *("weight_scales", "scale_weight", "meta", "zeros", "weight.absmax", "weight.quant_map"),
)
_PART_ENDINGS = tuple(f".{part}" for part in _PARTS)


def quantization(config: dict[str, Any], path: Path) -> str | None:
    """Return the name of the method that a folder's configuration says it is quantized by."""
    for key in ("quantization_config", "compression_config", "quantization"):
        section = config.get(key)
        if isinstance(section, dict) and section and not _is_off(section):
            return _method(key, section)
    for name in ("quantize_config.json", "quant_config.json", "hf_quant_config.json"):
        if section := read_object(path / name):
            inner = section.get("quantization", section)
            return _method(name, inner if isinstance(inner, dict) else section)
    return None


def _is_off(section: dict[str, Any]) -> bool:
    """Return whether a section of bitsandbytes says that nothing is quantized."""
    flags = [section[key] for key in ("load_in_4bit", "load_in_8bit") if key in section]
    return bool(flags) and not any(flags)


def _method(key: str, section: dict[str, Any]) -> str:
    method = section.get("quant_method") or section.get("quant_algo") or section.get("mode")
    if method is None and key == "quantization":
        method = "mlx"
    if method is None and any(name in section for name in ("load_in_4bit", "load_in_8bit")):
        method = "bitsandbytes"
    if method is None and key == "quantize_config.json":
        method = "gptq"
    if method is None and key == "quant_config.json":
        method = "awq"
    bits = section.get("bits") or section.get("w_bit")
    if method == "bitsandbytes":
        bits = 4 if section.get("load_in_4bit") else 8
    inner = section.get("format")
    name = f"{method or 'a method it does not name'}"
    return name + (f", {bits} bits" if bits else f", {inner}" if inner else "")


def quantized_parts(names: list[str]) -> list[str]:
    """Return the names of tensors that only a quantizer writes."""
    return [name for name in names if name.endswith(_PART_ENDINGS) or ".quant_state." in name]


def quantization_advice(method: str, path: Path, architecture: str) -> str:
    """Return advice on how to get unquantized weights for a quantized folder."""
    imports = f"{architecture} as M"
    how = ""
    if method.startswith("fp8") or method.startswith("mxfp4"):
        kind = "FineGrainedFP8Config" if method.startswith("fp8") else "Mxfp4Config"
        imports = f"{imports}, {kind} as Q"
        how = ", quantization_config=Q(dequantize=True)"
    elif method.startswith("compressed-tensors"):
        imports = f"{imports}, CompressedTensorsConfig as Q"
        how = ", quantization_config=Q(run_compressed=False)"
    elif not method.startswith("bitsandbytes"):
        return "use the unquantized model that it was made from"
    model = f"M.from_pretrained(p, dtype='bfloat16'{how})"
    model += ".dequantize()" if method.startswith("bitsandbytes") else ""
    return "use the unquantized model that it was made from, or make one with\n" + rewrite_command(
        path, f"{path}-plain", imports, model
    )
