# covers: megalite/model/loss.py megalite/model/heads.py
"""The fused head and loss compared with F.cross_entropy of full logits in float64."""

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

R, D, V = 200, 12, 37  # three chunks of 64 rows and a rest of 8


class Ops(TorchDispatchMode):
    """Recorder of the names of operators, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func.overloadpacket).removeprefix("aten."))
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["one chunk", "four chunks"], autouse=True)
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test with one chunk, and with chunks of the smallest size."""
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
    """Return the loss and the gradients in float64, from full logits."""
    h = hidden.detach().double().requires_grad_()
    w = weight.detach().double().requires_grad_()
    each = F.cross_entropy(h @ w.t(), labels, reduction="none")
    total = each[mask].sum()
    (total * scale).backward()
    assert h.grad is not None
    assert w.grad is not None
    return total.detach(), h.grad, w.grad


def close(value: Tensor | None, expected: Tensor, tolerance: float = 1e-5) -> bool:
    """Return whether the error is within `tolerance` x the largest element."""
    assert value is not None
    error = (value.double() - expected).abs().max()
    return bool(error <= tolerance * max(1e-30, expected.abs().max()))


Loss = Callable[..., Tensor]


COMPILED = pytest.param(
    True, marks=pytest.mark.skipif(not has_compiler(), reason="torch.compile needs a C++ compiler")
)


@pytest.fixture(params=[False, COMPILED], ids=["eager", "compiled"])
def fused(request: pytest.FixtureRequest) -> Loss:
    """Return the function under test, eager and compiled."""
    options = HeadOptions(compiled=request.param)
    return lambda *tensors: linear_cross_entropy(*tensors, options=options)


def test_fused_loss_equals_the_loss_of_full_logits(fused: Loss) -> None:
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
def test_backward_scales_the_gradients(scale: float) -> None:
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


def test_fused_loss_of_masked_rows_is_zero(fused: Loss) -> None:
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


def test_masked_row_has_no_effect_even_if_its_loss_is_huge() -> None:
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
def test_fused_loss_computes_only_required_gradients(fused: Loss, wanted: str) -> None:
    hidden, weight, labels, mask = make(6)
    expected, *gradients = oracle(hidden, weight, labels, mask)
    hidden.requires_grad_(wanted == "hidden")
    weight.requires_grad_(wanted == "weight")
    loss = fused(hidden, weight, labels, mask)
    assert close(loss, expected, 1e-6)
    assert loss.requires_grad == (wanted != "neither")
    if wanted != "neither":
        loss.backward()
        gradient_pairs = {
            "hidden": (hidden.grad, gradients[0]),
            "weight": (weight.grad, gradients[1]),
        }
        assert close(*gradient_pairs[wanted])


def test_evaluation_computes_no_gradient() -> None:
    """Without autograd there is one product per chunk, and no [V, D] gradient."""
    hidden, weight, labels, mask = make(7)
    weight.requires_grad_()
    with torch.no_grad(), Ops() as ops:
        head_loss(hidden[None], weight, labels[None], mask[None])
    products = [name for name in ops.names if name in ("mm", "addmm", "addmm_", "matmul")]
    assert len(products) == -(-R // chunk_rows(V))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_loss_of_half_precision_is_fp32(fused: Loss, dtype: torch.dtype) -> None:
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


def test_gradients_of_many_chunks_are_summed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are 300 equal contributions. A sum in bf16 stops growing at 256."""
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
    """The factor 1 / N is applied after the loss scale. Otherwise p / N would underflow."""
    hidden, weight, labels, mask = make(9, spread=0.01)
    hidden, weight = hidden.half(), (0.01 * weight).half().requires_grad_()
    divisor, loss_scale = 2.0**22, 2.0**22
    loss = fused(hidden, weight, labels, mask)
    (loss / divisor * loss_scale).backward()
    assert close(weight.grad, oracle(hidden, weight, labels, mask)[2], 2e-2)


def test_second_backward_fails_or_is_correct() -> None:
    hidden, weight, labels, mask = make(10)
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, mask)
    loss.backward(retain_graph=True)
    assert weight.grad is not None
    once = weight.grad.clone()
    try:
        loss.backward()
    except (RuntimeError, AssertionError):
        return
    assert close(weight.grad, 2 * once.double())


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 128, 129])
def test_fused_loss_is_correct_for_rows_near_the_size_of_a_chunk(fused: Loss, rows: int) -> None:
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
def test_chunk_rows_fill_the_memory_in_multiples_of_64(
    monkeypatch: pytest.MonkeyPatch, elements: int, vocabulary: int, rows: int
) -> None:
    monkeypatch.setattr(ends, "_CHUNK_ELEMENTS", elements)
    assert chunk_rows(vocabulary) == rows


@pytest.mark.parametrize("fused_", [False, True])
def test_label_smoothing_equals_that_of_torch_in_training_only(fused_: bool) -> None:
    if fused_ and not has_compiler():
        pytest.skip("nothing here compiles")
    hidden, weight, labels, mask = make()
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    expected = F.cross_entropy(h @ w.t(), labels, reduction="none", label_smoothing=0.2)[mask].sum()
    (3 * expected).backward()
    hidden.requires_grad_(), weight.requires_grad_()
    loss = head_loss(hidden, weight, labels, mask, compiled=fused_, smoothing=0.2)
    (3 * loss).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for ours, theirs in ((hidden.grad, h.grad), (weight.grad, w.grad)):
        assert ours is not None
        assert theirs is not None
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # evaluation does not smooth
        plain = F.cross_entropy(hidden @ weight.t(), labels, reduction="none")[mask].sum()
        torch.testing.assert_close(
            head_loss(hidden, weight, labels, mask, smoothing=0.2), plain, rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("tied", [False, True])
def test_loss_of_a_model_equals_cross_entropy_of_its_logits(tied: bool) -> None:
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
    parameters = dict(fused.named_parameters())
    assert ("lm_head.weight" in parameters) != tied
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        assert close(parameters[name].grad, parameter.grad.double(), 2e-5), name


@pytest.mark.parametrize("architecture", ["decoder", "encoder", "encoder_decoder"])
def test_target_rows_give_the_loss_and_gradients_of_all_rows(architecture: str) -> None:
    """They may include masked rows, also repeatedly."""
    config = model_config(architecture=architecture)
    model = make_model(config, spread=0.1)
    tensors = dict(make_batch(config, samples=3, length=40).tensors)
    if architecture == "encoder_decoder":
        tensors["decoder_input_ids"] = tensors["input_ids"]
    mask_R = tensors["loss_mask"].reshape(-1)
    filler = int(mask_R.int().argmin())
    chosen = torch.cat((mask_R.nonzero()[:, 0], torch.tensor([filler] * 3)))
    results = []
    for batch in (tensors, tensors | {"target_rows": chosen}):
        model.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])  # type: ignore[union-attr]
    for whole, part in zip(*results, strict=True):
        torch.testing.assert_close(part, whole, rtol=2e-5, atol=2e-6)
