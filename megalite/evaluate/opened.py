"""A checkpoint as a model to use: on one device, without an engine, from its folder alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megalite.checkpoint import fill_model, open_checkpoint
from megalite.config import RunConfig, load_config
from megalite.data import Batch
from megalite.errors import CheckpointError, CommandError, MegaLiteError
from megalite.formats.checkpoint import Manifest
from megalite.formats.tokenizer import Tokenizer, load_tokenizer
from megalite.log import logger
from megalite.model import CausalLM, build


@dataclass(frozen=True)
class OpenedModel:
    """A model with the configuration and the tokenizer it was trained with."""

    folder: Path
    config: RunConfig
    model: CausalLM
    tokenizer: Tokenizer
    manifest: Manifest
    device: torch.device

    def last_logits(self, ids_1T: Tensor) -> Tensor:
        """Scores of the token after `ids`, fp32 [1, V]; reads no further back than the window."""
        window = self.config.model.max_position_embeddings
        return self.model.logits(ids_1T[:, -window:].to(self.device), last_only=True)

    def check_prompt(self, prompt: str) -> None:
        """Refuse text that is no UTF-8; say so where a prompt is longer than the window."""
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise CommandError(f"the prompt {prompt!r} is not UTF-8 text; give text") from None
        length, window = (
            len(self.tokenizer.encode(prompt)),
            self.config.model.max_position_embeddings,
        )
        if length > window:
            logger.warning("a prompt of %d tokens: the model reads the last %d", length, window)

    @torch.no_grad()
    def loss(self, batch: Batch) -> Tensor:
        """Summed loss of a batch: fp32 scalar, nats."""
        loss: Tensor = self.model(batch.to(self.device).tensors)
        return loss


def open_model(path: str | Path) -> OpenedModel:
    """The model of a step folder, or of a run folder's newest checkpoint, in fp32.

    Raises:
        CommandError: no checkpoint there.
        CheckpointError: damaged.
    """
    if not Path(path).is_dir():
        raise CommandError(f"--checkpoint {path}: no such folder; give a step or a run folder")
    folder, manifest = open_checkpoint(Path(path), weights_only=True)
    try:
        config = load_config(folder / "config.json")
    except MegaLiteError as error:
        raise CheckpointError(f"{folder}/config.json: {error}") from None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        model = build(config.model)
    fill_model(model, config.model, folder, manifest)
    model.eval()
    tokenizer = load_tokenizer(folder / "tokenizer")
    return OpenedModel(folder, config, model, tokenizer, manifest, device)
