"""Settings of a tokenizer from the files in its folder: special tokens, added tokens, end ids.

As in `transformers`, `special_tokens_map.json` and `added_tokens.json` count only if
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
_SAVED = (
    TOKENIZER_CONFIG,
    _TOKENS_MAP,
    _ADDED_TOKENS,
    GENERATION_CONFIG,
    "chat_template.jinja",
)
# MegaLite's own key of tokenizer_config.json: the shards were made with --bos (or --no-bos).
_BEGINS = "megalite_documents_begin_with_bos"
# MegaLite's own key of tokenizer_config.json: the result of `prepend_scheme`.
_SPACE = "megalite_space_before_text"
_SPACES = (None, "always", "first", "never")
_ROLES = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# Tokenizers (or model types) that put EOS after a text although no file says so.
_END_WITH_EOS = ("t5", "mt5", "umt5")
# Tokenizers and models for which transformers ignores the SentencePiece model's prefix setting.
_LLAMA_TOKENIZERS = ("LlamaTokenizer", "CodeLlamaTokenizer")
_LLAMA_MODELS = ("llama", "code_llama")
_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Usual names of BOS and EOS, for folders in which no file names them; BERT's are last.
_USUAL_NAMES = {
    "bos_token": ("<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>", "[CLS]"),
    "eos_token": ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>", "[SEP]"),
    "pad_token": (),
}


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched in the text before the vocabulary's model encodes the rest."""

    id: int
    content: str
    special: bool
    normalized: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class TokenizerSettings:
    """Settings from the files in a tokenizer's folder, of which all may be missing.

    Attributes:
        files: names and contents of the files that are saved with the tokenizer.
        config: the content of `tokenizer_config.json`.
        model_config: the content of the `config.json` of the folder's model.
    Raises:
        DataError: a file has invalid content.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self.files: dict[str, bytes] = {}
        self.config: Mapping[str, Any] = {}
        self.model_config: Mapping[str, Any] = {}
        if folder is None:
            return
        for name in _SAVED:
            if (folder / name).is_file():
                self.files[name] = (folder / name).read_bytes()
        with suppress(DataError, OSError):  # the reader of the model reports its faults
            self.model_config = self._parse("config.json", (folder / "config.json").read_bytes())
        self.config = self._parse(TOKENIZER_CONFIG)
        kind = str(self.config.get("tokenizer_class") or self.model_config.get("model_type"))
        if kind.lower().startswith(_END_WITH_EOS):
            self._set("add_eos_token", self.config.get("add_eos_token", True))
        if ids := self._generation_config():
            self.files[GENERATION_CONFIG] = (json.dumps(ids, indent=2) + "\n").encode()

    def save(self, folder: Path) -> None:
        """Write the files to an existing folder."""
        for name, data in self.files.items():
            (folder / name).write_bytes(data)

    # ---- names

    @cached_property
    def names(self) -> dict[str, Any]:
        """Names of special tokens by key. None means that there is no such token."""
        entries = dict(self.config)
        if "added_tokens_decoder" not in self.config:
            entries |= self._parse(_TOKENS_MAP)
        return {
            key: self._name(key, value)
            for key, value in entries.items()
            if key in _ROLES or (key.endswith("_token") and isinstance(value, str))
        }

    def find(self, key: str, token_to_id: Any) -> int | None:
        """Return the id of `bos_token`, `eos_token` or `pad_token`, or None if there is none.

        Args:
            token_to_id: function that returns a name's id, or None if the vocabulary lacks it.
        """
        if key in self.names:
            name = self.names[key]
            return None if name is None else token_to_id(name)
        ids = self.ids(f"{key}_id")
        usual = (token_to_id(name) for name in _USUAL_NAMES[key])
        return ids[0] if ids else next((id for id in usual if id is not None), None)

    @cached_property
    def added_tokens(self) -> list[AddedToken]:
        """Tokens that were added to the vocabulary, sorted by id."""
        if "added_tokens_decoder" in self.config:
            decoder = self.config["added_tokens_decoder"]
            return sorted(self._parse_decoder(decoder), key=lambda token: token.id)
        special = self.special_names
        tokens = list[AddedToken]()
        for name, id in self._parse(_ADDED_TOKENS).items():
            if not _is_id(id):
                raise self._fault(_ADDED_TOKENS, f"{name!r} has the id {id!r}; ids are 0 or more")
            tokens.append(AddedToken(id, name, name in special, name not in special))
        return sorted(tokens, key=lambda token: token.id)

    def _parse_decoder(self, decoder: Any) -> list[AddedToken]:
        tokens = list[AddedToken]()
        try:
            for id, token in decoder.items():
                flags = ("special", "normalized", "lstrip", "rstrip", "single_word")
                content = token["content"]
                if not isinstance(content, str) or not content:
                    raise ValueError(f"{content!r} is not a token")
                flag_values = {flag: bool(token.get(flag, False)) for flag in flags}
                tokens.append(AddedToken(int(id), content, **flag_values))
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise self._fault(TOKENIZER_CONFIG, f"added_tokens_decoder: {error}") from None
        return tokens

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
        """Names of all special tokens in the files."""
        names = [name for name in self.names.values() if name]
        return list(dict.fromkeys([*names, *self._extra]))

    @cached_property
    def _extra(self) -> list[str]:
        """Names of special tokens without a role."""
        entries = dict(self.config)
        names = list[str]()
        if "added_tokens_decoder" not in self.config:
            entries |= self._parse(_TOKENS_MAP)
        for key in ("additional_special_tokens", "extra_special_tokens"):
            tokens = entries.get(key)
            tokens = list(tokens.values()) if isinstance(tokens, dict) else tokens
            if isinstance(tokens, list):
                names += [name for token in tokens if (name := self._name(key, token))]
        return names

    def missing(self, token_to_id: Any) -> list[str]:
        """Return the special tokens that the vocabulary lacks, in the order of their new ids.

        Unused tokens, such as padding, are omitted at the end, so that they get no id.
        """
        order = [key for key in _ROLES if key in self.names]
        used = {self.names.get("bos_token"), self.names.get("eos_token"), *self._extra}
        names = [self.names[key] for key in order if self.names[key]]
        names = [n for n in dict.fromkeys([*names, *self._extra]) if token_to_id(n) is None]
        while names and names[-1] not in used:
            names.pop()
        return names

    @property
    def exported_entries(self) -> dict[str, Any]:
        """Entries of `tokenizer_config.json` that an export keeps."""
        keys = ("chat_template", "model_max_length", "padding_side", "additional_special_tokens")
        return {key: self.config[key] for key in keys if key in self.config}

    # ---- the beginning of a text

    def around(self, bos_id: int | None, eos_id: int | None) -> tuple[list[int], list[int]]:
        """Return the ids that `add_bos_token` and `add_eos_token` put before and after a text."""
        flags = (self.config.get("add_bos_token"), self.config.get("add_eos_token"))
        before, after = (
            [id] if flag is True and id is not None else []
            for flag, id in zip(flags, (bos_id, eos_id), strict=True)
        )
        return before, after

    def begin(self, before: Sequence[int], bos_id: int | None) -> tuple[int, ...]:
        """Return the ids before a text: BOS or none if `record_bos` was called, else `before`."""
        begins = self.config.get(_BEGINS)
        if isinstance(begins, bool) and begins != bool(before):
            return (bos_id,) if begins and bos_id is not None else ()
        return tuple(before)

    def record_bos(self, begins: bool) -> None:
        """Record whether training documents begin with BOS."""
        self._set(_BEGINS, begins)

    def prepend_scheme(self) -> str | None:
        """Return which texts of a SentencePiece model get a space before them.

        The result depends on the model's `config.json`, which a copy of the tokenizer lacks. It is
        therefore saved with the tokenizer.

        Returns:
            "always", "first" (not after a control token), or "never". None means the setting in the
            SentencePiece model.
        Raises:
            DataError: the saved value is none of these.
        """
        if _SPACE in self.config:
            if (saved := self.config[_SPACE]) not in _SPACES:
                fact = f"{_SPACE} is {saved!r:.40}, not null, always, first or never"
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

    # ---- the end of a text

    def ids(self, key: str) -> list[int]:
        """Return the ids under a key of `generation_config.json`: none, one or several."""
        value = self._parse(GENERATION_CONFIG).get(key)
        return [] if value is None else self._ids(GENERATION_CONFIG, key, value)

    def generation(self) -> dict[str, Any]:
        """Return the content of `generation_config.json`, with the ids of `config.json`."""
        return self._parse(GENERATION_CONFIG)

    def merge_generation(self, other: TokenizerSettings) -> dict[str, Any]:
        """Return the generation settings of both, with the EOS ids of both.

        The settings of `self` have priority.
        """
        merged = {**other.generation(), **self.generation()}
        ends = [*self.ids("eos_token_id"), *other.ids("eos_token_id")]
        return _with_ids(merged, "eos_token_id", ends)

    def _generation_config(self) -> dict[str, Any]:
        content = self._parse(GENERATION_CONFIG)
        for key in _ID_KEYS:
            ids = self.ids(key)
            value = self.model_config.get(key)
            if ids and key != "eos_token_id":
                continue
            model_ids = [] if value is None else self._ids("config.json", key, value)
            content = _with_ids(content, key, [*ids, *model_ids])
        return content

    def _ids(self, file: str, key: str, value: Any) -> list[int]:
        ids = value if isinstance(value, list) else [value]
        if key == "eos_token_id" and ids == [-1]:  # some models write -1 for no EOS
            return []
        if not all(map(_is_id, ids)):
            raise self._fault(file, f"{key} is {value!r:.60}, not an id or a list of ids")
        return list(ids)

    # ---- files

    def _parse(self, name: str, data: bytes | None = None) -> dict[str, Any]:
        data = self.files.get(name, b"{}") if data is None else data
        try:
            content = files.parse_json(data)
        except ValueError as error:
            raise self._fault(name, f"not valid JSON: {error}") from None
        if not isinstance(content, dict):
            raise self._fault(name, f"contains {content!r:.40}, not an object")
        return content

    def _fault(self, name: str, fact: str) -> DataError:
        return DataError(f"{(self._folder or Path()) / name}: {fact}; restore the file")


class TokenizerBase:
    """Base class of all tokenizers, with the methods that depend on the settings only."""

    _settings: TokenizerSettings
    bos_id: int | None
    prefix_ids: tuple[int, ...]

    @property
    def generation_config(self) -> dict[str, Any]:
        return self._settings.generation()

    def begin_with_bos(self, begins: bool) -> None:
        self._settings.record_bos(begins)
        self.prefix_ids = self._settings.begin(self.prefix_ids, self.bos_id)


def _with_ids(content: dict[str, Any], key: str, ids: Sequence[int]) -> dict[str, Any]:
    """Return the content with a key set to an id or a list of ids, or removed without ids."""
    ids = list(dict.fromkeys(ids))
    content = {k: v for k, v in content.items() if k != key}
    return content | ({key: ids[0] if len(ids) == 1 else ids} if ids else {})


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def end_ids(eos_id: int | None, more: Sequence[int]) -> tuple[int, ...]:
    """Return all ids that end a text: the tokenizer's EOS first, then the model's."""
    return tuple(dict.fromkeys([*([] if eos_id is None else [eos_id]), *more]))
