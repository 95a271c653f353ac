"""BERT: an encoder with norms after each half block, learned positions, and a transformed head."""

from __future__ import annotations

from megalite.checkpoint.huggingface.family import (
    COMMON_KEYS,
    PLAIN,
    WITH_BIASES,
    Family,
    attention_mismatches,
)
from megalite.config import ModelConfig


class Bert(Family):
    """BERT, whose older folders name a norm's weight and bias gamma and beta."""

    def aliases(self, name: str) -> tuple[str, ...]:
        old_name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        old_name = old_name.replace("LayerNorm.bias", "LayerNorm.beta")
        if name == "cls.predictions.bias":
            return ("cls.predictions.decoder.bias", old_name)
        return (old_name,)

    def copies(self, model: ModelConfig) -> dict[str, str]:
        if model.tie_word_embeddings:
            return {}
        return {"cls.predictions.decoder.bias": "lm_head.bias"}

    def mismatches(self, model: ModelConfig) -> list[str]:
        return attention_mismatches(model)


FAMILY = Bert(
    model_type="bert",
    architecture="BertForMaskedLM",
    keys={
        **{key: key for key in COMMON_KEYS if key not in ("num_key_value_heads", "head_dim")},
        "norm_eps": "layer_norm_eps",
        "type_vocab_size": "type_vocab_size",
        "hidden_dropout": "hidden_dropout_prob",
        "attention_dropout": "attention_probs_dropout_prob",
    },
    fixed={k: v for k, v in PLAIN.items() if k != "type_vocab_size"}
    | WITH_BIASES
    | {"architecture": "encoder", "norm": "layernorm", "position_embedding": "learned"}
    | {"norm_position": "post", "embedding_norm": True},
    required={"is_decoder": False, "position_embedding_type": "absolute"},
    defaults={
        "layer_norm_eps": 1e-12,
        "type_vocab_size": 2,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "tie_word_embeddings": True,
        "hidden_act": "gelu",
        "initializer_range": 0.02,
        "max_position_embeddings": 512,
    },
    renames=(
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
    prefix="bert.",
    activation_key="hidden_act",
)
