"""Comparison of `transformers` with MegaLite on an exported folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalite.errors import CommandError
from megalite.evaluate.loading import LoadedModel, open_model
from megalite.tokenizers.special_tokens import GENERATION_CONFIG
from megalite.tokenizers.tokenizer import PROBES, load_tokenizer

_LIMIT = 1e-4  # difference of logits, relative to their standard deviation


def require_transformers() -> None:
    """Raise CommandError if the package transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise CommandError(
            "--verify needs the package transformers, which is not installed; run "
            "pip install megalite[hf], or remove --verify"
        )


def verify(folder: Path, *, tokens: int = 32) -> tuple[float, float]:
    """Return the largest relative difference of logits on random tokens, and its limit.

    Both libraries load the folder in fp32. The difference is relative to the standard deviation.
    """
    ours = open_model(folder)
    longest = min(tokens, ours.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(ours.config.vocab_size, (2, longest), generator=generator)
    with torch.no_grad():
        expected = ours.model.cpu().logits(inputs_of(ours, ids))
        logits = transformers_logits(ours, ids)
    spread = float(expected.std().clamp_min(1e-6))
    return float((logits - expected).abs().max()) / spread, _LIMIT


def verify_text(folder: Path) -> list[str]:
    """Return the differences between the tokenizers of `transformers` and MegaLite.

    Both libraries load the folder. Compared are the ids of texts, and the ids that end a text.
    """
    import transformers

    ours = load_tokenizer(folder)
    theirs: Any = transformers.AutoTokenizer.from_pretrained(folder)
    differences = list[str]()
    for text in PROBES:
        expected = [*ours.prefix_ids, *ours.encode(text), *ours.suffix_ids]
        if (ids := theirs(text).input_ids) != expected:
            differences.append(
                f"the ids of {text!r} are {ids} in transformers, but {expected} in MegaLite"
            )
    if (folder / GENERATION_CONFIG).is_file():
        eos = transformers.GenerationConfig.from_pretrained(folder).eos_token_id
        ends = {eos} if isinstance(eos, int) else set(eos or ())
        if ends != set(ours.end_ids):
            differences.append(
                f"a text ends with {sorted(ends)} in transformers, but with "
                f"{sorted(ours.end_ids)} in MegaLite"
            )
    return differences


def inputs_of(ours: LoadedModel, ids: Tensor) -> dict[str, Tensor]:
    """Return the inputs of a model. With two stacks, both get the same tokens."""
    has_decoder = ours.config.architecture == "encoder_decoder"
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if has_decoder else {})


def transformers_logits(ours: LoadedModel, ids: Tensor) -> Tensor:
    """Return the logits of `transformers` for the same folder and tokens: fp32 [B, T, V]."""
    import transformers

    architecture = {"decoder": "AutoModelForCausalLM", "encoder": "AutoModelForMaskedLM"}
    name = architecture.get(ours.config.architecture, "AutoModelForSeq2SeqLM")
    model: Any = getattr(transformers, name).from_pretrained(ours.folder, dtype=torch.float32)
    logits: Tensor = model.eval()(**inputs_of(ours, ids)).logits
    return logits
