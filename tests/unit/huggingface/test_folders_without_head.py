# covers: megalite/checkpoint/huggingface/folder.py
"""Model folders that classes of transformers without a language-model head saved."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalite import arch
from megalite.checkpoint import load_into
from megalite.checkpoint.huggingface import HuggingFaceFolder, is_huggingface
from megalite.errors import CommandError
from megalite.evaluate import open_model
from megalite.model import build
from megalite.tokenizers.tokenizer import load_tokenizer

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 91, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
    "num_labels": 3,
}  # fmt: skip
T5 = {
    "vocab_size": 91, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4,
    "tie_word_embeddings": False,
}  # fmt: skip
MARIAN = {
    "vocab_size": 91, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "pad_token_id": 0, "decoder_start_token_id": 0,
    "max_position_embeddings": 32,
}  # fmt: skip
WITHOUT_HEAD = {
    "BertModel": SIZES, "BertForSequenceClassification": SIZES, "BertForTokenClassification": SIZES,
    "LlamaModel": SIZES, "LlamaForSequenceClassification": SIZES, "MistralModel": SIZES,
    "Qwen2ForSequenceClassification": SIZES, "Qwen3Model": SIZES | {"head_dim": 8}, "T5Model": T5,
}  # fmt: skip
WITH_TIED = {
    "GPT2Model": {"vocab_size": 91, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "MarianModel": MARIAN,
}


def save(kind: str, options: dict[str, Any], folder: Path) -> Any:
    """Save a random model of a transformers class and return its base model."""
    model_class = getattr(transformers, kind)
    torch.manual_seed(3)
    model = model_class(model_class.config_class(**options)).eval()
    for name, parameter in model.named_parameters():  # biases and norms start as 0 and 1
        if "embed_positions" not in name:  # sinusoids
            parameter.data += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    if kind == "T5Model":  # as earlier versions wrote it
        config = json.loads((folder / "config.json").read_text())
        del config["scale_decoder_outputs"]
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return model.base_model


def hidden_states(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Return the hidden states of a MegaLite classifier with the folder's weights."""
    source = HuggingFaceFolder(folder)
    config = source.section.model_copy(update={"num_labels": 2})
    model = build(config).eval()
    rows = {row.name for row in arch.parameters(source.section)}
    heads = [name for name, _ in model.named_parameters() if name not in rows]
    assert heads == ["score.weight"]

    class WithHead:
        def read(self, tensor: str, state: str, target: torch.Tensor, box: Any) -> None:
            if tensor == "score.weight":
                target.zero_()
            else:
                source.read(tensor, state, target, box)

    load_into(model, config, WithHead())
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids).bool()}
    if config.architecture == "encoder_decoder":
        inputs["decoder_input_ids"] = ids
    if config.architecture == "decoder":
        del inputs["attention_mask"]
    return model.hidden(inputs)


@pytest.mark.parametrize("kind", [*WITHOUT_HEAD, *WITH_TIED])
def test_classifier_starts_from_a_model_without_head(kind: str, tmp_path: Path) -> None:
    options = (WITHOUT_HEAD | WITH_TIED)[kind]
    bare = save(kind, options, tmp_path)
    folder = HuggingFaceFolder(tmp_path)
    assert bool(folder.missing_head) == (kind in WITHOUT_HEAD)
    ids = torch.randint(91, (2, 12), generator=torch.Generator().manual_seed(1))
    inputs = {"decoder_input_ids": ids} if kind.startswith(("T5", "Marian")) else {}
    with torch.no_grad():
        expected = bare(input_ids=ids, **inputs).last_hidden_state
        actual = hidden_states(tmp_path, ids)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", WITHOUT_HEAD)
def test_open_model_refuses_a_folder_without_head(kind: str, tmp_path: Path) -> None:
    save(kind, WITHOUT_HEAD[kind], tmp_path)
    load_tokenizer("bytes").export(tmp_path)
    with pytest.raises(CommandError, match="has no language-model head") as caught:
        open_model(tmp_path)
    assert "it can start a classification" in str(caught.value)
    assert "use a folder that" in str(caught.value)


@pytest.mark.parametrize("prefix", ["bert.", "", "encoder.bert.", "module.bert.", "0.auto_model."])
def test_tensor_names_may_have_any_prefix(prefix: str, tmp_path: Path) -> None:
    bare = save("BertForMaskedLM", SIZES, tmp_path)
    file = tmp_path / "model.safetensors"
    stored = {
        name.replace("bert.", prefix, 1): value
        for name, value in load_file(file).items()
        if name.startswith("bert.")
    }
    save_file(stored, file)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = bare(input_ids=ids).last_hidden_state
        torch.testing.assert_close(hidden_states(tmp_path, ids), expected, rtol=1e-4, atol=1e-4)


def test_sentence_transformers_model_is_read_from_its_subfolder(tmp_path: Path) -> None:
    bare = save("BertModel", SIZES, tmp_path / "0_Transformer")
    modules = [{"idx": 0, "path": "0_Transformer"}, {"idx": 1, "path": "1_Pooling"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    assert is_huggingface(tmp_path)
    assert HuggingFaceFolder(tmp_path).path == tmp_path / "0_Transformer"
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = bare(input_ids=ids).last_hidden_state
        torch.testing.assert_close(hidden_states(tmp_path, ids), expected, rtol=1e-4, atol=1e-4)


def test_unused_tensors_are_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save("BertForSequenceClassification", SIZES, tmp_path)
    folder = HuggingFaceFolder(tmp_path)
    kinds = {name.split(".")[-2] for name in folder.ignored}
    assert kinds == {"classifier", "dense"}  # the head, and the pooler
    with caplog.at_level(logging.INFO, logger="megalite"):
        folder.log_ignored()
    assert len(caplog.records) == 1
    assert "classifier.weight" in caplog.text
    save("LlamaForCausalLM", SIZES | {"tie_word_embeddings": True}, tmp_path / "whole")
    file = tmp_path / "whole" / "model.safetensors"
    copy = load_file(file)
    copy["lm_head.weight"] = copy["model.embed_tokens.weight"].clone()
    copy["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(copy, file)
    assert HuggingFaceFolder(tmp_path / "whole").ignored == []
    del copy["model.embed_tokens.weight"]  # some programs store only the head
    save_file(copy, file)
    assert HuggingFaceFolder(tmp_path / "whole").missing_head == []
    copy["model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(2, 32)
    save_file(copy, file)
    with pytest.raises(CommandError, match="adapters next to its weights"):
        HuggingFaceFolder(tmp_path / "whole")


def test_unscaled_t5_of_transformers_5_is_read(tmp_path: Path) -> None:
    """Its config.json has tie_word_embeddings true even if a separate head is stored."""
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)).eval()
    assert not model.config.scale_decoder_outputs
    ids = torch.randint(91, (2, 9), generator=torch.Generator().manual_seed(1))
    for head in ("tied", "separate"):
        if head == "separate":
            model.lm_head.weight = torch.nn.Parameter(torch.randn(91, 32))
        model.save_pretrained(tmp_path / head)
        load_tokenizer("bytes").export(tmp_path / head)
        loaded = open_model(tmp_path / head)
        inputs = {"input_ids": ids, "decoder_input_ids": ids}
        ones = {"attention_mask": torch.ones_like(ids).bool()}
        with torch.no_grad():
            expected = model(**inputs).logits
            actual = loaded.model.scores(loaded.model.hidden(inputs | ones))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        assert loaded.config.tie_word_embeddings == (head == "tied")


def test_encoder_without_its_decoder_is_refused(tmp_path: Path) -> None:
    save("T5EncoderModel", T5, tmp_path)
    with pytest.raises(CommandError, match=r"only the encoder of a t5.*T5ForConditionalGeneration"):
        HuggingFaceFolder(tmp_path)


def test_bad_files_are_reported(tmp_path: Path) -> None:
    """A tensor of integers, a Git LFS pointer, a missing shard."""
    config = {**SIZES, "num_key_value_heads": 2}
    model = save("LlamaForCausalLM", config, tmp_path / "whole")
    file = tmp_path / "whole" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = torch.ones(32, dtype=torch.int32)
    save_file(tensors, file)
    with pytest.raises(CommandError, match=r"model.norm.weight has dtype I32, not a float"):
        HuggingFaceFolder(tmp_path / "whole")
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CommandError, match="git lfs pull"):
        HuggingFaceFolder(tmp_path / "whole")
    shards = tmp_path / "shards"
    causal = transformers.LlamaForCausalLM(model.config)
    causal.save_pretrained(shards, max_shard_size="10KB")
    missing = sorted(shards.glob("*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(CommandError, match=f"lacks {missing.name}, which .*; download or copy"):
        HuggingFaceFolder(shards)
