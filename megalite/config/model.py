"""The `model` section of a run file: every network there is, by its parts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from megalite import registry
from megalite.config.fields import Count, CountOrZero, Positive, Section, Share, SmallCount
from megalite.config.finetune import AdapterConfig
from megalite.config.names import NameOf


def _head_dim(data: dict[str, int]) -> int:
    """Return the default; a field that is itself at fault is absent from `data`."""
    return max(1, data.get("hidden_size", 1) // data.get("num_attention_heads", 1))


# Hugging Face's names of what the attention of a layer looks at.
LayerType = Literal["full_attention", "sliding_attention"]


class RopeScalingConfig(Section):
    """RoPE's wavelengths stretched for longer sequences, in Hugging Face's keys."""

    rope_type: Literal["linear", "llama3", "yarn"] = Field(
        description="linear: all frequencies equally; llama3: the low ones; yarn: by the number of "
        "rotations (arXiv 2309.00071).",
        examples=["linear"],
    )
    factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(
        description="How many times longer.", examples=[8.0]
    )
    original_max_position_embeddings: Count | None = Field(
        default=None, description="Length before, in tokens (llama3 and yarn need it)."
    )
    low_freq_factor: Positive = Field(
        default=1.0, description="llama3: waves that fit the old length fewer times are stretched."
    )
    high_freq_factor: Positive = Field(
        default=4.0, description="llama3: waves that fit the old length more often stay."
    )
    beta_fast: Positive = Field(
        default=32.0, description="yarn: turns in the old length from which a wave stays."
    )
    beta_slow: Positive = Field(
        default=1.0, description="yarn: turns in the old length up to which a wave is stretched."
    )
    attention_factor: Positive | None = Field(
        default=None, description="yarn: factor of q and k (null: 0.1 ln(factor) + 1)."
    )


class ModelConfig(Section):
    """The network; keys have Hugging Face's names if it has one."""

    architecture: Literal["decoder", "encoder", "encoder_decoder"] = Field(
        default="decoder",
        description="Which way tokens look: back (decoder), everywhere (encoder, for masked "
        "tokens), or everywhere in one text to write another (encoder_decoder).",
    )
    vocab_size: Count = Field(
        description="Tokens in the vocabulary, as the tokenizer counts them (not padded).",
        examples=[32000],
    )
    hidden_size: Count = Field(
        description="Width of the residual stream, in elements.", examples=[2048]
    )
    intermediate_size: Count = Field(
        description="Width inside the MLP, in elements (of each of gate and up where gated).",
        examples=[5632],
    )
    num_hidden_layers: SmallCount = Field(
        description="Transformer blocks (of the encoder, if there are two stacks).",
        examples=[22],
    )
    num_decoder_layers: SmallCount | None = Field(
        default=None,
        description="Blocks of an encoder_decoder's decoder (null: as many as the encoder's).",
    )
    num_attention_heads: SmallCount = Field(description="Query heads of each block.", examples=[32])
    num_key_value_heads: SmallCount = Field(
        default_factory=lambda data: data.get("num_attention_heads", 1),
        description="Key/value heads of each block; divides the query heads "
        "(null: as many as query heads).",
    )
    head_dim: Count = Field(
        default_factory=_head_dim,
        description="Width of one head, in elements (null: hidden_size / num_attention_heads).",
    )
    max_position_embeddings: Count = Field(
        description="Longest sequence the model is made for, in tokens.", examples=[2048]
    )
    norm: Annotated[str, NameOf(registry.norms)] = Field(
        default="rmsnorm", description="Normalisation before attention, MLP and head."
    )
    norm_eps: Positive = Field(
        default=1e-5, description="Added to the variance under the root of a norm."
    )
    norm_position: Literal["pre", "post"] = Field(
        default="pre",
        description="Whether a block normalises what it reads (and the model its end), or each sum "
        "with the residual, as in the first Transformer and BERT.",
    )
    embedding_norm: bool = Field(
        default=False, description="Whether embeddings are normalised, as in BERT."
    )
    activation: Annotated[str, NameOf(registry.activations)] = Field(
        default="swiglu", description="Non-linearity of the MLP; those with glu are gated."
    )
    position_embedding: Literal["rope", "learned", "sinusoidal", "relative", "none"] = Field(
        default="rope",
        description="Encoding of a token's position; relative: T5's biases of distance buckets.",
    )
    rope_theta: Positive = Field(
        default=10000.0, description="Base of RoPE's wavelengths, in tokens over 2 pi."
    )
    rope_scaling: RopeScalingConfig | None = Field(
        default=None, description="How RoPE is stretched for longer sequences."
    )
    relative_attention_num_buckets: Annotated[int, Field(ge=4, le=10**4)] = Field(
        default=32, description="Buckets of relative positions, half of them for each direction."
    )
    relative_attention_max_distance: Annotated[int, Field(ge=3, le=10**6)] = Field(
        default=128, description="Distance, in tokens, from which all share the last bucket."
    )
    sliding_window: Count | None = Field(
        default=None,
        description="Tokens a token looks back at, itself included, in sliding layers (null: all).",
    )
    layer_types: Annotated[tuple[LayerType, ...], Field(min_length=1, strict=False)] | None = Field(
        default=None,
        description="The attention of each layer, in Hugging Face's words: full_attention looks at "
        "all tokens, sliding_attention at sliding_window of them. A shorter list that divides the "
        "layers is repeated (null: sliding_window applies to every layer).",
    )
    type_vocab_size: Annotated[int, Field(ge=0, le=10**4)] = Field(
        default=0, description="Kinds of segments with an embedding, as in BERT (0: none)."
    )
    qk_norm: bool = Field(
        default=False, description="Whether each head's query and key are normalised (RMS)."
    )
    attention_multiplier: Positive | None = Field(
        default=None, description="Factor of attention's scores (null: 1 / sqrt(head_dim))."
    )
    embedding_multiplier: Positive = Field(
        default=1.0, description="Factor of the token embeddings."
    )
    logits_scaling: Positive = Field(default=1.0, description="What logits are divided by.")
    decoder_start_token_id: CountOrZero = Field(
        default=0, description="encoder_decoder: the id that the decoder begins with."
    )
    tie_word_embeddings: bool = Field(
        default=False, description="Whether the head's weight is the token embedding's."
    )
    attention_bias: bool = Field(
        default=False, description="Whether the projections of attention have biases."
    )
    attention_output_bias: bool = Field(
        default_factory=lambda data: data.get("attention_bias", False),
        description="Whether attention's output projection has one (null: as attention_bias).",
    )
    mlp_bias: bool = Field(
        default=False, description="Whether the projections of the MLP have biases."
    )
    initializer_range: Positive = Field(
        default=0.02,
        description="Standard deviation of initial weights; output projections of a block have "
        "it divided by sqrt(2 x layers).",
    )
    hidden_dropout: Share = Field(
        default=0.0, description="Probability of dropping an element of a residual branch."
    )
    attention_dropout: Share = Field(
        default=0.0, description="Probability of dropping an attention weight."
    )

    num_labels: Annotated[int, Field(ge=0, le=10**6)] = Field(
        default=0,
        description="Labels of a classifier, whose head takes the place of the language model's "
        "(fine-tuning counts them).",
    )
    classifier_pooling: Literal["last", "first", "mean"] = Field(
        default="last",
        description="The token, or the mean of all, that a label is read from (fine-tuning writes "
        "finetune.pooling here).",
    )
    adapter: AdapterConfig | None = Field(
        default=None, description="The adapters in it (fine-tuning writes finetune.adapter here)."
    )

    @property
    def gated(self) -> bool:
        """Whether one half of the MLP's first product gates the other (Shazeer 2020)."""
        return bool(registry.activations.facts(self.activation).get("gated"))


def example_model() -> dict[str, Any]:
    """Return a model section of the examples, for what must know one before the user's is there."""
    fields = ModelConfig.model_fields.items()
    return {
        name: field.examples[0] for name, field in fields if field.is_required() and field.examples
    }
