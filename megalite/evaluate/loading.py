"""Loading of a checkpoint or a Hugging Face folder as a model, without its run file.

B prompts   T tokens   V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megalite import arch, hub
from megalite.checkpoint import (
    HuggingFaceFolder,
    StoredCheckpoint,
    TensorSource,
    is_huggingface,
    load_into,
    merge_lora,
    open_checkpoint,
)
from megalite.config import ModelConfig, RunConfig, allowed_tensor_sizes, load_stored
from megalite.data import Batch
from megalite.errors import CheckpointError, CommandError, MegaLiteError
from megalite.evaluate.generate import Decoder, UncachedDecoder
from megalite.log import logger
from megalite.mesh import WHOLE
from megalite.model import (
    ONE_DEVICE,
    Cache,
    EncoderDecoder,
    LanguageModel,
    build,
    plain_objective,
)
from megalite.parallel import Grid, make_regions
from megalite.tokenizers.tokenizer import Tokenizer, encode_text, load_tokenizer


@dataclass(frozen=True)
class LoadedModel:
    """A model with its configuration and tokenizer.

    Attributes:
        config: configuration of the whole model.
        local: configuration of this rank's part.
        run: run file of the training. None for a Hugging Face folder.
    """

    folder: Path
    config: ModelConfig
    local: ModelConfig
    run: RunConfig | None
    model: LanguageModel
    tokenizer: Tokenizer
    tokenizer_folder: Path
    tokenizer_sha256: str
    device: torch.device
    data_fingerprint: str = ""

    def last_logits(self, ids_1T: Tensor) -> Tensor:
        """Return the logits of the token after `ids`: fp32 [1, V].

        Only the last tokens, as many as the model's window has, are read.
        """
        self.check_ids(ids_1T)
        window = self.config.max_position_embeddings
        return self.model.logits(ids_1T[:, -window:].to(self.device), last_only=True)

    def decoder(self) -> Decoder:
        """Return a decoder with a cache.

        Raises:
            CommandError: the model does not generate text.
        """
        if self.config.architecture == "encoder" or self.config.num_labels:
            kind = "a classifier" if self.config.num_labels else "an encoder"
            raise CommandError(
                f"{self.folder} is {kind}, which does not generate text; give a decoder or an "
                "encoder_decoder"
            )
        self.model.prepare_for_decoding()
        return CachedDecoder(self)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a prompt.

        Raises:
            CommandError: the text is not UTF-8, or has a token that the model does not have.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise CommandError(f"the prompt {text!r} is not UTF-8 text; give UTF-8 text") from None
        ids = encode_text(self.tokenizer, text)
        self.check_ids(ids)
        return ids

    def check_prompt(self, prompt: str) -> None:
        """Check a prompt as `encode` does, and warn if it is longer than the window."""
        length = len(self.encode(prompt))
        window = self.config.max_position_embeddings
        if length > window:
            logger.warning("a prompt of %d tokens: the model reads the last %d", length, window)

    def check_ids(self, ids: Sequence[int] | Tensor) -> None:
        """Check that the model has embeddings for all ids.

        Raises:
            CommandError: the model has no embedding for an id. The message names its token.
        """
        size = self.config.vocab_size
        if self.tokenizer.vocab_size <= size:
            return
        values = ids.flatten().tolist() if isinstance(ids, Tensor) else ids
        if (unknown := next((id for id in values if id >= size), None)) is not None:
            raise CommandError(
                f"the text holds the token {self.tokenizer.pieces()[unknown]!r} of id {unknown}, "
                f"but the model has {size} ids, 0 to {size - 1}; remove the token, or "
                "fine-tune the model with megalite finetune --init-from, which adds rows for it"
            )

    @property
    def micro_batch_size(self) -> int:
        """Samples of a batch for evaluation: those of the model's run, or 8 without a run."""
        return self.run.training.micro_batch_size if self.run else 8

    @property
    def is_finetuned(self) -> bool:
        """Whether the model comes from a fine-tuning run."""
        return self.run is not None and self.run.finetune is not None

    @property
    def suffix_ids(self) -> Sequence[int]:
        """Ids at the end of an encoder's text: the tokenizer's, or EOS of a fine-tuned model."""
        eos = self.tokenizer.eos_id
        eos_ids = (eos,) if self.is_finetuned and eos is not None else ()
        return self.tokenizer.suffix_ids or eos_ids

    @torch.no_grad()
    def loss(self, batch: Batch) -> Tensor:
        """Return the summed loss of a batch: fp32 scalar, nats."""
        self._check_batch(batch)
        objective = plain_objective(self.config)
        return objective.loss(self.model, batch.to(self.device).tensors).total

    @torch.no_grad()
    def scores(self, batch: Batch) -> Tensor:
        """Return a classifier's logits of a batch: fp32 [B, C]."""
        self._check_batch(batch)
        return self.model.label_scores(batch.to(self.device).tensors)

    def _check_batch(self, batch: Batch) -> None:
        for name in ("input_ids", "decoder_input_ids"):
            if (ids := batch.tensors.get(name)) is not None:
                self.check_ids(ids)

    @torch.no_grad()
    def count_correct(self, batch: Batch) -> int:
        """Return how many of a batch's targets are the most likely tokens at their positions."""
        tensors = batch.to(self.device).tensors
        mask = tensors["loss_mask"]
        likeliest = self.model.scores(self.model.hidden(tensors)[mask]).argmax(dim=-1)
        return int((likeliest == tensors["labels"][mask]).sum())


class CachedDecoder:
    """Decoder with a KV cache, so that each token is computed once.

    Prompts are padded on the left. If a text is longer than the model's window, the last tokens are
    computed again for each new token.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._model = loaded.model
        self._window = loaded.config.max_position_embeddings
        self.continues = loaded.config.architecture == "decoder"
        self.suffix_ids = loaded.suffix_ids
        # Ids beyond the tokenizer's vocabulary are padding and never chosen. Exceptions: an
        # imported folder must give the text of transformers, and the last ids of an
        # encoder_decoder stand for spans.
        trims = self.continues and loaded.run is not None
        self._chosen = slice(loaded.tokenizer.vocab_size if trims else None)
        self._beyond: UncachedDecoder | None = None

    def begin(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Tensor:
        return self._begin(prompts, new_tokens)[:, self._chosen]

    def next(self, tokens: Sequence[int]) -> Tensor:
        return self._next(tokens)[:, self._chosen]

    def _begin(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Tensor:
        device = self._loaded.device
        window = self._window
        for prompt in prompts:
            self._loaded.check_ids(prompt)
        prompts = [list(prompt)[-window:] for prompt in prompts]
        length = max(map(len, prompts))
        keys = torch.zeros(len(prompts), length, dtype=torch.bool)
        ids = torch.zeros(keys.shape, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            place = slice(length - len(prompt), None) if self.continues else slice(len(prompt))
            keys[row, place] = True
            ids[row, place] = torch.tensor(prompt)
        self._keys = None if bool(keys.all()) else keys.to(device)
        ids = ids.to(device)
        self._beyond = None  # a decoder may be used again
        self._texts = [list(prompt) for prompt in prompts]
        if not self.continues:
            return self._answer(ids, new_tokens)
        self._cache = self._make_cache(len(prompts), min(length + new_tokens, window))
        return self._read(ids)

    def _next(self, tokens: Sequence[int]) -> Tensor:
        if self._beyond is not None:
            return self._beyond.next(tokens)
        for text, token in zip(self._texts, tokens, strict=True):
            text.append(token)
        if self.continues and self._cache.length == self._window:
            self._beyond = UncachedDecoder(self._loaded.last_logits)
            return self._beyond.begin(self._texts, 0)
        ids = torch.tensor(tokens, device=self._loaded.device)[:, None]
        if self._keys is not None and self.continues:
            self._keys = torch.cat((self._keys, torch.ones_like(ids, dtype=torch.bool)), dim=1)
        return self._read(ids)

    def _read(self, ids_BT: Tensor) -> Tensor:
        model = self._model.model
        if isinstance(model, EncoderDecoder):
            hidden = model.decode(ids_BT, self._memory, self._cache)
            return self._model.scores(hidden[:, -1])
        inputs = {"input_ids": ids_BT}
        if self._keys is not None:
            inputs["attention_mask"] = self._keys
            positions = (self._keys.long().cumsum(dim=1) - 1).clamp_min(0)
            inputs["position_ids"] = positions[:, -ids_BT.shape[1] :]
        return self._model.scores(self._model.hidden(inputs, self._cache)[:, -1])

    def _answer(self, ids_BS: Tensor, new_tokens: int) -> Tensor:
        model = self._model.model
        config = self._loaded.config
        assert isinstance(model, EncoderDecoder)
        inputs = {"input_ids": ids_BS}
        if self._keys is not None:
            inputs["attention_mask"] = self._keys
        self._memory = model.encode(inputs)
        self._cache = self._make_cache(len(ids_BS), new_tokens + 1)
        first = torch.full((len(ids_BS), 1), config.decoder_start_token_id, device=ids_BS.device)
        return self._read(first)

    def _make_cache(self, batch: int, tokens: int) -> Cache:
        local = self._loaded.local
        layers = list(arch.stacks(local).values())[-1]
        parameter = next(self._model.parameters())
        return Cache(
            local,
            layers,
            batch=batch,
            tokens=tokens,
            dtype=parameter.dtype,
            device=parameter.device,
        )


def open_model(path: str | Path, grid: Grid | None = None) -> LoadedModel:
    """Return the model of a step folder, a run folder, or a Hugging Face folder, in fp32.

    If `path` is a run folder, its newest checkpoint is used, or a fine-tuned run's best one.

    Args:
        path: a folder, or the name of a model on the hub.
        grid: grid whose tensor ranks share the model. None means that this process has all of it.
    Raises:
        CommandError: there is no model, or the ranks cannot share it.
        CheckpointError: the checkpoint is damaged.
    """
    path = hub.find_model(path, "--checkpoint")
    run: RunConfig | None = None
    sha256 = data = ""
    stored: TensorSource
    if is_huggingface(path):
        stored = weights = HuggingFaceFolder(path)
        weights.require_head()
        weights.log_ignored()
        folder = tokenizer_folder = weights.path
        config = weights.section
    else:
        folder, manifest = open_checkpoint(path, weights_only=True)
        try:
            run = load_stored(folder / "config.json")
        except MegaLiteError as error:
            raise CheckpointError(str(error)) from None
        stored, config = merge_lora(StoredCheckpoint(folder, manifest), run.model)
        tokenizer_folder = folder / "tokenizer"
        sha256 = manifest.tokenizer_sha256
        data = manifest.data_fingerprint
    at = grid.at if grid else WHOLE
    size = at.mesh.tensor
    allowed = allowed_tensor_sizes(config)
    if size not in allowed:
        raise CommandError(
            f"{size} ranks cannot share this model; use one of {allowed} tensor ranks"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = grid.device if grid else device
    regions = make_regions(config, grid) if grid else ONE_DEVICE
    with device:
        model = build(config, regions)
    load_into(model, config, stored, at)
    model.eval()
    tokenizer = load_tokenizer(tokenizer_folder)
    _compare_vocabularies(folder, config, tokenizer)
    return LoadedModel(
        folder=folder,
        config=config,
        local=model.config,
        run=run,
        model=model,
        tokenizer=tokenizer,
        tokenizer_folder=tokenizer_folder,
        tokenizer_sha256=sha256,
        device=device,
        data_fingerprint=data,
    )


def _compare_vocabularies(folder: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Report tokens that the model lacks, and ids that the tokenizer adds to texts."""
    size = config.vocab_size
    if tokenizer.vocab_size > size:
        names = [f"{name!r} ({id})" for id, name in enumerate(tokenizer.pieces()) if id >= size]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        refused = ", ".join(names[:3]) + more
        logger.warning(
            "%s: the tokenizer has %d ids, the model %d; text with %s is refused",
            folder,
            tokenizer.vocab_size,
            size,
            refused,
        )
    pieces = tokenizer.pieces() if tokenizer.prefix_ids or tokenizer.suffix_ids else []
    before, after = (
        " ".join(pieces[id] for id in ids) for ids in (tokenizer.prefix_ids, tokenizer.suffix_ids)
    )
    if before:
        logger.info("%s: texts begin with %s, which the tokenizer adds", folder, before)
    if after and config.architecture == "decoder":
        logger.warning(
            "%s: the tokenizer ends every text with %s; prompts must continue, so it is omitted",
            folder,
            after,
        )
