"""A model folder of Hugging Face, read box by box: a rank reads no more than it holds.

Every fault of a folder is found in its headers, before anything is allocated.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalite import arch, files
from megalite.checkpoint.huggingface.family import Family
from megalite.checkpoint.huggingface.mapping import from_config
from megalite.config import ModelConfig, describe_errors
from megalite.errors import CheckpointError, CommandError
from megalite.formats import quantized
from megalite.hub import foreign
from megalite.log import logger

_CONFIG, _INDEX = foreign.CONFIG, foreign.INDEX
# what values of other types and sizes raise
_NOT_A_CONFIG = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
_FLOATS = ("F32", "F16", "BF16", "F64")
_HEAD = ("lm_transform.", "lm_head.")  # canonical names of a language model's head
_HEADS = ("lm_head.weight", "cls.predictions.decoder.weight")  # common names of the head
# Copies and constants that classes of transformers write in addition to the weights.
_REDUNDANT = (
    r"(rotary_emb\.inv_freq|position_ids|token_type_ids|attn\.(masked_)?bias|final_logits_bias"
    r"|coder\.embed_(tokens|positions)\.weight|cls\.predictions\.decoder\.(weight|bias)"
    r"|lm_head\.weight)$"
)


@dataclass(frozen=True)
class _StoredTensor:
    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class TensorLocation:
    """Location of a canonical tensor in one of the family's: name, orientation, first row."""

    name: str
    transposed: bool
    first: int
    shape: tuple[int, ...]  # of the complete stored tensor


def location_of(family: Family, tensor: arch.CanonicalTensor, model: ModelConfig) -> TensorLocation:
    """Return the location of a canonical tensor in a folder of the family."""
    name = family.rename(tensor.name, model)
    first = 0
    shape = list(tensor.shape)
    if re.search(family.fused, name):
        sizes = {"q_proj": model.num_attention_heads, "k_proj": model.num_key_value_heads}
        rows = [sizes.get(p, model.num_key_value_heads) * model.head_dim for p in family.parts]
        part = family.parts.index(tensor.name.split(".")[-2])
        first = sum(rows[:part])
        shape[0] = sum(rows)
    transposed = re.search(family.transposed, name) is not None
    return TensorLocation(name, transposed, first, tuple(shape[::-1] if transposed else shape))


def _indexed_files(index: Path) -> list[Path]:
    """Return the files that an index names, each next to it.

    Raises:
        CommandError: an index that is damaged, or leads elsewhere.
    """
    try:
        places = files.read_object(index).get("weight_map")
    except (OSError, ValueError) as error:
        raise CommandError(f"{index} cannot be read: {error}; download it again") from None
    if not isinstance(places, dict):
        told = type(places).__name__
        raise CommandError(f"{index}: weight_map is {told}, not an object; download it again")
    names: list[Any] = list(places.values())
    if wrong := [name for name in names if not files.is_plain_name(name)]:
        raise CommandError(
            f"{index}: weight_map names {wrong[0]!r:.60}, which is no file of this folder; "
            "download the index again"
        )
    return sorted({index.parent / name for name in names})


def is_huggingface(path: Path) -> bool:
    """Return whether a folder looks like a model of Hugging Face or of sentence-transformers."""
    return "model_type" in foreign.read_object(foreign.transformer_folder(path) / _CONFIG)


class HuggingFaceFolder:
    """An opened folder.

    Attributes:
        path: the folder of config.json; inside the given one for sentence-transformers.
        section: the model section that means the same as its config.json.
        missing_head: names of the language-model head's tensors that the folder lacks.
        ignored: names of its tensors that the model has no place for.

    Raises:
        CommandError: everything that keeps the folder from being used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path = foreign.transformer_folder(path)
        try:
            config = files.read_object(path / _CONFIG)
            self._refuse_quantized(config, [])
            self.family, raw = from_config(config)
            self.section = ModelConfig.model_validate(raw)
        except (OSError, *_NOT_A_CONFIG) as error:
            told = str(error)
            if isinstance(error, ValidationError):
                told = describe_errors(error, "model")
            raise CommandError(f"{path}/{_CONFIG} cannot be used: {told}") from None
        except CommandError as error:
            raise CommandError(f"{path}/{_CONFIG}: {error}") from None
        self._stored = self._headers()
        self._refuse_quantized(config, list(self._stored))
        self.section = self.family.adjust_section(self.section, self._stored)
        self._open: dict[Path, Any] = {}
        self._prefix = self._find_prefix()
        self.missing_head: list[str] = []
        self._places = self._find()
        self.ignored = self._find_ignored()

    def require_head(self) -> None:
        """Refuse a folder without a language-model head.

        Raises:
            CommandError: with the uses that need no head, and the class that has one.
        """
        if self.missing_head:
            more = f" and {len(self.missing_head) - 1} more" if len(self.missing_head) > 1 else ""
            raise CommandError(
                f"{self.path} has no language-model head ({self.missing_head[0]}{more} missing): "
                "it can start a classification (finetune.task), but writes and scores no text; "
                f"take a folder that {self.family.architecture} saved"
            )
        self._compare_tied()

    def _compare_tied(self) -> None:
        """Refuse a head next to the embedding that it is said to share, and does not."""
        if not self.section.tie_word_embeddings:
            return
        _, shared = self._places["model.embed_tokens.weight"]
        heads = [self._stored[name] for name in self._heads() if name in self._stored]
        for head in heads:
            if head.name != shared.name and not torch.equal(self._whole(head), self._whole(shared)):
                raise CommandError(
                    f"{self.path}: {_CONFIG} has tie_word_embeddings true, but {head.name} is not "
                    f"{shared.name}; to use the head that is stored, set tie_word_embeddings to "
                    "false there, else delete the tensor"
                )

    def _whole(self, stored: _StoredTensor) -> Tensor:
        try:
            with safe_open(stored.file, framework="pt") as file:
                return file.get_tensor(stored.name).float()
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{stored.file}: cannot read {stored.name}: {error}") from None

    def say_ignored(self) -> None:
        """Log which tensors of the folder are not used, such as poolers and other heads."""
        if self.ignored:
            more = f" and {len(self.ignored) - 5} more" if len(self.ignored) > 5 else ""
            names = ", ".join(self.ignored[:5])
            logger.info(
                "%s: not used, for the model has no such part: %s%s", self.path, names, more
            )

    def read(self, tensor: str, state: str, target: Tensor, box: tuple[slice, ...]) -> None:
        """Read a box of a canonical tensor into `target`, as fp32; `state` is the weight.

        Raises:
            CheckpointError: it cannot be read.
        """
        place, stored = self._places[tensor]
        rows = slice(place.first + box[0].start, place.first + box[0].stop)
        where = (rows, *box[1:])
        try:
            if stored.file not in self._open:
                self._open[stored.file] = safe_open(stored.file, framework="pt")
            view = self._open[stored.file].get_slice(stored.name)
            value = view[where[::-1] if place.transposed else where]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{stored.file}: cannot read {stored.name}: {error}") from None
        target.copy_(value.t() if place.transposed and value.dim() == 2 else value)

    def _refuse_quantized(self, config: dict[str, Any], names: list[str]) -> None:
        """Raise CommandError if the configuration, or what lies next to weights, says so."""
        method = quantized.quantization(config, self.path)
        parts = quantized.quantized_parts(names)
        if method is None and not parts:
            return
        if method is None:
            method = "a method that its config.json does not name"
            found = parts
        else:
            kinds = dict(self._kinds())
            found = quantized.quantized_parts(sorted(kinds))
            if kinds and not found and set(kinds.values()) <= {*_FLOATS}:
                raise CommandError(
                    f"it says that the weights are quantized by {method}, but all of them are "
                    "plain floats: if the model was dequantized or merged, remove "
                    "quantization_config from it"
                )
        named = config.get("architectures") or ["AutoModel"]
        advice = quantized.quantization_advice(method, self.path, str(named[0]))
        beside = f" (it has {found[0]})" if found else ""
        raise CommandError(
            f"the weights are quantized by {method}{beside}, and MegaLite reads plain ones: "
            f"{advice}"
        )

    def _kinds(self) -> Iterator[tuple[str, str]]:
        """Yield the tensors' names and dtypes, as far as the files can be read."""
        for file in sorted(self.path.glob("*.safetensors")):
            with suppress(OSError, SafetensorError), safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    yield name, str(opened.get_slice(name).get_dtype())

    def _files(self) -> list[Path]:
        """Return the safetensors files of the model: those of its index, else what is there."""
        index = self.path / _INDEX
        indexed = _indexed_files(index) if index.exists() else []
        if missing := list(foreign.missing_shards(self.path)):
            raise CommandError(
                f"{self.path} lacks {missing[0]}, which {_INDEX} names ({len(missing)} files are "
                "missing); download or copy the folder again"
            )
        if indexed:
            return indexed
        if (self.path / "model.safetensors").is_file():
            return [self.path / "model.safetensors"]
        other = ("adapter_model", "consolidated")
        return [f for f in sorted(self.path.glob("*.safetensors")) if not f.name.startswith(other)]

    def _headers(self) -> dict[str, _StoredTensor]:
        names = self._files()
        if not names:
            found = foreign.describe(self.path) or "holds no safetensors file"
            raise CommandError(f"{self.path} {found}")
        stored = dict[str, _StoredTensor]()
        for file in names:
            if foreign.is_pointer(file):
                raise CommandError(
                    f"{file} is a note of Git LFS, not the file itself: run `git lfs pull` in "
                    f"{self.path}, or download the model with hf download"
                )
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 - not a mapping
                        view = opened.get_slice(name)
                        shape = tuple(view.get_shape())
                        stored[name] = _StoredTensor(file, name, shape, str(view.get_dtype()))
            except (OSError, SafetensorError) as error:
                raise CommandError(f"{file} cannot be read: {error}") from None
        return stored

    def _find_prefix(self) -> str:
        """Return what comes before the names of the bare model's tensors in this folder."""
        table = arch.tensors(self.section)
        base = self.family.prefix
        anchor = location_of(self.family, table["model.embed_tokens.weight"], self.section).name
        bare = anchor.removeprefix(base)
        if base + bare in self._stored or bare in self._stored:
            return base if base + bare in self._stored else ""
        found = [name for name in self._stored if name.endswith(f".{bare}")]
        return found[0].removesuffix(bare) if len(found) == 1 else base

    def _find(self) -> dict[str, tuple[TensorLocation, _StoredTensor]]:
        """Locate every canonical tensor; raise the faults of all of them at once."""
        places = dict[str, tuple[TensorLocation, _StoredTensor]]()
        faults = list[str]()
        missing = list[str]()
        for name, tensor in arch.tensors(self.section).items():
            place = location_of(self.family, tensor, self.section)
            stored = self._lookup(place.name)
            if stored is None and name.startswith(_HEAD):
                self.missing_head.append(place.name)
            elif stored is None:
                missing.append(name)
                faults.append(f"{place.name} is missing")
            elif stored.dtype not in _FLOATS:
                faults.append(f"{place.name} is of {stored.dtype}, where floats are due")
            elif stored.shape != place.shape:
                faults.append(f"{place.name} is {list(stored.shape)}, not {list(place.shape)}")
            else:
                places[name] = (place, stored)
        absent = bool(missing) and len(missing) == len(faults)
        if absent and all(name.startswith("model.decoder.") for name in missing):
            raise CommandError(
                f"{self.path} holds the encoder of a {self.family.model_type} alone: architecture "
                f"encoder_decoder needs its decoder, too; take a folder that "
                f"{self.family.architecture} saved"
            )
        if faults:
            more = f", and {len(faults) - 5} more" if len(faults) > 5 else ""
            raise CommandError(f"{self.path}: {'; '.join(faults[:5])}{more}")
        return places

    def _lookup(self, name: str) -> _StoredTensor | None:
        for other in (name, *self._aliases(name)):
            if (found := self._stored.get(self._in_folder(other))) is not None:
                return found
        return None

    def _in_folder(self, name: str) -> str:
        """Return a tensor's name under the folder's prefix, which the family's own may lack."""
        base = self.family.prefix
        if base and name.startswith(base):
            return self._prefix + name.removeprefix(base)
        return self._prefix.removesuffix(base) + name if self._prefix else name

    def _find_ignored(self) -> list[str]:
        used = {stored.name for _, stored in self._places.values()}
        left = [name for name in self._stored if name not in used]
        if adapters := [name for name in left if ".lora_" in name]:
            raise CommandError(
                f"{self.path} holds adapters next to its weights ({adapters[0]}), which would be "
                "omitted: merge them with merge_and_unload of PEFT and save that"
            )
        redundant = re.compile(f"{_REDUNDANT}|{self.family.redundant}")
        return [name for name in left if not redundant.search(name)]

    def _aliases(self, name: str) -> Sequence[str]:
        """Return other names under which folders store the tensor that the family calls `name`.

        Some programs store a tied embedding under the name of its copy in the head only.
        """
        aliases = self.family.aliases(name)
        embedding = self.family.rename("model.embed_tokens.weight", self.section)
        tied = self.section.tie_word_embeddings and name == embedding
        return (*aliases, *self._heads()) if tied else aliases

    def _heads(self) -> Sequence[str]:
        """Return the names under which folders store the head, a copy of a tied embedding."""
        own = self.family.rename("lm_head.weight", self.section)
        return list(dict.fromkeys((*_HEADS, own)))
