"""The options of `tokenize`, and which of them decide the shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megalite.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenizeOptions:
    """The arguments of `tokenize`.

    Attributes:
        workers: number of workers of each rank.
        bos: whether documents begin with BOS. None means as the tokenizer's settings say.
        valid_fraction: fraction of the documents to write to `valid_output`.
    """

    inputs: Sequence[str]
    tokenizer: str
    output: Path
    text_field: str = "text"
    shard_tokens: int = 100_000_000
    workers: int = 1
    max_bad_records: int = 0
    bos: bool | None = None
    eos: bool = True
    deduplicate: bool = False
    streaming: bool = True
    lossy: bool = False
    valid_fraction: float | None = None
    valid_output: Path | None = None

    @property
    def hashes(self) -> bool:
        """Whether parts contain a hash of each document."""
        return self.deduplicate or self.valid_fraction is not None

    def recorded(self) -> dict[str, Any]:
        """Return the options that decide the shards, for the manifest."""
        options = asdict(self)
        del options["output"], options["workers"], options["valid_output"]
        if self.valid_fraction is None:
            del options["valid_fraction"]
        return {**options, "inputs": list(self.inputs)}

    def request(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return the options that must be equal for a run to use the parts of another."""
        begins = bool(tokenizer.prefix_ids) if self.bos is None else self.bos
        request = self.recorded() | {"tokenizer": tokenizer.sha256, "bos": begins}
        if self.valid_output is not None:
            request["valid_output"] = str(self.valid_output)
        del request["max_bad_records"]
        return request
