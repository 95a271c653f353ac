"""Hugging Face model folders, of which each rank reads only the slices that it holds.

All faults of a folder are reported from its headers, before anything is allocated.
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
# Exceptions that a config.json of wrong types or sizes may cause.
_NOT_A_CONFIG = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
_FLOATS = ("F32", "F16", "BF16", "F64")
_HEAD = ("lm_transform.", "lm_head.")  # canonical names of a language model's head
_HEADS = ("lm_head.weight", "cls.predictions.decoder.weight")  # usual names of the head
# Copies and constants that transformers saves with the weights.
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
    """Position of a canonical tensor in a stored tensor of the family."""

    name: str
    transposed: bool
    first: int
    shape: tuple[int, ...]  # the stored tensor's


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
    """Return the files that an index names.

    Raises:
        CommandError: the index is damaged, or names a file outside its folder.
    """
    try:
        weight_map = files.read_object(index).get("weight_map")
    except (OSError, ValueError) as error:
        raise CommandError(f"{index} cannot be read: {error}; download it again") from None
    if not isinstance(weight_map, dict):
        kind = type(weight_map).__name__
        raise CommandError(f"{index}: weight_map is {kind}, not an object; download it again")
    names: list[Any] = list(weight_map.values())
    if wrong := [name for name in names if not files.is_plain_name(name)]:
        raise CommandError(
            f"{index}: weight_map names {wrong[0]!r:.60}, which is not a file of this folder; "
            "download the index again"
        )
    return sorted({index.parent / name for name in names})


def is_huggingface(path: Path) -> bool:
    """Return whether a folder looks like a model of Hugging Face or of sentence-transformers."""
    return "model_type" in foreign.read_object(foreign.transformer_folder(path) / _CONFIG)


class HuggingFaceFolder:
    """An open model folder.

    Attributes:
        path: the folder of config.json, which for sentence-transformers is a subfolder.
        section: the model section that is equivalent to config.json.
        missing_head: names of missing tensors of the language-model head.
        ignored: names of tensors that the model does not use.
    Raises:
        CommandError: the folder cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path = foreign.transformer_folder(path)
        try:
            config = files.read_object(path / _CONFIG)
            self._refuse_quantized(config, [])
            self.family, raw = from_config(config)
            self.section = ModelConfig.model_validate(raw)
        except (OSError, *_NOT_A_CONFIG) as error:
            message = str(error)
            if isinstance(error, ValidationError):
                message = describe_errors(error, "model")
            raise CommandError(f"{path}/{_CONFIG} cannot be used: {message}") from None
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
        """Check that the folder has a language-model head, which equals the embedding if tied.

        Raises:
            CommandError: it has none. The message says what the folder can be used for, and the
                class that saves a head.
        """
        if self.missing_head:
            more = f" and {len(self.missing_head) - 1} more" if len(self.missing_head) > 1 else ""
            raise CommandError(
                f"{self.path} has no language-model head ({self.missing_head[0]}{more} missing): "
                "it can start a classification (finetune.task), but neither generate nor score "
                f"text; use a folder that {self.family.architecture} saved"
            )
        self._compare_tied()

    def _compare_tied(self) -> None:
        """Check that a stored head equals the embedding if config.json ties them."""
        if not self.section.tie_word_embeddings:
            return
        _, shared = self._places["model.embed_tokens.weight"]
        heads = [self._stored[name] for name in self._heads() if name in self._stored]
        for head in heads:
            if head.name != shared.name and not torch.equal(self._load(head), self._load(shared)):
                raise CommandError(
                    f"{self.path}: {_CONFIG} has tie_word_embeddings true, but {head.name} differs "
                    f"from {shared.name}; set tie_word_embeddings to false to use the stored head, "
                    "or delete it"
                )

    def _load(self, stored: _StoredTensor) -> Tensor:
        try:
            with safe_open(stored.file, framework="pt") as file:
                return file.get_tensor(stored.name).float()
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{stored.file}: cannot read {stored.name}: {error}") from None

    def log_ignored(self) -> None:
        """Log the tensors of the folder that are not used, such as poolers and other heads."""
        if self.ignored:
            more = f" and {len(self.ignored) - 5} more" if len(self.ignored) > 5 else ""
            names = ", ".join(self.ignored[:5])
            logger.info(
                "%s: not used, because the model has no such part: %s%s", self.path, names, more
            )

    def read(self, tensor: str, state: str, target: Tensor, box: tuple[slice, ...]) -> None:
        """Read a box of a canonical tensor into `target`, as fp32. `state` must be the weight.

        Raises:
            CheckpointError: the tensor cannot be read.
        """
        place, stored = self._places[tensor]
        rows = slice(place.first + box[0].start, place.first + box[0].stop)
        slices = (rows, *box[1:])
        try:
            if stored.file not in self._open:
                self._open[stored.file] = safe_open(stored.file, framework="pt")
            view = self._open[stored.file].get_slice(stored.name)
            value = view[slices[::-1] if place.transposed else slices]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{stored.file}: cannot read {stored.name}: {error}") from None
        target.copy_(value.t() if place.transposed and value.dim() == 2 else value)

    def _refuse_quantized(self, config: dict[str, Any], names: list[str]) -> None:
        """Raise CommandError if the configuration or the tensors' names show quantization."""
        method = quantized.quantization(config, self.path)
        parts = quantized.quantized_parts(names)
        if method is None and not parts:
            return
        if method is None:
            method = "a method that its config.json does not name"
        else:
            dtypes = dict(self._dtypes())
            parts = quantized.quantized_parts(sorted(dtypes))
            if dtypes and not parts and set(dtypes.values()) <= {*_FLOATS}:
                raise CommandError(
                    f"it says that the weights are quantized by {method}, but all of them are "
                    "plain floats: if the model was dequantized or merged, remove "
                    "quantization_config from it"
                )
        classes = config.get("architectures") or ["AutoModel"]
        advice = quantized.quantization_advice(method, self.path, str(classes[0]))
        example = f" (it has {parts[0]})" if parts else ""
        raise CommandError(
            f"the weights are quantized by {method}{example}, and MegaLite reads plain ones: "
            f"{advice}"
        )

    def _dtypes(self) -> Iterator[tuple[str, str]]:
        """Yield the names and dtypes of all tensors in readable files."""
        for file in sorted(self.path.glob("*.safetensors")):
            with suppress(OSError, SafetensorError), safe_open(file, framework="pt") as reader:
                for name in reader.keys():  # noqa: SIM118 - not a mapping
                    yield name, str(reader.get_slice(name).get_dtype())

    def _files(self) -> list[Path]:
        """Return the safetensors files of the model: those of its index, or all of the folder."""
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
            description = foreign.describe(self.path) or "has no safetensors file; use another"
            raise CommandError(f"{self.path} {description}")
        stored = dict[str, _StoredTensor]()
        for file in names:
            if foreign.is_pointer(file):
                raise CommandError(
                    f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull` in "
                    f"{self.path}, or download the model with hf download"
                )
            try:
                with safe_open(file, framework="pt") as reader:
                    for name in reader.keys():  # noqa: SIM118 - not a mapping
                        view = reader.get_slice(name)
                        shape = tuple(view.get_shape())
                        stored[name] = _StoredTensor(file, name, shape, str(view.get_dtype()))
            except (OSError, SafetensorError) as error:
                raise CommandError(f"{file} cannot be read: {error}") from None
        return stored

    def _find_prefix(self) -> str:
        """Return the folder's prefix of the bare model's tensor names."""
        table = arch.tensors(self.section)
        base = self.family.prefix
        anchor = location_of(self.family, table["model.embed_tokens.weight"], self.section).name
        bare = anchor.removeprefix(base)
        if base + bare in self._stored or bare in self._stored:
            return base if base + bare in self._stored else ""
        matches = [name for name in self._stored if name.endswith(f".{bare}")]
        return matches[0].removesuffix(bare) if len(matches) == 1 else base

    def _find(self) -> dict[str, tuple[TensorLocation, _StoredTensor]]:
        """Return the location of every canonical tensor, or raise an error with all faults."""
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
                faults.append(f"{place.name} has dtype {stored.dtype}, not a float")
            elif stored.shape != place.shape:
                faults.append(f"{place.name} is {list(stored.shape)}, not {list(place.shape)}")
            else:
                places[name] = (place, stored)
        absent = bool(missing) and len(missing) == len(faults)
        if absent and all(name.startswith("model.decoder.") for name in missing):
            raise CommandError(
                f"{self.path} has only the encoder of a {self.family.model_type}, but architecture "
                f"encoder_decoder also needs the decoder; use a folder that "
                f"{self.family.architecture} saved"
            )
        if faults:
            more = f", and {len(faults) - 5} more" if len(faults) > 5 else ""
            raise CommandError(f"{self.path}: {'; '.join(faults[:5])}{more}")
        return places

    def _lookup(self, name: str) -> _StoredTensor | None:
        for other in (name, *self._aliases(name)):
            if (stored := self._stored.get(self._in_folder(other))) is not None:
                return stored
        return None

    def _in_folder(self, name: str) -> str:
        """Return a tensor's name with the folder's prefix instead of the family's."""
        base = self.family.prefix
        if base and name.startswith(base):
            return self._prefix + name.removeprefix(base)
        return self._prefix.removesuffix(base) + name if self._prefix else name

    def _find_ignored(self) -> list[str]:
        used = {stored.name for _, stored in self._places.values()}
        unused = [name for name in self._stored if name not in used]
        if adapters := [name for name in unused if ".lora_" in name]:
            raise CommandError(
                f"{self.path} has adapters next to its weights ({adapters[0]}), which would be "
                "ignored: merge them with merge_and_unload of PEFT and save the result"
            )
        redundant = re.compile(f"{_REDUNDANT}|{self.family.redundant}")
        return [name for name in unused if not redundant.search(name)]

    def _aliases(self, name: str) -> Sequence[str]:
        """Return other names that folders use for the family's tensor `name`.

        Some programs store a tied embedding only under the name of the head.
        """
        aliases = self.family.aliases(name)
        embedding = self.family.rename("model.embed_tokens.weight", self.section)
        tied = self.section.tie_word_embeddings and name == embedding
        return (*aliases, *self._heads()) if tied else aliases

    def _heads(self) -> Sequence[str]:
        """Return the names that folders use for the head."""
        head = self.family.rename("lm_head.weight", self.section)
        return list(dict.fromkeys((*_HEADS, head)))
