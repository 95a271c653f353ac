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
"""Every family against transformers itself: same weights, same scores, both ways."""

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
from megalite.evaluate.verify import inputs_of, theirs, verify
from megalite.model import LanguageModel, build, initialize
from megalite.tokenizers.tokenizer import load_tokenizer
from tests.helpers.families import FAMILIES, model_section
from tests.helpers.models import loss_of

transformers = pytest.importorskip("transformers")

CASES = [(family, number) for family in FAMILIES for number in range(3)]


class InMemory:
    """A model's own tensors as what is stored."""

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
    initialize(model, config, seed=3, gather=_whole)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():  # biases and norms that do something
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def _whole(_parameter: torch.nn.Parameter) -> Any:
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
def test_a_family_of_hugging_faces(family: str, number: int, tmp_path: Path) -> None:
    config, stored = exported(family, number, tmp_path / "out")
    assert family_of(config).model_type == family
    opened = open_model(tmp_path / "out")
    for name, value in stored.tensors.items():
        found = InMemory(opened.model, opened.config).tensors[name]
        assert torch.equal(found, value), name
    error, limit = verify(tmp_path / "out")
    assert error <= limit
    # the loss, and the gradient of the embedding
    ids = torch.randint(config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    labels = ids.roll(-1, 1)
    batch = inputs_of(opened, ids) | {"labels": labels, "loss_mask": torch.ones_like(ids).bool()}
    loss = loss_of(opened.model, batch) / ids.numel()
    loss.backward()
    kinds = {"decoder": "CausalLM", "encoder": "MaskedLM", "encoder_decoder": "Seq2SeqLM"}
    auto = getattr(transformers, f"AutoModelFor{kinds[config.architecture]}")
    model = auto.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    logits = model(**inputs_of(opened, ids)).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    gradient = opened.model.get_parameter("model.embed_tokens.weight").grad
    # theirs may keep copies for each stack, and leave the row of padding as it is
    tables = {
        id(module.weight): module.weight.grad
        for name, module in model.named_modules()
        if name.endswith(("embed_tokens", "word_embeddings", "wte", "shared"))
    }
    wanted = sum(grad for grad in tables.values() if grad is not None)
    assert isinstance(wanted, torch.Tensor)
    assert gradient is not None
    if (padding := getattr(model.config, "pad_token_id", None)) is not None:
        gradient[padding] = wanted[padding]
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_configuration_comes_back(family: str) -> None:
    for number in range(3):
        config = ModelConfig.model_validate(model_section(family, number))
        found, section = from_config(to_config(config, family_of(config)))
        assert found.model_type == family
        again = ModelConfig.model_validate(section).model_dump()
        wanted = config.model_dump()
        if family == "t5":  # which has no longest text
            again["max_position_embeddings"] = wanted["max_position_embeddings"]
            again["initializer_range"] = wanted["initializer_range"]
        assert again == wanted


def test_each_file_of_the_package_defines_one_family() -> None:
    folder = Path(families.__file__).parent
    assert {path.stem for path in folder.glob("*.py")} - {"__init__"} == set(families.FAMILIES)
    assert set(families.FAMILIES) == set(FAMILIES)
    assert next(iter(families.FAMILIES)) == "llama"  # preferred to others that fit a model


def test_what_transformers_saves_is_read(tmp_path: Path) -> None:
    """Its own folder, sharded, in bf16, and of the bare model without its head's prefix."""
    config = transformers.LlamaConfig(
        vocab_size=91, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path / "whole", max_shard_size="10KB")
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 2
    load_tokenizer("bytes").export(tmp_path / "whole")
    opened = open_model(tmp_path / "whole")
    ids = torch.arange(20)[None]
    torch.testing.assert_close(opened.model.logits(ids), theirs(opened, ids), rtol=0, atol=1e-4)
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
def test_a_head_beside_the_embedding_that_it_shares_is_compared(
    tmp_path: Path, equal: bool
) -> None:
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
    with pytest.raises(CommandError, match=r"tie_word_embeddings true, but lm_head\.weight is not"):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "linear"}, r"rope_scaling\.factor: is missing"),
        ({"rope_type": "linear", "factor": -1.0}, r"rope_scaling\.factor: expected a number of"),
        ("linear", "rope_scaling"),
    ],
)
def test_a_faulty_value_of_a_configuration_is_told_in_words(
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


def test_shards_and_half_precision(tmp_path: Path) -> None:
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
def test_qwens_layers_slide_as_in_transformers(keys: dict[str, Any], expected: Any) -> None:
    config = ModelConfig.model_validate(model_section("qwen3", 2) | {"num_hidden_layers": 2})
    raw = to_config(config, family_of(config)) | {"max_window_layers": None} | keys
    _, section = from_config(raw)
    assert (section.get("sliding_window"), section.get("layer_types")) == expected
    theirs = transformers.Qwen3Config(**{k: v for k, v in raw.items() if v is not None})
    own = ModelConfig.model_validate(section)
    assert arch.layer_types(own, 2) == theirs.layer_types


def test_an_unknown_kind_of_layer_is_refused() -> None:
    config = ModelConfig.model_validate(model_section("qwen3", 1))
    raw = to_config(config, family_of(config)) | {"layer_types": ["linear_attention"]}
    with pytest.raises(CommandError, match="'linear_attention': only full_attention, sliding_"):
        from_config(raw)
