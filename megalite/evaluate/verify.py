"""Whether `transformers` makes of an exported folder what MegaLite makes of it."""

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

_LIMIT = 1e-4  # of scores, over their spread


def require_transformers() -> None:
    """Raise CommandError if the package transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise CommandError("this needs the package transformers: pip install megalite[hf]")


def verify(folder: Path, *, tokens: int = 32) -> tuple[float, float]:
    """Return the largest difference of scores on random tokens, over their spread; and its limit.

    Both read the folder again, in fp32.
    """
    ours = open_model(folder)
    longest = min(tokens, ours.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(ours.config.vocab_size, (2, longest), generator=generator)
    with torch.no_grad():
        expected = ours.model.cpu().logits(inputs_of(ours, ids))
        found = theirs(ours, ids)
    spread = float(expected.std().clamp_min(1e-6))
    return float((found - expected).abs().max()) / spread, _LIMIT


def verify_text(folder: Path) -> list[str]:
    """Return what `transformers` reads in another way than MegaLite: ids of texts, and their ends.

    Both read the folder again.
    """
    import transformers

    ours = load_tokenizer(folder)
    theirs: Any = transformers.AutoTokenizer.from_pretrained(folder)
    found = list[str]()
    for text in PROBES:
        wanted = [*ours.prefix_ids, *ours.encode(text), *ours.suffix_ids]
        if (ids := theirs(text).input_ids) != wanted:
            found.append(f"the ids of {text!r} are {ids} in transformers, here {wanted}")
    if (folder / GENERATION_CONFIG).is_file():
        eos = transformers.GenerationConfig.from_pretrained(folder).eos_token_id
        ends = {eos} if isinstance(eos, int) else set(eos or ())
        if ends != set(ours.end_ids):
            found.append(f"a text ends with {sorted(ends)} there, here with {sorted(ours.end_ids)}")
    return found


def inputs_of(ours: LoadedModel, ids: Tensor) -> dict[str, Tensor]:
    """Return tokens as our model takes them. A model of two stacks reads and writes them."""
    writes = ours.config.architecture == "encoder_decoder"
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if writes else {})


def theirs(ours: LoadedModel, ids: Tensor) -> Tensor:
    """Return the scores of `transformers` for the same folder and tokens: fp32 [B, T, V]."""
    import transformers

    architecture = {"decoder": "AutoModelForCausalLM", "encoder": "AutoModelForMaskedLM"}
    name = architecture.get(ours.config.architecture, "AutoModelForSeq2SeqLM")
    model: Any = getattr(transformers, name).from_pretrained(ours.folder, dtype=torch.float32)
    logits: Tensor = model.eval()(**inputs_of(ours, ids)).logits
    return logits
