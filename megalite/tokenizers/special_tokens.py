"""Files next to a tokenizer: names of special tokens, added tokens, and the ends of a text.

Read as `transformers` reads them: `special_tokens_map.json` and `added_tokens.json` count only if
`tokenizer_config.json` has no `added_tokens_decoder`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megalite import files
from megalite.errors import DataError

TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
_TOKENS_MAP = "special_tokens_map.json"
_ADDED_TOKENS = "added_tokens.json"
_KEPT = (
    TOKENIZER_CONFIG,
    _TOKENS_MAP,
    _ADDED_TOKENS,
    GENERATION_CONFIG,
    "chat_template.jinja",
)
# MegaLite's own key of tokenizer_config.json: the shards were made with --bos (or --no-bos).
_BEGINS = "megalite_documents_begin_with_bos"
# MegaLite's own key of tokenizer_config.json: the answer of `space_before`.
_SPACE = "megalite_space_before_text"
_SPACES = (None, "always", "first", "never")
_NAMED = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# Tokenizers (or model types) that put EOS after a text without a word of it in the files.
_END_WITH_EOS = ("t5", "mt5", "umt5")
# Tokenizers and models for which transformers ignores SentencePiece's own setting of the space.
_LLAMA_TOKENIZERS = ("LlamaTokenizer", "CodeLlamaTokenizer")
_LLAMA_MODELS = ("llama", "code_llama")
_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Names in use for the tokens that begin and end a document, if no file names them; BERT's are last.
_USUAL_NAMES = {
    "bos_token": ("<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>", "[CLS]"),
    "eos_token": ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>", "[SEP]"),
    "pad_token": (),
}


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in the text itself, before the tokenizer proper sees the rest."""

    id: int
    content: str
    special: bool
    normalized: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class Companions:
    """The files next to a tokenizer; all of them may be absent.

    Attributes:
        files: name and content of those that belong to the tokenizer, as they are saved with it.
        model_config: the `config.json` of the model that the folder holds.

    Raises:
        DataError: a file that holds something else than it should.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self.files: dict[str, bytes] = {}
        self.config: Mapping[str, Any] = {}
        self.model_config: Mapping[str, Any] = {}
        if folder is None:
            return
        for name in _KEPT:
            if (folder / name).is_file():
                self.files[name] = (folder / name).read_bytes()
        with suppress(DataError, OSError):  # the model's own reader names what is wrong with it
            self.model_config = self._parse("config.json", (folder / "config.json").read_bytes())
        self.config = self._parse(TOKENIZER_CONFIG)
        made = str(self.config.get("tokenizer_class") or self.model_config.get("model_type"))
        if made.lower().startswith(_END_WITH_EOS):
            self._set("add_eos_token", self.config.get("add_eos_token", True))
        if ids := self._generation_config():
            self.files[GENERATION_CONFIG] = (json.dumps(ids, indent=2) + "\n").encode()

    def save(self, folder: Path) -> None:
        """Write the files into an existing folder."""
        for name, data in self.files.items():
            (folder / name).write_bytes(data)

    # ---- names

    @cached_property
    def names(self) -> dict[str, Any]:
        """Names of tokens by key, as the files state them. None means no such token."""
        found = dict(self.config)
        if "added_tokens_decoder" not in self.config:
            found |= self._parse(_TOKENS_MAP)
        return {
            key: self._name(key, value)
            for key, value in found.items()
            if key in _NAMED or (key.endswith("_token") and isinstance(value, str))
        }

    def find(self, key: str, token_to_id: Any) -> int | None:
        """Return the id of `bos_token`, `eos_token` or `pad_token`; None if there is none.

        Args:
            token_to_id: a function from a name to its id, or None if the vocabulary lacks it.
        """
        if key in self.names:
            name = self.names[key]
            return None if name is None else token_to_id(name)
        ids = self.ids(f"{key}_id")
        found = (token_to_id(name) for name in _USUAL_NAMES[key])
        return ids[0] if ids else next((id for id in found if id is not None), None)

    @cached_property
    def added_tokens(self) -> list[AddedToken]:
        """Tokens that were added to the vocabulary, by id."""
        if "added_tokens_decoder" in self.config:
            stated = self.config["added_tokens_decoder"]
            return sorted(self._stated(stated), key=lambda token: token.id)
        known = self.special_names
        found = list[AddedToken]()
        for name, id in self._parse(_ADDED_TOKENS).items():
            if not _is_id(id):
                raise self._fault(_ADDED_TOKENS, f"{name!r} has the id {id!r}; ids are 0 or more")
            found.append(AddedToken(id, name, name in known, name not in known))
        return sorted(found, key=lambda token: token.id)

    def _stated(self, stated: Any) -> list[AddedToken]:
        found = list[AddedToken]()
        try:
            for id, token in stated.items():
                flags = ("special", "normalized", "lstrip", "rstrip", "single_word")
                content = token["content"]
                if not isinstance(content, str) or not content:
                    raise ValueError(f"{content!r} is no token")
                flag_values = {flag: bool(token.get(flag, False)) for flag in flags}
                found.append(AddedToken(int(id), content, **flag_values))
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise self._fault(TOKENIZER_CONFIG, f"added_tokens_decoder: {error}") from None
        return found

    def _name(self, key: str, value: Any) -> str | None:
        name = value.get("content") if isinstance(value, dict) else value
        if name is None or name == "":
            return None
        if not isinstance(name, str):
            file = TOKENIZER_CONFIG if value is self.config.get(key) else _TOKENS_MAP
            raise self._fault(file, f"{key} is {name!r:.40}, not the name of a token")
        return name

    @cached_property
    def special_names(self) -> list[str]:
        """Names that the files call special, whatever the vocabulary says about them."""
        found = [name for name in self.names.values() if name]
        return list(dict.fromkeys([*found, *self._extra]))

    @cached_property
    def _extra(self) -> list[str]:
        """Names of special tokens that have no role of their own."""
        stated = dict(self.config)
        found = list[str]()
        if "added_tokens_decoder" not in self.config:
            stated |= self._parse(_TOKENS_MAP)
        for key in ("additional_special_tokens", "extra_special_tokens"):
            tokens = stated.get(key)
            tokens = list(tokens.values()) if isinstance(tokens, dict) else tokens
            if isinstance(tokens, list):
                found += [name for token in tokens if (name := self._name(key, token))]
        return found

    def missing(self, token_to_id: Any) -> list[str]:
        """Return the special tokens that are not in the vocabulary; they get the next ids.

        Those for padding and the like that no id follows are omitted: nothing uses them.
        """
        order = [key for key in _NAMED if key in self.names]
        used = {self.names.get("bos_token"), self.names.get("eos_token"), *self._extra}
        found = [self.names[key] for key in order if self.names[key]]
        found = [n for n in dict.fromkeys([*found, *self._extra]) if token_to_id(n) is None]
        while found and found[-1] not in used:
            found.pop()
        return found

    @property
    def carried(self) -> dict[str, Any]:
        """Entries of `tokenizer_config.json` that an export keeps."""
        kept = ("chat_template", "model_max_length", "padding_side", "additional_special_tokens")
        return {key: self.config[key] for key in kept if key in self.config}

    # ---- what a text begins with

    def around(self, bos_id: int | None, eos_id: int | None) -> tuple[list[int], list[int]]:
        """Return the ids that `add_bos_token` and `add_eos_token` put before and after a text."""
        states = (self.config.get("add_bos_token"), self.config.get("add_eos_token"))
        before, after = (
            [id] if flag is True and id is not None else []
            for flag, id in zip(states, (bos_id, eos_id), strict=True)
        )
        return before, after

    def begin(self, before: Sequence[int], bos_id: int | None) -> tuple[int, ...]:
        """Return the ids that begin a text: `before`, unless it is recorded otherwise."""
        begins = self.config.get(_BEGINS)
        if isinstance(begins, bool) and begins != bool(before):
            return (bos_id,) if begins and bos_id is not None else ()
        return tuple(before)

    def record_bos(self, begins: bool) -> None:
        """Record whether the documents that a model learns from begin with BOS."""
        self._set(_BEGINS, begins)

    def space_before(self) -> str | None:
        """Return which text of a SentencePiece model gets a space before it.

        The answer depends on the `config.json` of the model, which a copy of the tokenizer lacks.
        So the answer is saved with the tokenizer, and decides from then on.

        Returns:
            "always", "first" (not after a control token), or "never". None means that the
            settings inside the SentencePiece model decide.
        Raises:
            DataError: the saved answer is none of these.
        """
        if _SPACE in self.config:
            if (saved := self.config[_SPACE]) not in _SPACES:
                fact = f"{_SPACE} is {saved!r:.40}; it is null, always, first or never"
                raise self._fault(TOKENIZER_CONFIG, fact)
            return saved if saved is None else str(saved)
        name = self.config.get("tokenizer_class")
        if not isinstance(name, str) or not name.startswith(_LLAMA_TOKENIZERS):
            return None
        space = None
        if self.model_config.get("model_type", "llama") in _LLAMA_MODELS:
            space = "always" if self.config.get("legacy") is True else "first"
            space = "never" if self.config.get("add_prefix_space") is False else space
        self._set(_SPACE, space)
        return space

    def _set(self, key: str, value: Any) -> None:
        self.config = {**self.config, key: value}
        self.files[TOKENIZER_CONFIG] = (json.dumps(self.config, indent=2) + "\n").encode()

    # ---- what ends a text

    def ids(self, key: str) -> list[int]:
        """Return the ids under a key of `generation_config.json`, which may hold one or several."""
        found = self._parse(GENERATION_CONFIG).get(key)
        return [] if found is None else self._ids(GENERATION_CONFIG, key, found)

    def generation(self) -> dict[str, Any]:
        """Return the content of `generation_config.json`, with the ids of `config.json`."""
        return self._parse(GENERATION_CONFIG)

    def generation_with(self, other: Companions) -> dict[str, Any]:
        """Return the content of both. These files win, and any EOS of either ends a text."""
        found = {**other.generation(), **self.generation()}
        ends = [*self.ids("eos_token_id"), *other.ids("eos_token_id")]
        return _with_ids(found, "eos_token_id", ends)

    def _generation_config(self) -> dict[str, Any]:
        found = self._parse(GENERATION_CONFIG)
        for key in _ID_KEYS:
            known = self.ids(key)
            more = self.model_config.get(key)
            if known and key != "eos_token_id":
                continue
            given = [] if more is None else self._ids("config.json", key, more)
            found = _with_ids(found, key, [*known, *given])
        return found

    def _ids(self, file: str, key: str, value: Any) -> list[int]:
        found = value if isinstance(value, list) else [value]
        if key == "eos_token_id" and found == [-1]:  # one way to say that there is none
            return []
        if not all(map(_is_id, found)):
            raise self._fault(file, f"{key} is {value!r:.60}; give an id, or a list of ids")
        return list(found)

    # ---- files

    def _parse(self, name: str, data: bytes | None = None) -> dict[str, Any]:
        data = self.files.get(name, b"{}") if data is None else data
        try:
            found = files.parse_json(data)
        except ValueError as error:
            raise self._fault(name, f"not JSON that can be read: {error}") from None
        if not isinstance(found, dict):
            raise self._fault(name, f"holds {found!r:.40}, not an object")
        return found

    def _fault(self, name: str, fact: str) -> DataError:
        return DataError(f"{(self._folder or Path()) / name}: {fact}; restore the file")


class TokenizerBase:
    """Base of all tokenizers: what they take from the files next to them."""

    _companions: Companions
    bos_id: int | None
    prefix_ids: tuple[int, ...]

    @property
    def generation_config(self) -> dict[str, Any]:
        return self._companions.generation()

    def begin_with_bos(self, begins: bool) -> None:
        self._companions.record_bos(begins)
        self.prefix_ids = self._companions.begin(self.prefix_ids, self.bos_id)


def _with_ids(content: dict[str, Any], key: str, ids: Sequence[int]) -> dict[str, Any]:
    """Return the content with the ids under a key: one, or several, or without the key."""
    ids = list(dict.fromkeys(ids))
    content = {k: v for k, v in content.items() if k != key}
    return content | ({key: ids[0] if len(ids) == 1 else ids} if ids else {})


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def end_ids(eos_id: int | None, more: Sequence[int]) -> tuple[int, ...]:
    """Return every id that ends a text: the tokenizer's EOS first, then those of the model."""
    return tuple(dict.fromkeys([*([] if eos_id is None else [eos_id]), *more]))
