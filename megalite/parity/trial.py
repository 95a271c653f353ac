"""The case that parity tests: a run file made short and exact, with generated data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megalite import registry
from megalite.config import ModelConfig, RunConfig, parse_config
from megalite.errors import CommandError
from megalite.files import sha256_file
from megalite.formats.manifest import ShardManifest, TokenizerInfo, write_manifest
from megalite.formats.shards import ShardWriter
from megalite.log import logger
from megalite.parity.layouts import ParityLayout
from megalite.tokenizers.tokenizer import load_tokenizer

STEPS = 20
_EVAL_EVERY = 3  # no validation directly before a step whose layer outputs are compared
SAVED_STEP = 10  # runs that are resumed are saved after this step
_SEQUENCE = 64
_VOCABULARY = 1009  # a prime: no tensor-parallel size divides it
# AdamW moves a weight whose gradient is rounding error as far as any other weight. At a rate of
# 3e-3, other micro-batches in a single process changed the norm by 2.5e-4 after 20 steps, and a
# gradient by 9e-4. Such a comparison says nothing about layouts.
_MAX_RATE = 1e-3
_WIDTH = 256
_HEAD_WIDTH = (4, 32)  # minimum and maximum


@dataclass(frozen=True)
class ParityCase:
    """A run file without a layout, and the folder for shards and runs."""

    raw: Mapping[str, Any]
    folder: Path

    @property
    def model(self) -> ModelConfig:
        """Model section of all layouts."""
        return ModelConfig.model_validate(self.raw["model"])

    def config(self, layout: ParityLayout, name: str, *, save: bool = False) -> dict[str, Any]:
        """Return the validated run file of one layout, as the run `name` of the folder.

        Raises:
            ConfigError: the layout cannot train this model.
        """
        raw = deepcopy(dict(self.raw))
        raw["name"] = name
        for section, values in layout.sections(raw["training"]["global_batch_size"]).items():
            raw[section] = {**raw.get(section, {}), **values}
        raw["checkpoint"] = {"every": SAVED_STEP if save else 0}
        parse_config(raw)
        return raw


def usable_ranks(requested: int | None) -> int:
    """Return the number of ranks: `requested`, else 4 on a CPU, or one per GPU up to 4.

    Raises:
        CommandError: more ranks than GPUs were requested, and the host has GPUs.
    """
    gpus = torch.cuda.device_count()
    if gpus and requested is not None and requested > gpus:
        raise CommandError(
            f"--ranks {requested}, but this host has {gpus} GPUs: give at most {gpus}, or set "
            "CUDA_VISIBLE_DEVICES= to try on the CPU"
        )
    return requested or min(4, gpus or 4)


def make_case(config: RunConfig, folder: Path, *, ranks: int, scale: bool = False) -> ParityCase:
    """Return the case of a run file: `STEPS` steps in fp32 on generated shards. Log all changes.

    Args:
        folder: receives the shards and the runs.
        ranks: maximum number of ranks of a layout.
        scale: if true, shrink the model in proportion (`scaled`).
    """
    raw = config.model_dump(mode="json")
    changed = ["random tokens", "fp32", f"{STEPS} steps, validated every {_EVAL_EVERY}"]
    model = raw["model"]
    if scale:
        model |= scaled(model, raw["parallel"]["tensor"])
        changed.append("the model scaled down")
    if model["hidden_dropout"] or model["attention_dropout"]:
        model |= {"hidden_dropout": 0.0, "attention_dropout": 0.0}
        changed.append("dropout 0")
    length = min(raw["data"]["sequence_length"], _SEQUENCE)
    batch = 2 * max(ranks, 2)
    if ranks % 2:  # so that two copies of the model can divide the batch
        batch *= 2
    changed.append(f"batches of {batch} x {length} tokens")
    shards = folder / "shards"
    raw["data"] |= {
        "train": [{"path": str(shards)}],
        "valid": [{"path": str(shards)}],
        "sequence_length": length,
        "verify": False,
    }
    raw["schedule"] |= {"warmup_steps": STEPS, "decay_steps": None}
    rate = raw["optimizer"]["lr"]
    facts = registry.optimizers.facts(raw["optimizer"]["name"])
    if "exp_avg_sq" in facts.get("states", ()):  # AdamW, and Muon, which uses AdamW for norms
        rate = min(rate, _MAX_RATE)
    raw["optimizer"]["lr"] = rate
    changed.append(f"a learning rate that rises to {rate:g}")
    raw["training"] |= {
        "steps": STEPS,
        "global_batch_size": batch,
        "log_every": 1,
        "eval_every": _EVAL_EVERY,
        "eval_batches": 1,
        "replica_check_every": 0,  # the comparison with the reference shows differences
    }
    raw["logging"] = {"directory": str(folder / "runs"), "tensorboard": False}
    for section in ("deepspeed", "parallel"):  # a layout sets these sections
        del raw[section]
    write_shards(shards, vocab_size=model["vocab_size"], tokens=2 * STEPS * batch * length)
    logger.info("%s, tested with: %s", config.name, ", ".join(changed))
    return ParityCase(raw, folder)


def scaled(model: Mapping[str, Any], tensor: int) -> dict[str, Any]:
    """Return the keys of a model with at most two thin layers in the proportions of `model`.

    The ratios of query heads to key/value heads and of MLP to hidden size are kept.
    Tensor-parallel sizes 2, 4 and `tensor` that divide `model` also divide the result, except its
    vocabulary.
    """
    sizes = [n for n in (2, 4, tensor) if model["num_key_value_heads"] % n == 0]
    groups = math.lcm(1, *sizes)
    heads = groups * (model["num_attention_heads"] // model["num_key_value_heads"])
    low, high = _HEAD_WIDTH
    head_dim = min(model["head_dim"], max(low, min(high, _WIDTH // heads // 4 * 4)))
    inner = heads * head_dim
    before = model["num_attention_heads"] * model["head_dim"]
    width = max(4, round(model["hidden_size"] * inner / before / 4) * 4)
    unit = math.lcm(1, *(n for n in sizes if model["intermediate_size"] % n == 0))
    ratio = model["intermediate_size"] / model["hidden_size"]
    vocabulary = min(model["vocab_size"], _VOCABULARY)
    kinds = list(dict.fromkeys(model.get("layer_types") or ()))  # one layer of each kind
    return {
        "vocab_size": max(2, vocabulary - (vocabulary % 2 == 0)),
        "hidden_size": width,
        "intermediate_size": max(1, round(ratio * width / unit)) * unit,
        "num_hidden_layers": min(2, model["num_hidden_layers"]),
        "layer_types": kinds or None,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "max_position_embeddings": min(model["max_position_embeddings"], 2 * _SEQUENCE),
    }


def write_shards(folder: Path, *, vocab_size: int, tokens: int) -> None:
    """Write documents of random length in which most ids follow from their predecessor."""
    (folder / "tokenizer").mkdir(parents=True)
    name = load_tokenizer("bytes").save(folder / "tokenizer")
    dtype = np.dtype("uint16" if vocab_size <= 1 << 16 else "int32")
    draw = np.random.default_rng(7)
    following = draw.permutation(vocab_size)
    with ShardWriter(folder, "shard_00000", dtype, vocab_size=vocab_size) as writer:
        while writer.tokens < tokens:
            ids = draw.integers(vocab_size, size=int(draw.integers(8, 120)))
            for index in np.flatnonzero(draw.random(len(ids)) < 0.7):
                if index:
                    ids[index] = following[ids[index - 1]]
            writer.add_document(ids)
        shard = writer.close()
    digest = sha256_file(folder / "tokenizer" / name)
    manifest = ShardManifest(
        dtype="uint16" if vocab_size <= 1 << 16 else "int32",
        vocab_size=vocab_size,
        tokenizer=TokenizerInfo(path=f"tokenizer/{name}", sha256=digest),
        bos=None,
        eos=None,
        documents=shard.documents,
        tokens=shard.tokens,
        shards=[shard],
    )
    write_manifest(folder, manifest)
