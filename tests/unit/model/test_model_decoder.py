# covers: megalite/model/transformer.py megalite/model/stack.py megalite/model/linear.py
# covers: megalite/model/mlp.py megalite/model/norms.py megalite/model/positions.py
"""The decoder compared with a simple one in float64, and with transformers' Llama."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalite import arch
from megalite.config import ModelConfig
from megalite.model import LanguageModel, build
from tests.helpers.models import loss_of, make_batch, make_model, model_config

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "a head for each query": {"num_key_value_heads": 4},
    "one head for all": {"num_key_value_heads": 1, "head_dim": 10},
    "long waves": {"rope_theta": 123.0, "norm_eps": 0.1},
    "tied": {"tie_word_embeddings": True},
    "geglu": {"activation": "geglu", "mlp_bias": True},
    "gpt-2": {
        "norm": "layernorm",
        "activation": "gelu_tanh",
        "position_embedding": "learned",
        "attention_bias": True,
        "mlp_bias": True,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    },
    "gelu": {"activation": "gelu", "norm": "layernorm", "norm_eps": 0.05},
    "transformer of 2017": {"activation": "relu", "position_embedding": "sinusoidal"},
    "no positions": {"position_embedding": "none", "num_hidden_layers": 1},
}


class Plain:
    """A decoder by the formulas of its papers: one sample, one head and one position at a time."""

    def __init__(self, config: ModelConfig, model: LanguageModel) -> None:
        self.config = config
        self.weights = {name: p.detach().double() for name, p in model.named_parameters()}

    def hidden(self, ids: Tensor, positions: Tensor) -> Tensor:
        c, w = self.config, self.weights
        x = w["model.embed_tokens.weight"][ids]
        if c.position_embedding == "learned":
            x = x + w["model.embed_positions.weight"][positions]
        if c.position_embedding == "sinusoidal":
            x = x + torch.stack([self.sinusoid(int(p)) for p in positions])
        for layer in range(c.num_hidden_layers):
            name = f"model.layers.{layer}"
            x = x + self.attention(
                f"{name}.self_attn", self.norm(f"{name}.input_layernorm", x), positions
            )
            x = x + self.mlp(f"{name}.mlp", self.norm(f"{name}.post_attention_layernorm", x))
        return self.norm("model.norm", x)

    def linear(self, name: str, x: Tensor, rows: slice = slice(None)) -> Tensor:
        y = x @ self.weights[f"{name}.weight"][rows].T
        bias = self.weights.get(f"{name}.bias")
        return y if bias is None else y + bias[rows]

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        if self.config.norm == "rmsnorm":
            return x / (x.pow(2).mean(-1, keepdim=True) + self.config.norm_eps).sqrt() * weight
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.pow(2).mean(-1, keepdim=True)
        return (
            centred / (variance + self.config.norm_eps).sqrt() * weight
            + self.weights[f"{name}.bias"]
        )

    def attention(self, name: str, x: Tensor, positions: Tensor) -> Tensor:
        c, H, T = self.config, self.config.head_dim, len(x)
        Q, K = c.num_attention_heads * H, c.num_key_value_heads * H
        q = self.linear(f"{name}.qkv_proj", x, slice(0, Q)).view(T, -1, H)
        k = self.linear(f"{name}.qkv_proj", x, slice(Q, Q + K)).view(T, -1, H)
        v = self.linear(f"{name}.qkv_proj", x, slice(Q + K, Q + 2 * K)).view(T, -1, H)
        if c.position_embedding == "rope":
            q, k = self.turn(q, positions), self.turn(k, positions)
        repeats = c.num_attention_heads // c.num_key_value_heads
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        y = torch.empty_like(q)
        for head in range(c.num_attention_heads):
            for t in range(T):
                scores = k[: t + 1, head] @ q[t, head] / math.sqrt(H)
                y[t, head] = scores.softmax(0) @ v[: t + 1, head]
        return self.linear(f"{name}.o_proj", y.reshape(T, Q))

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate as Llama's rotate_half: x cos + [-x2, x1] sin."""
        half = self.config.head_dim // 2
        rates = self.config.rope_theta ** (-torch.arange(half).double() / half)
        angles = positions[:, None].double() * rates
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return x * angles.cos() + turned * angles.sin()

    def sinusoid(self, position: int) -> Tensor:
        D = self.config.hidden_size
        rates = [10000.0 ** (-2 * i / D) for i in range(D // 2)]
        waves = [math.sin(position * r) for r in rates] + [math.cos(position * r) for r in rates]
        return torch.tensor(waves, dtype=torch.float64)

    def mlp(self, name: str, x: Tensor) -> Tensor:
        kind, inner = self.config.activation, self.config.intermediate_size
        if kind in ("swiglu", "geglu"):
            gate = self.linear(f"{name}.gate_up_proj", x, slice(0, inner))
            up = self.linear(f"{name}.gate_up_proj", x, slice(inner, 2 * inner))
            if kind == "swiglu":
                return self.linear(f"{name}.down_proj", gate * torch.sigmoid(gate) * up)
            return self.linear(f"{name}.down_proj", self.gelu(gate) * up)
        x = self.linear(f"{name}.up_proj", x)
        if kind == "gelu_tanh":
            x = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        elif kind == "gelu":
            x = self.gelu(x)
        else:
            x = x * (x > 0)
        return self.linear(f"{name}.down_proj", x)

    @staticmethod
    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))

    def logits(self, ids: Tensor) -> Tensor:
        tied = self.config.tie_word_embeddings
        head = self.weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
        return self.hidden(ids, torch.arange(len(ids))) @ head.T


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoder_equals_a_simple_decoder_in_logits_and_loss(variant: str) -> None:
    config = model_config(**VARIANTS[variant])
    model = make_model(config, spread=0.2)
    plain = Plain(config, model)
    tensors = make_batch(config, samples=2, length=17).tensors
    expected = torch.stack([plain.logits(ids) for ids in tensors["input_ids"]])
    logits = model.logits(tensors["input_ids"])
    assert logits.dtype == torch.float32
    scale = expected.abs().max().item()
    assert scale > 0.1
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-5 * max(1.0, scale))
    loss = F.cross_entropy(expected.flatten(0, 1), tensors["labels"].flatten(), reduction="none")
    expected_loss = loss[tensors["loss_mask"].flatten()].sum().item()
    assert loss_of(model, tensors).item() == pytest.approx(expected_loss, rel=2e-6)


@pytest.mark.parametrize("variant", ["llama", "gpt-2", "transformer of 2017"])
def test_decoder_in_double_precision_equals_the_simple_decoder_closely(variant: str) -> None:
    """Only the tables of RoPE and sinusoids are fp32."""
    config = model_config(**VARIANTS[variant])
    model = make_model(config, spread=0.2).double()
    ids = make_batch(config, samples=1, length=20).tensors["input_ids"]
    expected = Plain(config, model).hidden(ids[0], torch.arange(20))
    tolerance = 1e-12 if variant == "gpt-2" else 1e-5
    hidden = model.model(ids, {})[0]
    torch.testing.assert_close(hidden, expected, rtol=0, atol=tolerance)


def test_every_parameter_has_a_gradient() -> None:
    for variant, overrides in VARIANTS.items():
        config = model_config(**overrides)
        model = make_model(config, spread=0.2)
        loss_of(model, make_batch(config, samples=4, length=30).tensors).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, (variant, name)
            assert parameter.grad.abs().max() > 0, (variant, name)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_key_value_heads": 1, "head_dim": 12, "rope_theta": 500000.0, "norm_eps": 1e-6},
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ],
)
def test_decoder_equals_llama_of_transformers(overrides: dict[str, Any]) -> None:
    """The canonical names are exactly those of transformers."""
    transformers = pytest.importorskip("transformers")
    config = model_config(**overrides)
    model = make_model(config, spread=0.2)
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "head_dim",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "rope_theta",
    )
    settings = {name: getattr(config, name) for name in names}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **settings, rms_norm_eps=config.norm_eps, rope_parameters=rope, hidden_act="silu"
        )
    ).eval()
    parameters = dict(theirs.named_parameters())
    assert set(parameters) == set(arch.tensors(config))
    with torch.no_grad():
        for row in arch.parameters(config):
            ours = model.get_parameter(row.name)
            for piece in arch.pieces(row):
                parameters[piece.tensor.name][piece.source] = ours[piece.target]
        ids = make_batch(config, samples=3, length=31).tensors["input_ids"]
        torch.testing.assert_close(model.logits(ids), theirs(ids).logits, rtol=0, atol=1e-5)


# --- packed documents ---

LENGTHS = (5, 1, 9, 3, 6)


def pack(config: ModelConfig, *, seed: int = 3) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return a window of documents, and the documents. The last target of each is masked."""
    generator = torch.Generator().manual_seed(seed)
    documents = [torch.randint(config.vocab_size, (n,), generator=generator) for n in LENGTHS]
    ids = torch.cat(documents)
    mask = torch.ones(len(ids), dtype=torch.bool)
    mask[torch.tensor(LENGTHS).cumsum(0) - 1] = False
    window = {
        "input_ids": ids,
        "labels": ids.roll(-1),
        "loss_mask": mask,
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS]),
        "document_ids": torch.cat([torch.full((n,), i) for i, n in enumerate(LENGTHS)]),
    }
    return {name: tensor[None] for name, tensor in window.items()}, documents


def alone(model: LanguageModel, document: Tensor) -> Tensor:
    """Return the loss of a document in a separate window."""
    return loss_of(
        model,
        {
            "input_ids": document[None, :-1],
            "labels": document[None, 1:],
            "loss_mask": torch.ones(1, len(document) - 1, dtype=torch.bool),
        },
    )


@pytest.mark.parametrize("variant", ["llama", "one head for all", "gpt-2", "transformer of 2017"])
def test_packed_window_equals_its_documents_in_separate_windows(variant: str) -> None:
    config = model_config(**VARIANTS[variant])
    packed, separate = (make_model(config, spread=0.2) for _ in range(2))
    window, documents = pack(config)
    expected = torch.stack([alone(separate, d) for d in documents if len(d) > 1]).sum()
    loss = loss_of(packed, window)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    for (name, ours), theirs in zip(packed.named_parameters(), separate.parameters(), strict=True):
        assert theirs.grad is not None
        atol = 1e-5 * theirs.grad.abs().max().item()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=atol, msg=name)
    # without the mask the loss differs
    del window["document_ids"]
    assert loss_of(packed, window).item() != pytest.approx(expected.item(), rel=1e-4)


def test_packed_samples_of_a_batch_have_separate_boundaries() -> None:
    config = model_config()
    model = make_model(config, spread=0.2)
    windows = [pack(config, seed=seed)[0] for seed in (1, 2)]
    windows[1]["document_ids"] = windows[1]["document_ids"] // 2
    windows[1]["position_ids"] = torch.arange(24)[None]
    both = {name: torch.cat([w[name] for w in windows]) for name in windows[0]}
    expected = sum(loss_of(model, window).item() for window in windows)
    assert loss_of(model, both).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_decoder_does_not_attend_to_later_tokens(masked: bool) -> None:
    config = model_config()
    model = make_model(config, spread=0.2)
    window, _ = pack(config)
    extra = window if masked else {}
    before = model.model(window["input_ids"], extra)
    changed = window["input_ids"].clone()
    changed[0, 7] = (changed[0, 7] + 1) % config.vocab_size  # in the third document, tokens 6 to 14
    moved = (model.model(changed, extra) - before)[0].abs().amax(-1) > 0
    assert moved.nonzero().flatten().tolist() == list(range(7, 15 if masked else 24))


def test_positions_start_at_0_by_default() -> None:
    config = model_config(position_embedding="learned")
    model = make_model(config, spread=0.2)
    ids = make_batch(config, length=12).tensors["input_ids"]
    positions = torch.arange(12).expand(2, 12)
    assert torch.equal(model.model(ids, {}), model.model(ids, {"position_ids": positions}))
    assert not torch.equal(model.model(ids, {"position_ids": positions + 1}), model.model(ids, {}))


@pytest.mark.parametrize("variant", ["llama", "gpt-2", "transformer of 2017"])
def test_positions_of_the_batch_are_used(variant: str) -> None:
    """The samples have different positions, with gaps."""
    config = model_config(**VARIANTS[variant])
    model = make_model(config, spread=0.2)
    ids = make_batch(config, samples=2, length=5).tensors["input_ids"]
    positions = torch.tensor([[0, 3, 4, 11, 30], [2, 2, 7, 1, 0]])
    hidden = model.model(ids, {"position_ids": positions})
    for row in range(2):
        expected = Plain(config, model).hidden(ids[row], positions[row])
        torch.testing.assert_close(hidden[row].double(), expected, rtol=0, atol=1e-5)


def test_rope_depends_only_on_distances() -> None:
    config = model_config()
    model = make_model(config, spread=0.2)
    ids = make_batch(config, length=12).tensors["input_ids"]
    positions = torch.arange(12).expand(2, 12)
    shifted = model.model(ids, {"position_ids": positions + 100})
    torch.testing.assert_close(shifted, model.model(ids, {}), rtol=0, atol=5e-5)


def test_logits_with_last_only_are_those_of_the_last_token() -> None:
    config = model_config()
    model = make_model(config, spread=0.2)
    ids = make_batch(config, length=12).tensors["input_ids"]
    last = model.logits(ids, last_only=True)
    torch.testing.assert_close(last, model.logits(ids)[:, -1], rtol=0, atol=1e-6)


def test_dropout_is_applied_to_embeddings_attention_and_branches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[str, float]] = []

    def dropout(x: Tensor, p: float, training: bool) -> Tensor:
        calls.append(("hidden", p if training else 0.0))
        return x

    attend = F.scaled_dot_product_attention

    def attention(*args: Any, dropout_p: float, **kwargs: Any) -> Tensor:
        calls.append(("attention", dropout_p))
        return attend(*args, **kwargs)

    monkeypatch.setattr(F, "dropout", dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    config = model_config(hidden_dropout=0.25, attention_dropout=0.5)
    model, batch = make_model(config), make_batch(config).tensors
    loss_of(model.train(), batch)
    block = [("attention", 0.5), ("hidden", 0.25), ("hidden", 0.25)]
    assert calls == [("hidden", 0.25), *block, *block]
    calls.clear()
    loss_of(model.eval(), batch)
    assert {p for _, p in calls} == {0.0}


def test_loss_in_bf16_is_near_that_in_fp32() -> None:
    config = model_config()
    model = make_model(config, spread=0.2)
    batch = make_batch(config, samples=4, length=31).tensors
    expected = loss_of(model, batch).item()
    assert loss_of(model.bfloat16(), batch).item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("variant", VARIANTS)
def test_built_model_has_the_names_and_shapes_of_the_table(variant: str) -> None:
    config = model_config(**VARIANTS[variant])
    built = [(name, tuple(p.shape)) for name, p in build(config).named_parameters()]
    assert built == [(p.name, arch.local_shape(p)) for p in arch.parameters(config)]
