"""The `model` section of a run file: the network, part by part."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from megalite import registry
from megalite.config.fields import Count, CountOrZero, Positive, Section, Share, SmallCount
from megalite.config.finetune import AdapterConfig
from megalite.config.names import NameOf


def _head_dim(data: dict[str, int]) -> int:
    """Return the default head width. Fields that failed validation are missing from `data`."""
    return max(1, data.get("hidden_size", 1) // data.get("num_attention_heads", 1))


# Kinds of attention of a layer, by Hugging Face's names.
LayerType = Literal["full_attention", "sliding_attention"]


class RopeScalingConfig(Section):
    """RoPE scaling: longer wavelengths for longer sequences, in Hugging Face's keys."""

    rope_type: Literal["linear", "llama3", "yarn"] = Field(
        description="Which wavelengths are scaled. linear: all equally. llama3: the long ones. "
        "yarn: by the number of rotations within the original length (arXiv 2309.00071).",
        examples=["linear"],
    )
    factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(
        description="Ratio of the new context length to the original one.", examples=[8.0]
    )
    original_max_position_embeddings: Count | None = Field(
        default=None,
        description="Original context length, in tokens. Required by llama3 and yarn.",
    )
    low_freq_factor: Positive = Field(
        default=1.0,
        description="llama3: wavelengths with fewer rotations than this within the original "
        "length are scaled.",
    )
    high_freq_factor: Positive = Field(
        default=4.0,
        description="llama3: wavelengths with more rotations than this within the original length "
        "are unchanged.",
    )
    beta_fast: Positive = Field(
        default=32.0,
        description="yarn: wavelengths with more rotations than this within the original length "
        "are unchanged.",
    )
    beta_slow: Positive = Field(
        default=1.0,
        description="yarn: wavelengths with fewer rotations than this within the original length "
        "are scaled.",
    )
    attention_factor: Positive | None = Field(
        default=None,
        description="yarn: factor of queries and keys. null means 0.1 ln(factor) + 1.",
    )


class ModelConfig(Section):
    """The network; keys have Hugging Face's names if it has one."""

    architecture: Literal["decoder", "encoder", "encoder_decoder"] = Field(
        default="decoder",
        description="decoder: causal attention. encoder: attention in both directions, as in BERT. "
        "encoder_decoder: an encoder for the source text and a causal decoder for the target, as "
        "in T5.",
    )
    vocab_size: Count = Field(
        description="Tokens in the vocabulary, as the tokenizer counts them (not padded).",
        examples=[32000],
    )
    hidden_size: Count = Field(
        description="Width of the residual stream, in elements.", examples=[2048]
    )
    intermediate_size: Count = Field(
        description="Inner width of the MLP, in elements; a gated MLP has gate and up of this "
        "width each.",
        examples=[5632],
    )
    num_hidden_layers: SmallCount = Field(
        description="Transformer blocks; for encoder_decoder, those of the encoder.",
        examples=[22],
    )
    num_decoder_layers: SmallCount | None = Field(
        default=None,
        description="encoder_decoder: blocks of the decoder. null means as many as the encoder "
        "has.",
    )
    num_attention_heads: SmallCount = Field(description="Query heads of each block.", examples=[32])
    num_key_value_heads: SmallCount = Field(
        default_factory=lambda data: data.get("num_attention_heads", 1),
        description="Key/value heads of each block; the number must divide num_attention_heads. "
        "null means as many as query heads.",
    )
    head_dim: Count = Field(
        default_factory=_head_dim,
        description="Width of one head, in elements. null means hidden_size / num_attention_heads.",
    )
    max_position_embeddings: Count = Field(
        description="Longest sequence the model can read, in tokens.", examples=[2048]
    )
    norm: Annotated[str, NameOf(registry.norms)] = Field(
        default="rmsnorm", description="Kind of the norms in the network."
    )
    norm_eps: Positive = Field(
        default=1e-5, description="Added to the variance in a norm, under the root."
    )
    norm_position: Literal["pre", "post"] = Field(
        default="pre",
        description="pre: norms before attention, MLP and head. post: norms after each residual "
        "sum, as in the original Transformer and BERT.",
    )
    embedding_norm: bool = Field(
        default=False, description="Whether to normalise the embeddings, as in BERT."
    )
    activation: Annotated[str, NameOf(registry.activations)] = Field(
        default="swiglu",
        description="Activation of the MLP. Those with glu in their name are gated.",
    )
    position_embedding: Literal["rope", "learned", "sinusoidal", "relative", "none"] = Field(
        default="rope",
        description="Kind of position embedding. relative: T5's attention bias per distance "
        "bucket.",
    )
    rope_theta: Positive = Field(
        default=10000.0,
        description="RoPE's base: wavelengths range from 2 pi to almost 2 pi x rope_theta tokens.",
    )
    rope_scaling: RopeScalingConfig | None = Field(
        default=None, description="RoPE scaling for longer sequences. null means none."
    )
    relative_attention_num_buckets: Annotated[int, Field(ge=4, le=10**4)] = Field(
        default=32,
        description="relative: distance buckets; an encoder uses half of them for each direction.",
    )
    relative_attention_max_distance: Annotated[int, Field(ge=3, le=10**6)] = Field(
        default=128,
        description="relative: distance, in tokens, from which all distances share one bucket.",
    )
    sliding_window: Count | None = Field(
        default=None,
        description="Attention window of sliding layers, in tokens, the token itself included. "
        "null means no sliding layers.",
    )
    layer_types: Annotated[tuple[LayerType, ...], Field(min_length=1, strict=False)] | None = Field(
        default=None,
        description="Attention of each layer, by Hugging Face's names: full_attention sees all "
        "earlier tokens, sliding_attention the last sliding_window. A shorter list whose length "
        "divides the number of layers is repeated. null means that sliding_window applies to every "
        "layer.",
    )
    type_vocab_size: Annotated[int, Field(ge=0, le=10**4)] = Field(
        default=0,
        description="Number of segment (token type) embeddings, as in BERT. 0 means none.",
    )
    qk_norm: bool = Field(
        default=False, description="Whether to normalise each head's queries and keys (RMSNorm)."
    )
    attention_multiplier: Positive | None = Field(
        default=None, description="Factor of attention scores. null means 1 / sqrt(head_dim)."
    )
    embedding_multiplier: Positive = Field(
        default=1.0, description="Factor of the token embeddings."
    )
    logits_scaling: Positive = Field(default=1.0, description="Divisor of the logits.")
    decoder_start_token_id: CountOrZero = Field(
        default=0, description="encoder_decoder: token id that the decoder starts from."
    )
    tie_word_embeddings: bool = Field(
        default=False, description="Whether the output head shares the token embedding's weight."
    )
    attention_bias: bool = Field(
        default=False, description="Whether the attention projections have biases."
    )
    attention_output_bias: bool = Field(
        default_factory=lambda data: data.get("attention_bias", False),
        description="Whether attention's output projection has a bias. null means the value of "
        "attention_bias.",
    )
    mlp_bias: bool = Field(default=False, description="Whether the MLP projections have biases.")
    initializer_range: Positive = Field(
        default=0.02,
        description="Standard deviation of initial weights. For the output projections of a block "
        "it is divided by sqrt(2 x layers).",
    )
    hidden_dropout: Share = Field(
        default=0.0, description="Probability of dropping an element of a residual branch."
    )
    attention_dropout: Share = Field(
        default=0.0, description="Probability of dropping an attention weight."
    )

    num_labels: Annotated[int, Field(ge=0, le=10**6)] = Field(
        default=0,
        description="Number of labels of a classifier, whose head replaces the output head. "
        "Fine-tuning fills it in. 0 means a language model.",
    )
    classifier_pooling: Literal["last", "first", "mean"] = Field(
        default="last",
        description="Hidden state that the classifier's head reads: the last or the first token's, "
        "or the mean of all. Fine-tuning copies finetune.pooling here.",
    )
    adapter: AdapterConfig | None = Field(
        default=None,
        description="Adapters of the model. Fine-tuning copies finetune.adapter here.",
    )

    @property
    def gated(self) -> bool:
        """Whether one half of the MLP's first product gates the other (Shazeer 2020)."""
        return bool(registry.activations.facts(self.activation).get("gated"))


def example_model() -> dict[str, Any]:
    """Return a model section for checks that run before the user's model section is known."""
    fields = ModelConfig.model_fields.items()
    return {
        name: field.examples[0] for name, field in fields if field.is_required() and field.examples
    }
