"""A model folder of Hugging Face, read box by box: a rank asks for no more than it holds.

Whatever is wrong with it is found by its headers, before anything is allocated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalite import files, shapes
from megalite.checkpoint.huggingface.families import Family
from megalite.checkpoint.huggingface.mapping import from_config
from megalite.config import ModelConfig
from megalite.errors import CheckpointError, CommandError

_CONFIG, _INDEX = "config.json", "model.safetensors.index.json"
# what values of other types and sizes raise
_NOT_A_CONFIG = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
_FLOATS = ("F32", "F16", "BF16", "F64")
_CONVERT = (
    'python -c "from transformers import AutoModel as M; '
    "M.from_pretrained('{path}').save_pretrained('{path}-safetensors')\""
)


@dataclass(frozen=True)
class _Stored:
    file: Path
    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """Where a canonical tensor lies in the family's own: name, orientation, first row."""

    name: str
    transposed: bool
    first: int
    shape: tuple[int, ...]  # of the whole stored tensor


def place_of(family: Family, tensor: shapes.Tensor, model: ModelConfig) -> Place:
    """Where the family keeps a canonical tensor."""
    name = family.rename(tensor.name, model)
    first, shape = 0, list(tensor.shape)
    if re.search(family.fused, name):
        sizes = {"q_proj": model.num_attention_heads, "k_proj": model.num_key_value_heads}
        rows = [sizes.get(p, model.num_key_value_heads) * model.head_dim for p in family.parts]
        part = family.parts.index(tensor.name.split(".")[-2])
        first, shape[0] = sum(rows[:part]), sum(rows)
    transposed = re.search(family.transposed, name) is not None
    return Place(name, transposed, first, tuple(shape[::-1] if transposed else shape))


def _indexed_files(index: Path) -> list[Path]:
    """The files that an index names, each beside it.

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
    """Whether a folder looks like one of Hugging Face's models."""
    with suppress(OSError, ValueError, TypeError, AttributeError):
        return "model_type" in files.read_json(path / _CONFIG)
    return False


class HuggingFaceFolder:
    """An opened folder.

    Attributes:
        section: the model section that means the same as its config.json.

    Raises:
        CommandError: all that keeps it from being used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.family, raw = from_config(files.read_object(path / _CONFIG))
            self.section = ModelConfig.model_validate(raw)
        except (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            ArithmeticError,
        ) as error:
            told = error.errors()[0] if isinstance(error, ValidationError) else error
            raise CommandError(f"{path}/{_CONFIG} cannot be used: {told}") from None
        except CommandError as error:
            raise CommandError(f"{path}/{_CONFIG}: {error}") from None
        self._stored = self._headers()
        self._open: dict[Path, Any] = {}
        self._places = self._find()

    def refuse_other_model(self, model: ModelConfig) -> None:
        """Raises CommandError where a run file's model is another than the folder's."""
        free = {"initializer_range", "hidden_dropout", "attention_dropout", "classifier_pooling"}
        if model.position_embedding != "learned":
            free.add("max_position_embeddings")
        ours, theirs = (m.model_dump(mode="json", exclude=free) for m in (model, self.section))
        if wrong := [key for key in ours if ours[key] != theirs[key]]:
            told = "; ".join(f"model.{k} is {ours[k]!r}, there {theirs[k]!r}" for k in wrong)
            section = self.section.model_dump(mode="json", exclude_unset=True)
            raise CommandError(
                f"{self.path} holds another model: {told}; its model section is\n"
                f'"model": {json.dumps(section)}'
            )

    def read(self, tensor: str, state: str, target: Tensor, box: tuple[slice, ...]) -> None:
        """A box of a canonical tensor into `target`, as fp32; `state` is the weight.

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

    def _headers(self) -> dict[str, _Stored]:
        names = sorted(self.path.glob("*.safetensors"))
        if (self.path / _INDEX).exists():
            names = _indexed_files(self.path / _INDEX)
        if not names:
            if any(self.path.glob("*.bin")):
                command = _CONVERT.format(path=self.path).replace(
                    "AutoModel ", f"{self.family.architecture} "
                )
                raise CommandError(
                    f"{self.path} holds its weights as a pickle, which runs whatever is in it and "
                    f"is not read; where it is trusted, convert it with\n{command}"
                )
            raise CommandError(f"{self.path} holds no safetensors file")
        found = dict[str, _Stored]()
        for file in names:
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 - not a mapping
                        view = opened.get_slice(name)
                        if view.get_dtype() in _FLOATS:
                            found[name] = _Stored(file, name, tuple(view.get_shape()))
            except (OSError, SafetensorError) as error:
                raise CommandError(f"{file} cannot be read: {error}") from None
        return found

    def _find(self) -> dict[str, tuple[Place, _Stored]]:
        """Every canonical tensor's place; faults of all of them at once."""
        places, faults = dict[str, tuple[Place, _Stored]](), list[str]()
        for name, tensor in shapes.tensors(self.section).items():
            place = place_of(self.family, tensor, self.section)
            stored = self._lookup(place.name)
            if stored is None:
                faults.append(f"{place.name} is missing")
            elif stored.shape != place.shape:
                faults.append(f"{place.name} is {list(stored.shape)}, not {list(place.shape)}")
            else:
                places[name] = (place, stored)
        if faults:
            more = f", and {len(faults) - 5} more" if len(faults) > 5 else ""
            raise CommandError(f"{self.path}: {'; '.join(faults[:5])}{more}")
        return places

    def _lookup(self, name: str) -> _Stored | None:
        for other in (name, name.removeprefix(self.family.base), *self._aliases(name)):
            if other in self._stored:
                return self._stored[other]
        return None

    def _aliases(self, name: str) -> Sequence[str]:
        """Other names of the shared embedding, and BERT's first names of a norm's values."""
        aliases = {
            "shared.weight": ("encoder.embed_tokens.weight",),
            "model.shared.weight": ("model.encoder.embed_tokens.weight",),
            "cls.predictions.bias": ("cls.predictions.decoder.bias",),
        }
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        return (*aliases.get(name, ()), old.replace("LayerNorm.bias", "LayerNorm.beta"))
