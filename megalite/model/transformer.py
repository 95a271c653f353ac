"""The models: embeddings, one or two stacks of blocks, and a head fused with its loss.

    decoder            a token attends to itself and earlier tokens    predicts the next token
    encoder            a token attends to all tokens                   predicts masked tokens
    encoder_decoder    one text is encoded, another decoded            predicts removed spans

Parameters have the names of Hugging Face's Llama if it has them. Projections that are fused in
memory are an exception.

B batch   T tokens   S tokens of the encoder's text   D width   V vocabulary   C labels
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from megalite import arch
from megalite.config import ModelConfig
from megalite.model.cache import Cache
from megalite.model.heads import Classifier, Head, Transform
from megalite.model.linear import Linear, VocabularyEmbedding
from megalite.model.matmul import Matmul, matmul, small_batch_linear, to_column_major
from megalite.model.norms import RMSNorm
from megalite.model.regions import ONE_DEVICE, Regions
from megalite.model.stack import Block, Memory, Stack

_T = TypeVar("_T")


class EncoderDecoder(nn.Module):
    """An encoder and a decoder, which share the token embeddings."""

    def __init__(self, config: ModelConfig, regions: Regions) -> None:
        super().__init__()
        first, second = arch.stacks(config).values()
        self.embed_tokens = VocabularyEmbedding(config, regions)
        self.encoder = Stack(config, regions, first, embeds=False, causal=False)
        self.decoder = Stack(config, regions, second, embeds=False, causal=True, cross=True)

    def encode(self, inputs: Mapping[str, Tensor]) -> Memory:
        """Return the hidden states of the encoder's text, [B, S, D], and their attention mask."""
        memory_BSD = self.encoder(inputs["input_ids"], inputs, self.embed_tokens)
        keys = inputs.get("attention_mask")
        return memory_BSD, None if keys is None else keys[:, None, None, :]

    def decode(self, ids_BT: Tensor, memory: Memory, cache: Cache | None = None) -> Tensor:
        """Return the hidden states of the decoder's text: [B, T, D].

        Args:
            memory: the output of `encode`.
        """
        hidden: Tensor = self.decoder(ids_BT, {}, self.embed_tokens, memory, cache)
        return hidden


class LanguageModel(nn.Module):
    """A model with a head for tokens or labels.

    `forward` runs a function of the model, so that an engine's hooks (ZeRO-3) gather the weights
    that the function uses. Engines compute objectives and scores through `forward`.

    Args:
        config: configuration of the whole model.
        regions: exchanges between the ranks that share the model. The default is one device.
    Attributes:
        config: configuration of this rank's part.
    """

    model: Stack | EncoderDecoder

    def __init__(self, config: ModelConfig, regions: Regions = ONE_DEVICE) -> None:
        super().__init__()
        config = regions.shard_config(config)
        self.config = config
        self.regions = regions
        self._matmul: Matmul = matmul
        if config.architecture == "encoder_decoder":
            self.model = EncoderDecoder(config, regions)
        else:
            causal = config.architecture == "decoder"
            layers = config.num_hidden_layers
            self.model = Stack(config, regions, layers, embeds=True, causal=causal)
        self.lm_transform = None
        if config.num_labels:
            self.score = Classifier(config)
            return
        encodes = config.architecture == "encoder"
        if encodes:
            self.lm_transform = Transform(config)
        self.lm_head = Head(config, regions, bias=encodes)

    @property
    def blocks(self) -> Iterator[Block]:
        """Blocks of all stacks."""
        for name in arch.stacks(self.config):
            yield from self.get_submodule(name).layers  # type: ignore[misc]

    def forward(
        self, function: Callable[[LanguageModel, Mapping[str, Tensor]], _T], batch: Any
    ) -> _T:
        """Return `function(model, batch)`.

        Args:
            function: an objective's `loss`, or a method such as `LanguageModel.label_scores`.
            batch: see `hidden`.
        """
        return function(self, batch)

    def hidden(self, batch: Mapping[str, Tensor], cache: Cache | None = None) -> Tensor:
        """Return the hidden states of the tokens that have labels: [B, T, D].

        Args:
            batch: input_ids int64 [B, T]. If needed, position_ids and document_ids int64 [B, T],
                attention_mask (bool [B, T], tokens that are attended to) and token_type_ids int64
                [B, T]. With two stacks, input_ids are the encoder's and decoder_input_ids the
                decoder's.
            cache: keys and values of earlier tokens, to which those of these tokens are added.
        """
        if isinstance(self.model, EncoderDecoder):
            return self.model.decode(batch["decoder_input_ids"], self.model.encode(batch), cache)
        hidden: Tensor = self.model(batch["input_ids"], batch, cache=cache)
        return hidden

    def token_loss(
        self,
        hidden_BTD: Tensor,
        batch: Mapping[str, Tensor],
        *,
        smoothing: float = 0.0,
        compiled: bool = False,
    ) -> Tensor:
        """Return the sum of the cross entropy over the batch's unmasked targets.

        Args:
            hidden_BTD: output of `hidden`.
            batch: see `hidden`. Also contains labels int64 [B, T] and loss_mask bool [B, T]
                (whether a label counts). If few labels count, it contains target_rows int64 [R]:
                the rows of [B x T] that the head computes.
            smoothing: share of each target that is spread over the vocabulary in training.
            compiled: whether to compile the operations between the head's matrix products.
        Returns:
            fp32 scalar, in nats.
        """
        loss: Tensor = self.lm_head(
            Head.loss,
            self._head_input(hidden_BTD),
            self._tied_weight,
            batch["labels"],
            batch["loss_mask"],
            rows_R=batch.get("target_rows"),
            smoothing=smoothing,
            compiled=compiled,
        )
        return loss

    def label_scores(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the fp32 logits of the labels: [B, C].

        Args:
            batch: see `hidden`. Also contains lengths int64 [B], the number of tokens of each
                sample; padding follows them.
        """
        scores: Tensor = self.score(self.regions.gather(self.hidden(batch)), batch["lengths"])
        return scores

    def next_scores(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the fp32 logits of the token after each text: [B, V].

        Args:
            batch: see `hidden`. Also contains lengths int64 [B], the number of tokens of each text.
        """
        hidden_BTD = self.regions.gather(self.hidden(batch))
        lengths_B = batch["lengths"]
        rows_B = torch.arange(len(lengths_B), device=lengths_B.device)
        last_BD = self._head_input(hidden_BTD[rows_B, lengths_B - 1])
        logits_BV: Tensor = self.lm_head(Head.logits, last_BD, self._tied_weight)
        return self.regions.gather_vocabulary(logits_BV.float())

    def logits(self, inputs: Tensor | Mapping[str, Tensor], *, last_only: bool = False) -> Tensor:
        """Return fp32 logits: [B, T, V], or [B, V] with `last_only`.

        Args:
            inputs: input_ids [B, T], or a batch (see `hidden`).
            last_only: if true, compute only the last token's logits.
        """
        batch = {"input_ids": inputs} if isinstance(inputs, Tensor) else inputs
        hidden_BTD = self.hidden(batch)
        return self.scores(hidden_BTD[:, -1] if last_only else hidden_BTD)

    def scores(self, hidden: Tensor) -> Tensor:
        """Return the fp32 logits of hidden states: [..., D] -> [..., V]."""
        logits = self._matmul(self._head_input(hidden), self.head_weight, self.lm_head.bias)
        return self.regions.gather_vocabulary(logits.float())

    @property
    def head_weight(self) -> nn.Parameter:
        """Weight of the head: [V, D]."""
        weight = self.lm_head.weight if self._tied_weight is None else self._tied_weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def prepare_for_decoding(self) -> None:
        """Choose the weight layout and the kernels that are fastest for few rows on a CPU in fp32.

        Values and shapes stay the same. On other devices and in other precisions, do nothing.
        """
        for parameter in self.parameters():
            if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
                return
        # with several tensor ranks, the blocks keep the usual kernel
        product = small_batch_linear if self.regions.size == 1 else matmul
        for module in self.modules():
            if isinstance(module, Linear):
                module.prepare_for_decoding(product)
            elif isinstance(module, RMSNorm):
                module.prepare_for_decoding()
        to_column_major(self.head_weight)
        self._matmul = small_batch_linear

    @property
    def _tied_weight(self) -> nn.Parameter | None:
        """The embedding's weight if the head uses it too, else None."""
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else None

    def _head_input(self, hidden: Tensor) -> Tensor:
        if self.lm_transform is not None:
            hidden = self.lm_transform(hidden)
        scale = self.config.logits_scaling
        return hidden if scale == 1 else hidden / scale


def last_scores(model: LanguageModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the logits of each sample's labels, [B, C], or of the token after each text, [B, V].

    Args:
        batch: see `LanguageModel.label_scores` and `LanguageModel.next_scores`.
    """
    scores = model.label_scores if model.config.num_labels else model.next_scores
    return scores(batch)


def build(config: ModelConfig, regions: Regions = ONE_DEVICE) -> LanguageModel:
    """Build an uninitialised model with the parameters that `megalite.arch` lists, in its order.

    Args:
        config: configuration of the whole model.
        regions: exchanges between the ranks that share the model. The default is one device.
    """
    model = LanguageModel(config, regions)
    built = [name for name, _ in model.named_parameters()]
    table = [parameter.name for parameter in arch.parameters(config)]
    assert built == table, f"model and table of parameters differ: {set(built) ^ set(table)}"
    return model
