"""Explanation of a classification: each token's contribution to the score, and attention.

T tokens   S tokens that are attended to   N query heads   K key/value heads   H head width
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from megalite.errors import CommandError
from megalite.evaluate.explain_page import Explanation, explain_page
from megalite.evaluate.loading import LoadedModel
from megalite.formats.examples import prefix_and_suffix_ids
from megalite.model import LanguageModel
from megalite.model.attention import CrossAttention

_BATCH = 16  # texts of a batch for the occlusion
_GROUPS = 256  # maximum texts for the occlusion; tokens of longer texts are removed in groups


def input_times_gradient(embed: nn.Module, score: Callable[[], Tensor]) -> Tensor:
    """Return each token's first-order contribution to a score: fp32 [T] of the first sample.

    The method is embedding times gradient (Simonyan et al. 2013; Shrikumar et al. 2016).

    Args:
        embed: module of the embeddings [B, T, D]; the output of its first call is used.
        score: runs the model and returns a scalar.
    """
    embeddings: list[Tensor] = []

    def record(_: nn.Module, __: Any, output: Tensor) -> Tensor | None:
        if embeddings:
            return None
        embeddings.append(output.detach().requires_grad_())
        return embeddings[0]

    handle = embed.register_forward_hook(record)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            (gradient,) = torch.autograd.grad(score(), embeddings)
    finally:
        handle.remove()
    return (embeddings[0].detach().float() * gradient.float()).sum(dim=-1)[0]


def explain_text(loaded: LoadedModel, text: str, label: str | None = None) -> str:
    """Return an HTML page that explains a classifier's prediction for a text.

    Args:
        label: label to explain. None means the predicted label.
    Raises:
        CommandError: the model is no classifier, the label is unknown, or the text is empty.
    """
    config = loaded.config
    run = loaded.run
    if not config.num_labels or run is None or run.finetune is None:
        raise CommandError(
            f"{loaded.folder} is no classifier: give a classifier that MegaLite fine-tuned"
        )
    names = run.finetune.data.labels or ()
    if label is not None and label not in names:
        raise CommandError(
            f"--label {label}: the model has no such label; give one of {', '.join(names)}"
        )
    ids, spans = loaded.tokenizer.encode_with_offsets(text, [(0, len(text))])
    loaded.check_ids(ids)
    before, after = prefix_and_suffix_ids(
        loaded.tokenizer, add_bos=config.architecture == "encoder"
    )
    room = run.finetune.data.max_length - len(before) - len(after)
    cut = max(0, len(ids) - room)
    ids = ids[:room]
    spans = spans[:room]
    if not ids:
        raise CommandError("the text is empty; give a text")
    batch = _batch(loaded, [[*before, *ids, *after]])
    model: Any = loaded.model
    with torch.no_grad():
        logits = model.label_scores(batch)[0]
    chances = logits.softmax(dim=-1).tolist()
    predicted = int(logits.argmax())
    place = names.index(label) if label else predicted
    inner = slice(len(before), len(before) + len(ids))  # without BOS and EOS
    gradient = input_times_gradient(
        model.model.embed_tokens, lambda: log_odds(model.label_scores(batch), place)[0]
    )
    positions = {"mean": None, "first": 0, "last": batch["input_ids"].shape[1] - 1}
    at = positions[config.classifier_pooling]
    attention = last_attention(model, lambda: model.label_scores(batch), at)
    even = last_attention(model, lambda: model.label_scores(batch), at, even=True)
    return explain_page(
        Explanation(
            text=text,
            label=names[place],
            log_odds=float(log_odds(logits[None], place)),
            probabilities=dict(zip(names, chances, strict=True)),
            facts=_facts(loaded, len(ids), cut),
            pieces=_pieces(text, spans),
            gradient=gradient[inner].tolist(),
            occlusion=_occlusion(loaded, before, ids, after, place),
            attention=(attention / even.clamp_min(1e-9))[inner].tolist(),
            special_attention=1 - float(attention[inner].sum()),
        )
    )


def _pieces(text: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    """Return the text of each token, with skipped characters before it, such as spaces.

    If several tokens share a character, it belongs to the first one.
    """
    pieces = []
    end = 0
    for _, stop in spans:
        pieces.append(text[end:stop])
        end = max(end, stop)
    return pieces


def _facts(loaded: LoadedModel, tokens: int, cut: int) -> dict[str, str]:
    """Return the facts about model and text for the page."""
    config = loaded.config
    run = loaded.run
    assert run is not None
    count = sum(parameter.numel() for parameter in loaded.model.parameters())
    length = f"{tokens} tokens" + (f"; the last {cut} are not read (max_length)" if cut else "")
    return {
        "Run": run.name,
        "Checkpoint": str(loaded.folder),
        "Model": f"{config.architecture}, {config.num_hidden_layers} layers of "
        f"{config.hidden_size}, {count:,} parameters",
        "Text": length,
    }


def _batch(loaded: LoadedModel, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Return the batch of texts of one length: input_ids int64 [B, T], lengths int64 [B]."""
    device = loaded.device
    config = loaded.config
    ids_BT = torch.tensor(rows, device=device)
    batch = {"input_ids": ids_BT, "lengths": torch.full_like(ids_BT[:, 0], ids_BT.shape[1])}
    if config.architecture == "encoder_decoder":
        start = config.decoder_start_token_id
        batch["decoder_input_ids"] = torch.full((len(rows), 1), start, device=device)
    return batch


def log_odds(logits_BC: Tensor, place: int) -> Tensor:
    """Return the log-odds of a label, ln(p / (1 - p)): fp32 [B].

    Args:
        place: index of the label.
    """
    if logits_BC.shape[1] == 1:
        return logits_BC[:, 0]
    others = torch.cat((logits_BC[:, :place], logits_BC[:, place + 1 :]), dim=1)
    return logits_BC[:, place] - others.logsumexp(dim=1)


def _occlusion(
    loaded: LoadedModel,
    before: Sequence[int],
    ids: Sequence[int],
    after: Sequence[int],
    place: int,
) -> list[float] | None:
    """Return by how much the log-odds fall if each token is removed.

    The tokens of a long text are removed in groups, and each token gets its group's value. The
    result is None if there is only one token.
    """
    model: Any = loaded.model
    size = -(-len(ids) // _GROUPS)
    starts = range(0, len(ids), size)
    if len(starts) < 2:
        return None
    losses: dict[int, float] = {}
    with torch.no_grad():
        whole = log_odds(model.label_scores(_batch(loaded, [[*before, *ids, *after]])), place)
        short = {n: [*before, *ids[:n], *ids[n + size :], *after] for n in starts}
        by_length = sorted(starts, key=lambda n: len(short[n]))
        for _, same in groupby(by_length, key=lambda n: len(short[n])):
            group = list(same)
            for first in range(0, len(group), _BATCH):
                some = group[first : first + _BATCH]
                scores = model.label_scores(_batch(loaded, [short[n] for n in some]))
                values = (whole - log_odds(scores, place)).tolist()
                losses |= dict(zip(some, values, strict=True))
    return [losses[n // size * size] for n in range(len(ids))]


def last_attention(
    model: LanguageModel,
    run: Callable[[], object],
    position: int | None,
    *,
    even: bool = False,
) -> Tensor:
    """Return the last block's attention weights: fp32 [S] of the first sample, with sum 1.

    They are the mean over this rank's heads of self-attention, or of cross-attention if the model
    has two stacks.

    Args:
        run: runs the model; its last pass is used.
        position: the token that attends. None means the mean over all tokens.
        even: if true, use equal queries, so that only mask and positions have an effect.
    """
    block = list(model.blocks)[-1]
    branch = block.cross_attn or block.self_attn
    last_call: list[tuple[Any, ...]] = []

    def record(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        last_call[:] = [inputs]

    handle = branch.register_forward_pre_hook(record)
    try:
        run()
    finally:
        handle.remove()
    x_BTD, context, mask, *_ = last_call[0]
    with torch.no_grad():
        if isinstance(branch, CrossAttention):
            q_BTNH = branch.project_queries(x_BTD)
            k_BKSH, _ = branch.project_memory(context)
        else:
            q_BTNH, k_BKSH, _ = branch.project(x_BTD, context)
        q_BTNH = torch.zeros_like(q_BTNH) if even else q_BTNH
        return _weights(
            q_BTNH,
            k_BKSH,
            mask,
            position=position,
            causal=branch.causal,
            scale=branch.scale,
        )


def _weights(
    q_BTNH: Tensor,
    k_BKSH: Tensor,
    mask: Tensor | None,
    *,
    position: int | None,
    causal: bool,
    scale: float | None,
) -> Tensor:
    """Return the mean over heads and queries of softmax(scale q k^T + mask), first sample: [S]."""
    (B, T, N, H) = q_BTNH.shape
    (K, S) = k_BKSH.shape[1:3]
    device = q_BTNH.device
    rows = slice(None) if position is None else [position]
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=device)
        mask = mask.tril() if causal else mask
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=device).masked_fill(~mask, -math.inf)
    bias_NTS = mask.expand(B, N, T, S)[0]
    scale = 1 / math.sqrt(H) if scale is None else scale
    total_S = torch.zeros(S, device=device)
    for head in range(N):  # one head at a time, because the scores of a long text are large
        scores_TS = q_BTNH[0, rows, head].float() @ k_BKSH[0, head // (N // K)].float().T
        total_S += (scale * scores_TS + bias_NTS[head, rows]).softmax(dim=-1).mean(dim=0)
    return total_S / N
