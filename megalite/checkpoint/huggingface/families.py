"""The families of Hugging Face's models, and what each calls the parts of ours.

A family is a set of values of the model section (`ours`), what it calls the others (`keys`), what
its own configuration must say (`theirs`), and how a canonical tensor's name becomes one of its own
(`renames`, applied in order).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megalite.config import ModelConfig


@dataclass(frozen=True)
class Family:
    """A model type of Hugging Face.

    Attributes:
        keys: our field: theirs, of the same value. defaults: theirs, where config.json is silent.
        transposed: names of tensors that are stored [in, out].
        fused: a name of theirs that holds several of ours, stacked in the order of `parts`.
        base: the prefix that a folder of the bare model leaves out.
    """

    model_type: str
    architecture: str
    keys: Mapping[str, str]
    ours: Mapping[str, Any]
    theirs: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    renames: tuple[tuple[str, str], ...] = ()
    transposed: str = "$."
    fused: str = "$."
    parts: tuple[str, ...] = ()
    base: str = ""
    activation: str | None = None  # their key of it

    def rename(self, name: str, model: ModelConfig) -> str:
        """Their name of a canonical tensor."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        if self.model_type == "t5":
            name = name.replace("up_proj", "wi_1" if model.gated else "wi")
        return name

    def copies(self, model: ModelConfig) -> dict[str, str]:
        """Further names that their class wants some tensors under: the name, the canonical one."""
        if model.tie_word_embeddings:
            return {}
        embeddings = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
        return {
            "bert": {"cls.predictions.decoder.bias": "lm_head.bias"},
            "marian": dict.fromkeys(embeddings, "model.embed_tokens.weight"),
        }.get(self.model_type, {})


_SAME = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings"),
    *("initializer_range", "attention_dropout"),
)
_PLAIN = {
    "norm_position": "pre",
    "embedding_norm": False,
    "type_vocab_size": 0,
    "qk_norm": False,
    "attention_multiplier": None,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "sliding_window": None,
    "rope_scaling": None,
    "num_decoder_layers": None,
}
_ROPE = {
    **{k: v for k, v in _PLAIN.items() if k not in ("rope_scaling", "sliding_window", "qk_norm")},
    "architecture": "decoder",
    "norm": "rmsnorm",
    "activation": "swiglu",
    "position_embedding": "rope",
    "hidden_dropout": 0.0,
}
_ROPE_SAME = {name: name for name in _SAME} | {"norm_eps": "rms_norm_eps"}
_ROPE_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "max_position_embeddings": 2048,
}
_BIASED = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}
_BARE = {"attention_bias": False, "attention_output_bias": False, "mlp_bias": False}

FAMILIES = (
    Family(
        "llama",
        "LlamaForCausalLM",
        _ROPE_SAME | {"attention_bias": "attention_bias", "mlp_bias": "mlp_bias"},
        _ROPE | {"qk_norm": False, "sliding_window": None},
        {"hidden_act": "silu"},
        _ROPE_DEFAULTS | {"attention_bias": False, "mlp_bias": False},
        base="model.",
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        _ROPE_SAME | {"sliding_window": "sliding_window"},
        _ROPE | _BARE | {"qk_norm": False},
        {"hidden_act": "silu"},
        _ROPE_DEFAULTS | {"sliding_window": 4096, "num_key_value_heads": 8},
        base="model.",
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        _ROPE_SAME,
        _ROPE | _BARE | {"attention_bias": True, "qk_norm": False},
        {"hidden_act": "silu"},
        _ROPE_DEFAULTS,
        base="model.",
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        _ROPE_SAME | {"attention_bias": "attention_bias"},
        _ROPE | {"qk_norm": True, "mlp_bias": False},
        {"hidden_act": "silu"},
        _ROPE_DEFAULTS | {"attention_bias": False, "head_dim": 128},
        base="model.",
    ),
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        {
            "vocab_size": "vocab_size",
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
            "norm_eps": "layer_norm_epsilon",
            "initializer_range": "initializer_range",
            "intermediate_size": "n_inner",
            "tie_word_embeddings": "tie_word_embeddings",
            "hidden_dropout": "resid_pdrop",
            "attention_dropout": "attn_pdrop",
        },
        _PLAIN
        | _BIASED
        | {"architecture": "decoder", "norm": "layernorm", "position_embedding": "learned"},
        {
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        {
            "layer_norm_epsilon": 1e-5,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "resid_pdrop": 0.1,
            "attn_pdrop": 0.1,
            "activation_function": "gelu_new",
        },
        (
            (r"^model\.embed_tokens", "transformer.wte"),
            (r"^model\.embed_positions", "transformer.wpe"),
            (r"^model\.norm", "transformer.ln_f"),
            (r"^model\.layers\.", "transformer.h."),
            (r"input_layernorm", "ln_1"),
            (r"post_attention_layernorm", "ln_2"),
            (r"self_attn\.[qkv]_proj", "attn.c_attn"),
            (r"self_attn\.o_proj", "attn.c_proj"),
            (r"mlp\.up_proj", "mlp.c_fc"),
            (r"mlp\.down_proj", "mlp.c_proj"),
        ),
        transposed=r"\.c_(attn|proj|fc)\.weight$",
        fused=r"\.c_attn\.",
        parts=("q_proj", "k_proj", "v_proj"),
        base="transformer.",
        activation="activation_function",
    ),
    Family(
        "bert",
        "BertForMaskedLM",
        {
            **{n: n for n in _SAME if n not in ("num_key_value_heads", "head_dim")},
            "norm_eps": "layer_norm_eps",
            "type_vocab_size": "type_vocab_size",
            "hidden_dropout": "hidden_dropout_prob",
            "attention_dropout": "attention_probs_dropout_prob",
        },
        {k: v for k, v in _PLAIN.items() if k != "type_vocab_size"}
        | _BIASED
        | {"architecture": "encoder", "norm": "layernorm", "position_embedding": "learned"}
        | {"norm_position": "post", "embedding_norm": True},
        {"is_decoder": False, "position_embedding_type": "absolute"},
        {
            "layer_norm_eps": 1e-12,
            "type_vocab_size": 2,
            "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.1,
            "tie_word_embeddings": True,
            "hidden_act": "gelu",
            "initializer_range": 0.02,
            "max_position_embeddings": 512,
        },
        (
            (r"^model\.embed_tokens", "bert.embeddings.word_embeddings"),
            (r"^model\.embed_positions", "bert.embeddings.position_embeddings"),
            (r"^model\.embed_types", "bert.embeddings.token_type_embeddings"),
            (r"^model\.embed_norm", "bert.embeddings.LayerNorm"),
            (r"^model\.layers\.", "bert.encoder.layer."),
            (r"input_layernorm", "attention.output.LayerNorm"),
            (r"post_attention_layernorm", "output.LayerNorm"),
            (r"self_attn\.q_proj", "attention.self.query"),
            (r"self_attn\.k_proj", "attention.self.key"),
            (r"self_attn\.v_proj", "attention.self.value"),
            (r"self_attn\.o_proj", "attention.output.dense"),
            (r"mlp\.up_proj", "intermediate.dense"),
            (r"mlp\.down_proj", "output.dense"),
            (r"^lm_transform\.dense", "cls.predictions.transform.dense"),
            (r"^lm_transform\.norm", "cls.predictions.transform.LayerNorm"),
            (r"^lm_head\.bias", "cls.predictions.bias"),
            (r"^lm_head\.weight", "cls.predictions.decoder.weight"),
        ),
        base="bert.",
        activation="hidden_act",
    ),
    Family(
        "t5",
        "T5ForConditionalGeneration",
        {
            "vocab_size": "vocab_size",
            "hidden_size": "d_model",
            "intermediate_size": "d_ff",
            "num_hidden_layers": "num_layers",
            "num_decoder_layers": "num_decoder_layers",
            "num_attention_heads": "num_heads",
            "head_dim": "d_kv",
            "norm_eps": "layer_norm_epsilon",
            "hidden_dropout": "dropout_rate",
            "relative_attention_num_buckets": "relative_attention_num_buckets",
            "relative_attention_max_distance": "relative_attention_max_distance",
            "decoder_start_token_id": "decoder_start_token_id",
        },
        _BARE
        | {"architecture": "encoder_decoder", "norm": "rmsnorm", "norm_position": "pre"}
        | {"position_embedding": "relative", "attention_multiplier": 1.0, "qk_norm": False}
        | {"embedding_norm": False, "embedding_multiplier": 1.0},
        {},
        {
            "layer_norm_epsilon": 1e-6,
            "dropout_rate": 0.1,
            "relative_attention_num_buckets": 32,
            "relative_attention_max_distance": 128,
            "feed_forward_proj": "relu",
            "decoder_start_token_id": 0,
            "num_decoder_layers": None,
        },
        (
            (r"^model\.embed_tokens", "shared"),
            (r"^model\.(encoder|decoder)\.norm", r"\1.final_layer_norm"),
            (
                r"^model\.(encoder|decoder)\.relative_attention_bias",
                r"\1.block.0.layer.0.SelfAttention.relative_attention_bias",
            ),
            (r"^model\.(encoder|decoder)\.layers\.(\d+)", r"\1.block.\2.layer"),
            (r"input_layernorm", "0.layer_norm"),
            (r"self_attn\.([qkvo])_proj", r"0.SelfAttention.\1"),
            (r"cross_attn_layernorm", "1.layer_norm"),
            (r"cross_attn\.([qkvo])_proj", r"1.EncDecAttention.\1"),
            (r"^(encoder.*)post_attention_layernorm", r"\g<1>1.layer_norm"),
            (r"^(decoder.*)post_attention_layernorm", r"\g<1>2.layer_norm"),
            (r"^(encoder.*)mlp\.", r"\g<1>1.DenseReluDense."),
            (r"^(decoder.*)mlp\.", r"\g<1>2.DenseReluDense."),
            (r"gate_proj", "wi_0"),
            (r"down_proj", "wo"),
        ),
    ),
    Family(
        "marian",
        "MarianMTModel",
        {
            "vocab_size": "vocab_size",
            "hidden_size": "d_model",
            "intermediate_size": "encoder_ffn_dim",
            "num_hidden_layers": "encoder_layers",
            "num_decoder_layers": "decoder_layers",
            "num_attention_heads": "encoder_attention_heads",
            "hidden_dropout": "dropout",
            "attention_dropout": "attention_dropout",
            "initializer_range": "init_std",
            "max_position_embeddings": "max_position_embeddings",
            "tie_word_embeddings": "tie_word_embeddings",
            "decoder_start_token_id": "decoder_start_token_id",
        },
        _BIASED
        | {"architecture": "encoder_decoder", "norm": "layernorm", "norm_position": "post"}
        | {"position_embedding": "sinusoidal", "attention_multiplier": None, "qk_norm": False}
        | {"embedding_norm": False, "logits_scaling": 1.0, "norm_eps": 1e-5},
        {"share_encoder_decoder_embeddings": True},
        {
            "max_position_embeddings": 1024,
            "dropout": 0.1,
            "attention_dropout": 0.0,
            "init_std": 0.02,
            "scale_embedding": False,
            "activation_function": "gelu",
            "tie_word_embeddings": True,
            "decoder_layers": 12,
            "decoder_start_token_id": 58100,
        },
        (
            (r"^model\.embed_tokens", "model.shared"),
            (r"input_layernorm", "self_attn_layer_norm"),
            (r"cross_attn_layernorm", "encoder_attn_layer_norm"),
            (r"post_attention_layernorm", "final_layer_norm"),
            (r"cross_attn", "encoder_attn"),
            (r"o_proj", "out_proj"),
            (r"mlp\.up_proj", "fc1"),
            (r"mlp\.down_proj", "fc2"),
        ),
        base="model.",
        activation="activation_function",
    ),
)
