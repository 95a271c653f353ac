"""What is trained under every layout: a run file made short, exact and independent of its data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megalite.config import ModelConfig, RunConfig, parse_config
from megalite.errors import CommandError
from megalite.files import sha256_file
from megalite.formats.manifest import Manifest, TokenizerInfo, write_manifest
from megalite.formats.shards import ShardWriter
from megalite.log import logger
from megalite.tokenizers.tokenizer import load_tokenizer
from megalite.train.parity.layouts import Layout

STEPS = 20
_VALIDATED = 3  # never right before a step whose layers' outputs are compared
SAVED = 10  # the step after which a run that is resumed was saved
_SEQUENCE = 64
_VOCABULARY = 1009  # a prime: no tensor-parallel size divides it
# AdamW moves a weight whose gradient is rounding alone as far as any other. At 3e-3 with 5 steps of
# warm-up one plain process whose batches are merely cut otherwise is off by 2.5e-4 in the norm and
# 9e-4 in a gradient after 20 steps; so no comparison there says anything of layouts.
_RATE = 1e-3
_WIDTH, _HEAD_WIDTH = 256, (4, 32)


@dataclass(frozen=True)
class Trial:
    """A run file whose layout is still open, and the folder everything is written to."""

    raw: Mapping[str, Any]
    folder: Path

    @property
    def model(self) -> ModelConfig:
        """The network, as it is tried."""
        return ModelConfig.model_validate(self.raw["model"])

    def config(self, layout: Layout, name: str, *, save: bool = False) -> dict[str, Any]:
        """The run file of one layout, as the run `name` of the folder; checked.

        Raises:
            ConfigError: the layout cannot train this model.
        """
        raw = deepcopy(dict(self.raw))
        raw["name"] = name
        for section, values in layout.sections(raw["training"]["global_batch_size"]).items():
            raw[section] = {**raw.get(section, {}), **values}
        raw["checkpoint"] = {"every": SAVED if save else 0}
        parse_config(raw)
        return raw


def usable_ranks(asked: int | None) -> int:
    """Ranks to try layouts with: each wants a GPU of its own where there are GPUs.

    Raises:
        CommandError: more asked for than there are GPUs.
    """
    gpus = torch.cuda.device_count()
    if gpus and asked is not None and asked > gpus:
        raise CommandError(
            f"--ranks {asked}, but this host has {gpus} GPUs: ask for at most {gpus}, or set "
            "CUDA_VISIBLE_DEVICES= to try on the CPU"
        )
    return asked or min(4, gpus or 4)


def make_trial(config: RunConfig, folder: Path, *, ranks: int, scale: bool = False) -> Trial:
    """The trial of a run file: `STEPS` steps in fp32 on shards made here. Says what it changed.

    Args:
        scale: shrink the model in proportion, whatever its size.
    """
    raw = config.model_dump(mode="json")
    changed = ["random tokens", "fp32", f"{STEPS} steps, validated every {_VALIDATED}"]
    model = raw["model"]
    if scale:
        model |= scaled(model, raw["parallel"]["tensor"])
        changed.append("the model scaled down")
    if model["hidden_dropout"] or model["attention_dropout"]:
        model |= {"hidden_dropout": 0.0, "attention_dropout": 0.0}
        changed.append("dropout 0")
    length = min(raw["data"]["sequence_length"], _SEQUENCE)
    batch = 2 * max(ranks, 2)
    if ranks % 2:  # two replicas of the model share a batch also where there are three ranks
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
    if raw["optimizer"]["name"] == "adamw":
        rate = min(rate, _RATE)
    raw["optimizer"]["lr"] = rate
    changed.append(f"a learning rate that rises to {rate:g}")
    raw["training"] |= {
        "steps": STEPS,
        "global_batch_size": batch,
        "log_every": 1,
        "eval_every": _VALIDATED,
        "eval_batches": 1,
        "drift_every": 0,  # what differs is the report's to name
    }
    raw["logging"] = {"directory": str(folder / "runs"), "tensorboard": False}
    for section in ("deepspeed", "parallel"):  # a layout's
        del raw[section]
    write_shards(shards, vocab_size=model["vocab_size"], tokens=2 * STEPS * batch * length)
    logger.info("%s, tried with: %s", config.name, ", ".join(changed))
    return Trial(raw, folder)


def scaled(model: Mapping[str, Any], tensor: int) -> dict[str, Any]:
    """Two thin layers of the model's proportions: heads per key/value head, MLP to width.

    Tensor-parallel sizes 2, 4 and `tensor` that divided the model still divide it; its vocabulary
    they do not.
    """
    wanted = [n for n in (2, 4, tensor) if model["num_key_value_heads"] % n == 0]
    groups = math.lcm(1, *wanted)
    heads = groups * (model["num_attention_heads"] // model["num_key_value_heads"])
    low, high = _HEAD_WIDTH
    head_dim = min(model["head_dim"], max(low, min(high, _WIDTH // heads // 4 * 4)))
    inner = heads * head_dim
    before = model["num_attention_heads"] * model["head_dim"]
    width = max(4, round(model["hidden_size"] * inner / before / 4) * 4)
    unit = math.lcm(1, *(n for n in wanted if model["intermediate_size"] % n == 0))
    ratio = model["intermediate_size"] / model["hidden_size"]
    vocabulary = min(model["vocab_size"], _VOCABULARY)
    return {
        "vocab_size": max(2, vocabulary - (vocabulary % 2 == 0)),
        "hidden_size": width,
        "intermediate_size": max(1, round(ratio * width / unit)) * unit,
        "num_hidden_layers": min(2, model["num_hidden_layers"]),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "max_position_embeddings": min(model["max_position_embeddings"], 2 * _SEQUENCE),
    }


def write_shards(folder: Path, *, vocab_size: int, tokens: int) -> None:
    """Documents of random length in which most ids follow from the one before."""
    (folder / "tokenizer").mkdir(parents=True)
    name = load_tokenizer("bytes").save(folder / "tokenizer")
    dtype = np.dtype("uint16" if vocab_size <= 1 << 16 else "int32")
    draw = np.random.default_rng(7)
    following = draw.permutation(vocab_size)
    with ShardWriter(folder, "shard_00000", dtype, vocab_size=vocab_size) as writer:
        while writer.tokens < tokens:
            ids = draw.integers(vocab_size, size=int(draw.integers(8, 120)))
            for place in np.flatnonzero(draw.random(len(ids)) < 0.7):
                if place:
                    ids[place] = following[ids[place - 1]]
            writer.add_document(ids)
        shard = writer.close()
    digest = sha256_file(folder / "tokenizer" / name)
    manifest = Manifest(
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
