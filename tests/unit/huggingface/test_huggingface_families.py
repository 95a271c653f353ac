# covers: megalite/checkpoint/huggingface/family.py megalite/checkpoint/huggingface/rope.py
# covers: megalite/checkpoint/huggingface/mapping.py megalite/checkpoint/huggingface/export.py
# covers: megalite/checkpoint/huggingface/folder.py megalite/evaluate/verify.py
# covers: megalite/checkpoint/huggingface/families/bert.py
# covers: megalite/checkpoint/huggingface/families/gpt2.py
# covers: megalite/checkpoint/huggingface/families/llama.py
# covers: megalite/checkpoint/huggingface/families/marian.py
# covers: megalite/checkpoint/huggingface/families/mistral.py
# covers: megalite/checkpoint/huggingface/families/qwen2.py
# covers: megalite/checkpoint/huggingface/families/qwen3.py
# covers: megalite/checkpoint/huggingface/families/t5.py
"""Every family, compared with transformers: equal weights and scores after import and export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalite import arch
from megalite.checkpoint.huggingface import (
    HuggingFaceFolder,
    export,
    families,
    family_of,
    from_config,
    to_config,
)
from megalite.config import ModelConfig
from megalite.errors import CommandError
from megalite.evaluate import open_model
from megalite.evaluate.verify import inputs_of, transformers_logits, verify
from megalite.model import LanguageModel, build, initialize
from megalite.tokenizers.tokenizer import load_tokenizer
from tests.helpers.families import FAMILIES, model_section
from tests.helpers.models import loss_of

transformers = pytest.importorskip("transformers")

CASES = [(family, number) for family in FAMILIES for number in range(3)]


class InMemory:
    """Source of the tensors of a model in memory."""

    def __init__(self, model: LanguageModel, config: ModelConfig) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        rows = {row.name: row for row in arch.parameters(config)}
        for name, value in model.named_parameters():
            for piece in arch.pieces(rows[name]):
                self.tensors[piece.tensor.name] = value.detach()[piece.target].clone()

    def read(self, tensor: str, _state: str, target: torch.Tensor, box: Any) -> None:
        target.copy_(self.tensors[tensor][box])


def random_model(config: ModelConfig) -> LanguageModel:
    model = build(config)
    initialize(model, config, seed=3, gather=_no_gather)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():  # biases and norms start as 0 and 1
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def _no_gather(_parameter: torch.nn.Parameter) -> Any:
    return torch.no_grad()


def exported(
    family: str, number: int, folder: Path, vocab_size: int | None = None, **options: Any
) -> tuple[Any, InMemory]:
    section = model_section(family, number)
    section["vocab_size"] = vocab_size or section["vocab_size"]
    config = ModelConfig.model_validate(section)
    stored = InMemory(random_model(config), config)
    export(stored, config, load_tokenizer("bytes"), folder, **options)
    return config, stored


@pytest.mark.parametrize(("family", "number"), CASES)
def test_family_computes_what_transformers_does(family: str, number: int, tmp_path: Path) -> None:
    config, stored = exported(family, number, tmp_path / "out")
    assert family_of(config).model_type == family
    loaded = open_model(tmp_path / "out")
    for name, value in stored.tensors.items():
        assert torch.equal(InMemory(loaded.model, loaded.config).tensors[name], value), name
    error, limit = verify(tmp_path / "out")
    assert error <= limit
    # The loss, and the gradient of the embedding.
    ids = torch.randint(config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    labels = ids.roll(-1, 1)
    batch = inputs_of(loaded, ids) | {"labels": labels, "loss_mask": torch.ones_like(ids).bool()}
    loss = loss_of(loaded.model, batch) / ids.numel()
    loss.backward()
    kinds = {"decoder": "CausalLM", "encoder": "MaskedLM", "encoder_decoder": "Seq2SeqLM"}
    auto = getattr(transformers, f"AutoModelFor{kinds[config.architecture]}")
    model = auto.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    logits = model(**inputs_of(loaded, ids)).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    gradient = loaded.model.get_parameter("model.embed_tokens.weight").grad
    # transformers may have a copy for each stack, and does not train the row of padding.
    tables = {
        id(module.weight): module.weight.grad
        for name, module in model.named_modules()
        if name.endswith(("embed_tokens", "word_embeddings", "wte", "shared"))
    }
    total = sum(grad for grad in tables.values() if grad is not None)
    assert isinstance(total, torch.Tensor)
    assert gradient is not None
    if (padding := getattr(model.config, "pad_token_id", None)) is not None:
        gradient[padding] = total[padding]
    torch.testing.assert_close(gradient, total, rtol=1e-3, atol=1e-4 * float(total.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_model_section_survives_export_and_import(family: str) -> None:
    for number in range(3):
        config = ModelConfig.model_validate(model_section(family, number))
        imported_family, section = from_config(to_config(config, family_of(config)))
        assert imported_family.model_type == family
        imported = ModelConfig.model_validate(section).model_dump()
        original = config.model_dump()
        if family == "t5":  # its config.json has no longest text
            imported["max_position_embeddings"] = original["max_position_embeddings"]
            imported["initializer_range"] = original["initializer_range"]
        assert imported == original


def test_families_are_one_a_file() -> None:
    folder = Path(families.__file__).parent
    assert {path.stem for path in folder.glob("*.py")} - {"__init__"} == set(families.FAMILIES)
    assert set(families.FAMILIES) == set(FAMILIES)
    assert next(iter(families.FAMILIES)) == "llama"  # preferred to others that fit a model


def test_folder_that_transformers_saved_is_read(tmp_path: Path) -> None:
    """A sharded bf16 model, and a bare model whose tensor names lack the prefix."""
    config = transformers.LlamaConfig(
        vocab_size=91, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    load_tokenizer("bytes").export(tmp_path / "sharded")
    loaded = open_model(tmp_path / "sharded")
    ids = torch.arange(20)[None]
    torch.testing.assert_close(
        loaded.model.logits(ids), transformers_logits(loaded, ids), rtol=0, atol=1e-4
    )
    gpt = transformers.GPT2Config(vocab_size=91, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    transformers.GPT2Model(gpt).save_pretrained(tmp_path / "bare")
    raw = load_file(tmp_path / "bare" / "model.safetensors")
    assert "wte.weight" in raw
    folder = HuggingFaceFolder(tmp_path / "bare")
    value = torch.empty(32, 32)
    folder.read(
        "model.layers.1.self_attn.k_proj.weight", "weight", value, (slice(0, 32), slice(0, 32))
    )
    assert torch.equal(value, raw["h.1.attn.c_attn.weight"].t()[32:64])


@pytest.mark.parametrize("equal", [True, False])
def test_stored_head_of_a_tied_model_must_equal_the_embedding(tmp_path: Path, equal: bool) -> None:
    exported("llama", 0, tmp_path)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    stored = load_file(file)
    raw = json.loads(config.read_text()) | {"tie_word_embeddings": True}
    config.write_text(json.dumps(raw))
    embedding = stored["model.embed_tokens.weight"]
    stored["lm_head.weight"] = embedding.clone() if equal else embedding + 1
    save_file(stored, file)
    if equal:
        assert open_model(tmp_path).config.tie_word_embeddings
        return
    with pytest.raises(CommandError, match=r"embeddings true, but lm_head\.weight differs from"):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "linear"}, r"rope_scaling\.factor: is missing"),
        ({"rope_type": "linear", "factor": -1.0}, r"rope_scaling\.factor: expected a number of"),
        ("linear", "rope_scaling"),
    ],
)
def test_bad_value_of_config_json_is_reported_in_words(
    tmp_path: Path, scaling: Any, message: str
) -> None:
    exported("llama", 0, tmp_path)
    config = tmp_path / "config.json"
    raw = json.loads(config.read_text())
    raw.pop("rope_parameters", None)
    config.write_text(json.dumps(raw | {"rope_scaling": scaling}))
    with pytest.raises(CommandError, match=message) as caught:
        HuggingFaceFolder(tmp_path)
    assert "pydantic" not in str(caught.value)
    assert "mapping" not in str(caught.value)


def test_export_writes_shards_in_half_precision(tmp_path: Path) -> None:
    exported("llama", 0, tmp_path / "out", shard_bytes=20_000, dtype="bfloat16")
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert verify(tmp_path / "out")[0] <= 1e-4


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"use_sliding_window": False, "sliding_window": 7}, (None, None)),
        ({"use_sliding_window": True, "sliding_window": 7}, (None, None)),  # from layer 28 on
        ({"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}, (7, None)),
        (
            {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
            (7, ["full_attention", "sliding_attention"]),
        ),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 7,
                "max_window_layers": 0,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            (7, ["sliding_attention", "full_attention"]),
        ),
    ],
)
def test_qwen_layer_types_equal_those_of_transformers(keys: dict[str, Any], expected: Any) -> None:
    config = ModelConfig.model_validate(model_section("qwen3", 2) | {"num_hidden_layers": 2})
    raw = to_config(config, family_of(config)) | {"max_window_layers": None} | keys
    _, section = from_config(raw)
    assert (section.get("sliding_window"), section.get("layer_types")) == expected
    theirs = transformers.Qwen3Config(**{k: v for k, v in raw.items() if v is not None})
    ours = ModelConfig.model_validate(section)
    assert arch.layer_types(ours, 2) == theirs.layer_types


def test_unknown_layer_type_is_refused() -> None:
    config = ModelConfig.model_validate(model_section("qwen3", 1))
    raw = to_config(config, family_of(config)) | {"layer_types": ["linear_attention"]}
    with pytest.raises(CommandError, match="'linear_attention': only full_attention, sliding_"):
        from_config(raw)
