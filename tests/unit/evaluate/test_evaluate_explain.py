# covers: megalite/evaluate/explain.py
"""Attributions, occlusion and attention compared with explicit computations."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.errors import CommandError
from megalite.evaluate import explain
from megalite.evaluate.explain import explain_text, input_times_gradient, last_attention
from megalite.evaluate.loading import LoadedModel
from megalite.formats.examples import prefix_and_suffix_ids
from megalite.model import LanguageModel
from megalite.model.attention import Attention
from megalite.model.linear import Embedding
from megalite.model.positions import apply_rope, rope_table
from megalite.tokenizers.tokenizer import load_tokenizer
from tests.helpers.families import model_section
from tests.helpers.models import make_batch, make_model, model_config, run_config
from tests.unit.evaluate.test_evaluate_explain_page import Tags

TEXT = {"decoder": "llama", "encoder": "bert", "encoder_decoder": "t5"}


def tiny(architecture: str, **overrides: Any) -> tuple[LanguageModel, dict[str, Tensor]]:
    config = model_config(**model_section(TEXT[architecture], 1) | overrides)
    batch = dict(make_batch(config).tensors)
    batch["decoder_input_ids"] = batch["input_ids"][:, :3]
    return make_model(config, spread=0.1).eval(), batch


def test_input_times_gradient_of_a_linear_score_sums_to_the_score() -> None:
    embed = Embedding(11, 6)
    torch.nn.init.normal_(embed.weight)
    ids_BT, weight_TD = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]]), torch.randn(4, 6)

    def score() -> Tensor:
        return (embed(ids_BT) * weight_TD)[0].sum() + 7

    parts_T = input_times_gradient(embed, score)
    torch.testing.assert_close(parts_T, (embed.weight[ids_BT[0]] * weight_TD).sum(-1).detach())
    assert float(parts_T.sum()) == pytest.approx(score().item() - 7, abs=1e-5)
    assert not embed._forward_hooks


@pytest.mark.parametrize("architecture", TEXT)
def test_input_times_gradient_is_the_slope_along_the_embeddings(architecture: str) -> None:
    model, batch = tiny(architecture)
    model.double()
    embed = model.model.embed_tokens

    def score() -> Tensor:
        return model.hidden(batch)[0, -1].sin().sum()

    with torch.inference_mode():
        parts_T = input_times_gradient(embed, score)
    assert parts_T.dtype == torch.float32
    assert embed.weight.grad is None
    step, slopes = 1e-4, []
    for place in range(batch["input_ids"].shape[1]):

        def moved(factor: float, place: int = place) -> float:
            """Return the score with one token's embedding scaled by 1 + `factor`."""
            calls: list[int] = []

            def scale(_: Any, __: Any, output: Tensor) -> Tensor:
                calls.append(1)
                at = torch.zeros(output.shape[1], 1, dtype=output.dtype)
                at[place % len(at)] = factor if len(calls) == 1 else 0.0
                return output * (1 + at)

            handle = embed.register_forward_hook(scale)
            with torch.no_grad():
                value = float(score())
            handle.remove()
            return value

        slopes.append((moved(step) - moved(-step)) / (2 * step))
    torch.testing.assert_close(parts_T, torch.tensor(slopes), rtol=1e-3, atol=1e-6)
    assert float(parts_T.abs().max()) > 1e-3


def explicit_weights(
    q_TNH: Tensor, k_SKH: Tensor, scale: float, sees: Callable[[int, int], bool]
) -> Any:
    """Return the weights [T, S], the mean over heads, computed one by one."""
    (T, N, _), (S, K, _) = q_TNH.shape, k_SKH.shape
    total = [[0.0] * S for _ in range(T)]
    for head in range(N):
        for t in range(T):
            powers = [
                math.exp(scale * float(q_TNH[t, head] @ k_SKH[s, head * K // N]))
                if sees(t, s)
                else 0.0
                for s in range(S)
            ]
            for s in range(S):
                total[t][s] += powers[s] / sum(powers) / N
    return torch.tensor(total)


@pytest.mark.parametrize(
    ("architecture", "window", "scale"),
    [("decoder", None, None), ("decoder", 3, 0.3), ("encoder", None, None)],
)
def test_last_attention_equals_the_weights_of_each_position(
    architecture: str, window: int | None, scale: float | None
) -> None:
    model, batch = tiny(architecture, sliding_window=window, attention_multiplier=scale)
    config, attention = model.config, list(model.blocks)[-1].self_attn
    assert isinstance(attention, Attention)
    inputs: list[Tensor] = []
    handle = attention.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))

    def run() -> None:
        model.hidden(batch)

    with torch.no_grad():
        rows = [last_attention(model, run, position) for position in range(8)]
        heads = (attention.heads, attention.kv_heads, attention.kv_heads)
        qkv = attention.qkv_proj(inputs[0]).unflatten(-1, (sum(heads), -1))
        q, k, _ = qkv.split(heads, dim=2)
        if config.position_embedding == "rope":
            table = rope_table(torch.arange(8), config)
            q, k = apply_rope(q, table), apply_rope(k, table)
    handle.remove()
    causal = architecture == "decoder"

    def sees(t: int, s: int) -> bool:
        return not causal or (s <= t and (window is None or t - s < window))

    expected = explicit_weights(q[0], k[0], scale or 1 / math.sqrt(config.head_dim), sees)
    torch.testing.assert_close(torch.stack(rows), expected, rtol=1e-4, atol=1e-5)
    for position, row in enumerate(rows):
        assert float(row.sum()) == pytest.approx(1, abs=1e-5)
        assert not causal or float(row[position + 1 :].abs().sum()) == 0
    torch.testing.assert_close(last_attention(model, run, None), expected.mean(0))
    torch.testing.assert_close(last_attention(model, run, -1), expected[-1])


def test_decoder_of_these_tests_has_grouped_heads() -> None:
    config = tiny("decoder")[0].config
    assert config.num_key_value_heads < config.num_attention_heads


def test_last_attention_to_padding_is_zero() -> None:
    model, batch = tiny("encoder")
    batch["attention_mask"] = torch.ones(2, 8, dtype=torch.bool)
    batch["attention_mask"][0, 6:] = False
    row = last_attention(model, lambda: model.hidden(batch), 0)
    assert row[6:].tolist() == [0, 0]
    assert float(row.sum()) == pytest.approx(1, abs=1e-5)


def test_last_attention_of_two_stacks_is_cross_attention() -> None:
    model, batch = tiny("encoder_decoder")
    rows = [last_attention(model, lambda: model.hidden(batch), place) for place in range(3)]
    assert [len(row) for row in rows] == [8, 8, 8]
    block = list(model.blocks)[-1]
    weights = torch.stack(rows)
    inputs: list[Any] = []
    handle = block.cross_attn.register_forward_hook(lambda *arguments: inputs.append(arguments[1:]))
    with torch.no_grad():
        model.hidden(batch)
        (x_BTD, memory_BSD, _, _), _ = inputs[0]
        attention = block.cross_attn
        q = attention.q_proj(x_BTD).unflatten(-1, (-1, attention.head_width))
        k = attention.kv_proj(memory_BSD).unflatten(-1, (-1, attention.head_width))
    handle.remove()
    expected = explicit_weights(
        q[0], k[0, :, : attention.kv_heads], attention.scale, lambda t, s: True
    )
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)


def test_last_attention_includes_relative_position_biases() -> None:
    model, batch = tiny("encoder_decoder")
    seen: list[tuple[Any, ...]] = []

    class Alone:
        """A model of the encoder's blocks only."""

        blocks = model.model.encoder.layers  # type: ignore[union-attr]

    def run() -> None:
        model.hidden(batch)

    handle = Alone.blocks[-1].self_attn.register_forward_pre_hook(lambda _, args: seen.append(args))
    row = last_attention(Alone(), run, 2)  # type: ignore[arg-type]
    handle.remove()
    attention = Alone.blocks[-1].self_attn
    x_BTD, _, bias, *_ = seen[0]
    heads, width = attention.heads, attention.head_width
    qkv = attention.qkv_proj(x_BTD)[0].unflatten(-1, (-1, width))
    q, k = qkv[2, :heads], qkv[:, heads : heads + attention.kv_heads]
    k = k.repeat_interleave(heads // attention.kv_heads, dim=1)
    scores = torch.einsum("nh,snh->ns", q, k) * attention.scale + bias[0, :, 2]
    torch.testing.assert_close(row, scores.softmax(-1).mean(0).detach())


def test_last_attention_removes_its_hooks_after_an_error() -> None:
    model, batch = tiny("decoder")
    batch["input_ids"] = batch["input_ids"] + 10**6
    with pytest.raises(IndexError):
        last_attention(model, lambda: model.hidden(batch), 0)
    assert not any(module._forward_pre_hooks for module in model.modules())


def classifier(architecture: str, pooling: str, **data: Any) -> LoadedModel:
    """Return a fine-tuned classifier with a byte tokenizer and random weights."""
    section = model_section(TEXT[architecture], 1) | {
        "vocab_size": 258,
        "num_labels": 3,
        "classifier_pooling": pooling,
        "max_position_embeddings": 64,
    }
    if architecture == "encoder_decoder":
        section["decoder_start_token_id"] = 257
    config = model_config(**section)
    run = run_config(
        name="tiny",
        model=section,
        data={"train": [], "sequence_length": 64},
        finetune={
            "task": "classification",
            "data": {"path": "x", "max_length": 64, "labels": ["neg", "neu", "pos"]} | data,
        },
    )
    model = make_model(config, spread=0.3).eval()
    tokenizer = load_tokenizer("bytes")
    device = torch.device("cpu")
    place = Path("runs/tiny/checkpoints/step_00000003")
    return LoadedModel(place, config, config, run, model, tokenizer, place, "", device)


@pytest.mark.parametrize(
    ("architecture", "pooling"),
    [("decoder", "last"), ("encoder", "first"), ("encoder", "mean"), ("encoder_decoder", "first")],
)
def test_occlusion_is_the_loss_of_the_score_without_each_token(
    architecture: str, pooling: str
) -> None:
    opened = classifier(architecture, pooling)
    ids = list(b"a text to read")
    before, after = prefix_and_suffix_ids(opened.tokenizer, add_bos=architecture == "encoder")

    def score(part: list[int]) -> float:
        batch = explain._batch(opened, [[*before, *part, *after]])
        chance = opened.model.label_scores(batch)[0].double().softmax(-1)[1]
        return float(torch.log(chance / (1 - chance)))

    with torch.no_grad():
        expected = [score(ids) - score(ids[:n] + ids[n + 1 :]) for n in range(len(ids))]
        losses = explain._occlusion(opened, before, ids, after, 1)
    assert losses == pytest.approx(expected, abs=1e-4)
    assert max(map(abs, expected)) > 1e-3


def test_occlusion_of_a_long_text_removes_tokens_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain, "_GROUPS", 4)
    opened, ids = classifier("encoder", "mean"), list(b"ten bytes.")
    losses = explain._occlusion(opened, [], ids, [], 0)
    assert losses is not None
    with torch.no_grad():
        scores = [
            explain.log_odds(opened.model.label_scores(explain._batch(opened, [part])), 0).item()
            for part in (ids, ids[3:], ids[:9])
        ]
    assert losses[0] == losses[1] == losses[2] == pytest.approx(scores[0] - scores[1], abs=1e-5)
    assert losses[9] == pytest.approx(scores[0] - scores[2], abs=1e-5)
    assert explain._occlusion(opened, [], ids[:1], [], 0) is None


def test_even_attention_depends_only_on_the_mask() -> None:
    """With a causal mask, the mean over all tokens is larger for the first ones."""
    model, batch = tiny("decoder")
    even = last_attention(model, lambda: model.hidden(batch), None, even=True)
    expected = [sum(1 / (t + 1) for t in range(s, 8)) / 8 for s in range(8)]
    assert even.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("architecture", TEXT)
def test_explain_text_returns_the_page_of_a_label(architecture: str) -> None:
    """The page has no special tokens, but all spaces."""
    pooling = "last" if architecture == "decoder" else "first"
    opened = classifier(architecture, pooling)
    text = "good é film"
    page = Tags(explain_text(opened, text, "pos"))
    spans = [attributes for _, attributes in page.tags if "title" in attributes]
    assert len(spans) == 3 * len(text.encode())
    assert "Explainedpos" in page.text
    assert "Runtiny" in page.text
    assert f"{len(text.encode())} tokens" in page.text
    assert page.text.count(text) == 4  # once plain, and three times coloured
    longer = explain_text(classifier(architecture, pooling, max_length=8), text)
    assert "are not read (max_length)" in longer
    message = "--label bad: the model has no such label; give one of neg, neu, pos"
    with pytest.raises(CommandError, match=message):
        explain_text(opened, text, "bad")
    with pytest.raises(CommandError, match="the text is empty"):
        explain_text(opened, "")
