# covers: megalite/model/loss.py megalite/model/heads.py
"""The fused head and loss against F.cross_entropy over whole logits in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megalite.arch import chunk_rows, ends
from megalite.env import has_compiler
from megalite.model.heads import head_loss
from megalite.model.loss import HeadOptions, linear_cross_entropy
from tests.helpers.models import loss_of, make_batch, make_model, model_config

R, D, V = 200, 12, 37  # chunks of 64 rows: three and a rest of 8


class Ops(TorchDispatchMode):
    """Names of the operators called inside, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func.overloadpacket).removeprefix("aten."))
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["one chunk", "four chunks"], autouse=True)
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs whole and in chunks of the smallest size."""
    if request.param == "four chunks":
        monkeypatch.setattr(ends, "_CHUNK_ELEMENTS", 1)
        assert chunk_rows(V) == 64


def make(seed: int = 0, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = spread * torch.randn(R, D, generator=generator)
    weight = torch.randn(V, D, generator=generator)
    labels = torch.randint(V, (R,), generator=generator)
    return hidden, weight, labels, torch.rand(R, generator=generator) < 0.7


def oracle(
    hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients in float64, from whole logits."""
    h = hidden.detach().double().requires_grad_()
    w = weight.detach().double().requires_grad_()
    each = F.cross_entropy(h @ w.t(), labels, reduction="none")
    total = each[mask].sum()
    (total * scale).backward()
    assert h.grad is not None
    assert w.grad is not None
    return total.detach(), h.grad, w.grad


def close(found: Tensor | None, expected: Tensor, tolerance: float = 1e-5) -> bool:
    """Within `tolerance` of the largest element."""
    assert found is not None
    error = (found.double() - expected).abs().max()
    return bool(error <= tolerance * max(1e-30, expected.abs().max()))


Loss = Callable[..., Tensor]


COMPILED = pytest.param(
    True, marks=pytest.mark.skipif(not has_compiler(), reason="torch.compile needs a C++ compiler")
)


@pytest.fixture(params=[False, COMPILED], ids=["eager", "compiled"])
def fused(request: pytest.FixtureRequest) -> Loss:
    """The function under test, in both of its forms."""
    options = HeadOptions(compiled=request.param)
    return lambda *tensors: linear_cross_entropy(*tensors, options=options)


def test_value_and_gradients(fused: Loss) -> None:
    hidden, weight, labels, mask = make()
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = fused(hidden, weight, labels, mask)
    loss.backward()
    expected, grad_hidden, grad_weight = oracle(hidden, weight, labels, mask)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert close(loss, expected, 1e-6)
    assert close(hidden.grad, grad_hidden)
    assert close(weight.grad, grad_weight)
    assert hidden.grad is not None
    assert not hidden.grad[~mask].any()


@pytest.mark.parametrize("scale", [1 / 8192, 65536.0])
def test_the_backward_scales(scale: float) -> None:
    hidden, weight, labels, mask = make(1)
    hidden.requires_grad_()
    weight.requires_grad_()
    (linear_cross_entropy(hidden, weight, labels, mask) * scale).backward()
    _, grad_hidden, grad_weight = oracle(hidden, weight, labels, mask, scale)
    assert close(hidden.grad, grad_hidden)
    assert close(weight.grad, grad_weight)


def test_gradients_add_up_over_micro_batches() -> None:
    hidden, weight, labels, mask = make(2)
    weight.requires_grad_()
    for part in (slice(0, 70), slice(70, R)):
        loss = linear_cross_entropy(hidden[part], weight, labels[part], mask[part])
        (loss / 3).backward()
    assert close(weight.grad, oracle(hidden, weight, labels, mask, 1 / 3)[2])


def test_all_rows_masked_is_nothing(fused: Loss) -> None:
    hidden, weight, labels, mask = make(3)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = fused(hidden, weight, labels, torch.zeros_like(mask))
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_a_masked_row_may_hold_any_label_and_any_size() -> None:
    """A row that does not count changes nothing, even where its own loss is huge."""
    hidden, weight, labels, mask = make(4)
    loss = linear_cross_entropy(hidden, weight, labels, mask)
    hidden[~mask] *= 1e4
    labels[~mask] = 0
    assert linear_cross_entropy(hidden, weight, labels, mask).item() == loss.item()


def test_logits_of_a_thousand_do_not_overflow(fused: Loss) -> None:
    hidden, weight, labels, mask = make(5, spread=300.0)
    hidden.requires_grad_()
    loss = fused(hidden, weight, labels, mask)
    loss.backward()
    expected, grad_hidden, _ = oracle(hidden, weight, labels, mask)
    assert expected > 1e5
    assert close(loss, expected, 1e-5)
    assert close(hidden.grad, grad_hidden, 1e-3)  # differences of logits of 1e3, in fp32


@pytest.mark.parametrize("wanted", ["hidden", "weight", "neither"])
def test_only_the_gradients_asked_for(fused: Loss, wanted: str) -> None:
    hidden, weight, labels, mask = make(6)
    expected, *gradients = oracle(hidden, weight, labels, mask)
    hidden.requires_grad_(wanted == "hidden")
    weight.requires_grad_(wanted == "weight")
    loss = fused(hidden, weight, labels, mask)
    assert close(loss, expected, 1e-6)
    assert loss.requires_grad == (wanted != "neither")
    if wanted != "neither":
        loss.backward()
        given = {"hidden": (hidden.grad, gradients[0]), "weight": (weight.grad, gradients[1])}
        assert close(*given[wanted])


def test_evaluation_makes_no_gradient() -> None:
    """Without autograd one product a chunk is enough, and no [V, D] of gradients is allocated."""
    hidden, weight, labels, mask = make(7)
    weight.requires_grad_()
    with torch.no_grad(), Ops() as ops:
        head_loss(hidden[None], weight, labels[None], mask[None])
    products = [name for name in ops.names if name in ("mm", "addmm", "addmm_", "matmul")]
    assert len(products) == -(-R // chunk_rows(V))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_an_fp32_loss_and_sum(fused: Loss, dtype: torch.dtype) -> None:
    hidden, weight, labels, mask = make(8)
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    loss = fused(hidden, weight, labels, mask)
    loss.backward()
    expected, grad_hidden, grad_weight = oracle(hidden, weight, labels, mask)
    assert loss.dtype == torch.float32
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == dtype
    assert close(loss, expected, 5e-3)
    assert close(hidden.grad, grad_hidden, 2e-2)
    assert close(weight.grad, grad_weight, 2e-2)


def test_many_chunks_add_up_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 equal contributions: a sum in bf16 stops growing at 256 of them."""
    monkeypatch.setattr(ends, "_CHUNK_ELEMENTS", 1)
    rows = 300 * 64
    hidden = torch.ones(rows, 2, dtype=torch.bfloat16)
    weight = torch.zeros(3, 2, dtype=torch.bfloat16, requires_grad=True)
    mask = torch.ones(rows, dtype=torch.bool)
    loss = linear_cross_entropy(hidden, weight, torch.zeros(rows, dtype=torch.long), mask)
    loss.backward()
    expected = torch.tensor([[-2 / 3], [1 / 3], [1 / 3]], dtype=torch.float64).expand(3, 2) * rows
    assert close(weight.grad, expected, 1e-2)


def test_small_gradients_survive_fp16(fused: Loss) -> None:
    """A mean's 1 / N is applied after fp16's loss scale: before it, p / N would be zero."""
    hidden, weight, labels, mask = make(9, spread=0.01)
    hidden, weight = hidden.half(), (0.01 * weight).half().requires_grad_()
    divisor, loss_scale = 2.0**22, 2.0**22
    loss = fused(hidden, weight, labels, mask)
    (loss / divisor * loss_scale).backward()
    assert close(weight.grad, oracle(hidden, weight, labels, mask)[2], 2e-2)


def test_a_second_backward_is_never_silently_empty() -> None:
    hidden, weight, labels, mask = make(10)
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, mask)
    loss.backward(retain_graph=True)
    assert weight.grad is not None
    once = weight.grad.clone()
    try:
        loss.backward()
    except (RuntimeError, AssertionError):
        return  # said so
    assert close(weight.grad, 2 * once.double())


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 128, 129])
def test_rows_around_a_chunk(fused: Loss, rows: int) -> None:
    hidden, weight, labels, mask = (make(11)[0][:rows], *make(11)[1:])
    labels, mask = labels[:rows], mask[:rows]
    weight.requires_grad_()
    loss = fused(hidden, weight, labels, mask)
    loss.backward()
    expected, _, grad_weight = oracle(hidden, weight, labels, mask)
    assert close(loss, expected, 1e-6)
    assert close(weight.grad, grad_weight)


@pytest.mark.parametrize(
    ("elements", "vocabulary", "rows"),
    [(1 << 25, 32000, 1024), (1 << 25, 1 << 30, 64), (1 << 25, 1, 1 << 25), (640, 5, 128)],
)
def test_chunk_rows(
    monkeypatch: pytest.MonkeyPatch, elements: int, vocabulary: int, rows: int
) -> None:
    monkeypatch.setattr(ends, "_CHUNK_ELEMENTS", elements)
    assert chunk_rows(vocabulary) == rows


@pytest.mark.parametrize("fused_", [False, True])
def test_a_part_of_the_target_is_spread(fused_: bool) -> None:
    if fused_ and not has_compiler():
        pytest.skip("nothing here compiles")
    hidden, weight, labels, mask = make()
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    wanted = F.cross_entropy(h @ w.t(), labels, reduction="none", label_smoothing=0.2)[mask].sum()
    (3 * wanted).backward()
    hidden.requires_grad_(), weight.requires_grad_()
    found = head_loss(hidden, weight, labels, mask, compiled=fused_, smoothing=0.2)
    (3 * found).backward()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=0)
    for ours, theirs in ((hidden.grad, h.grad), (weight.grad, w.grad)):
        assert ours is not None
        assert theirs is not None
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # an evaluation spreads nothing
        plain = F.cross_entropy(hidden @ weight.t(), labels, reduction="none")[mask].sum()
        torch.testing.assert_close(
            head_loss(hidden, weight, labels, mask, smoothing=0.2), plain, rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("tied", [False, True])
def test_the_models_loss_and_every_gradient(tied: bool) -> None:
    """`forward` and `logits` + F.cross_entropy are the same function of the parameters."""
    config = model_config(tie_word_embeddings=tied)
    fused, plain = (make_model(config, spread=0.1) for _ in range(2))
    tensors = make_batch(config, samples=6, length=24).tensors
    loss = loss_of(fused, tensors)
    (loss / 50).backward()
    labels, mask = tensors["labels"].flatten(), tensors["loss_mask"].flatten()
    logits = plain.logits(tensors["input_ids"]).flatten(0, 1)
    expected = (F.cross_entropy(logits, labels, reduction="none") * mask).sum()
    (expected / 50).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    found = dict(fused.named_parameters())
    assert ("lm_head.weight" in found) != tied
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        assert close(found[name].grad, parameter.grad.double(), 2e-5), name


@pytest.mark.parametrize("architecture", ["decoder", "encoder", "encoder_decoder"])
def test_chosen_rows_give_the_loss_and_gradients_of_all(architecture: str) -> None:
    """Rows that do not count may be among them, and more than once."""
    config = model_config(architecture=architecture)
    model = make_model(config, spread=0.1)
    tensors = dict(make_batch(config, samples=3, length=40).tensors)
    if architecture == "encoder_decoder":
        tensors["decoder_input_ids"] = tensors["input_ids"]
    mask_R = tensors["loss_mask"].reshape(-1)
    filler = int(mask_R.int().argmin())
    chosen = torch.cat((mask_R.nonzero()[:, 0], torch.tensor([filler] * 3)))
    found = []
    for batch in (tensors, tensors | {"target_rows": chosen}):
        model.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])  # type: ignore[union-attr]
    for whole, part in zip(*found, strict=True):
        torch.testing.assert_close(part, whole, rtol=2e-5, atol=2e-6)
