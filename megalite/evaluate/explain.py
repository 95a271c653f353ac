"""The tokens a classification depends on: each token's share of a score, and attention.

T tokens   S tokens that are looked at   N query heads   K key/value heads   H head width
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

_AT_ONCE = 16  # texts of the occlusion that are read together
_GROUPS = 256  # texts of the occlusion: the tokens of a longer text are omitted in groups


def input_times_gradient(embed: nn.Module, score: Callable[[], Tensor]) -> Tensor:
    """Return what each token adds to a score, to first order: fp32 [T] of the first sample.

    Embedding times gradient (Simonyan et al. 2013; Shrikumar et al. 2016).

    Args:
        embed: module of the embeddings [B, T, D]; the first of its calls counts.
        score: runs the model; gives a scalar.
    """
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> Tensor | None:
        if kept:
            return None
        kept.append(output.detach().requires_grad_())
        return kept[0]

    handle = embed.register_forward_hook(keep)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            (gradient,) = torch.autograd.grad(score(), kept)
    finally:
        handle.remove()
    return (kept[0].detach().float() * gradient.float()).sum(dim=-1)[0]


def explain_text(loaded: LoadedModel, text: str, label: str | None = None) -> str:
    """Return the HTML page of a classifier's view of a text.

    Args:
        label: the label that is explained. None means the predicted one.
    Raises:
        CommandError: no classifier, another label than it has, no text.
    """
    config = loaded.config
    run = loaded.run
    if not config.num_labels or run is None or run.finetune is None:
        raise CommandError(f"{loaded.folder} is no classifier: give one that was fine-tuned here")
    names = run.finetune.data.labels or ()
    if label is not None and label not in names:
        raise CommandError(f"--label {label}: its labels are {', '.join(names)}")
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
        raise CommandError("the text is empty; give some")
    batch = _batch(loaded, [[*before, *ids, *after]])
    model: Any = loaded.model
    with torch.no_grad():
        logits = model.label_scores(batch)[0]
    chances = logits.softmax(dim=-1).tolist()
    predicted = int(logits.argmax())
    place = names.index(label) if label else predicted
    own = slice(len(before), len(before) + len(ids))  # without BOS and EOS
    gradient = input_times_gradient(
        model.model.embed_tokens, lambda: log_odds(model.label_scores(batch), place)[0]
    )
    looks = {"mean": None, "first": 0, "last": batch["input_ids"].shape[1] - 1}
    at = looks[config.classifier_pooling]
    seen = last_attention(model, lambda: model.label_scores(batch), at)
    even = last_attention(model, lambda: model.label_scores(batch), at, even=True)
    return explain_page(
        Explanation(
            text=text,
            label=names[place],
            log_odds=float(log_odds(logits[None], place)),
            probabilities=dict(zip(names, chances, strict=True)),
            facts=_facts(loaded, len(ids), cut),
            pieces=_pieces(text, spans),
            gradient=gradient[own].tolist(),
            occlusion=_occlusion(loaded, before, ids, after, place),
            attention=(seen / even.clamp_min(1e-9))[own].tolist(),
            special_attention=1 - float(seen[own].sum()),
        )
    )


def _pieces(text: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    """Return the text of each token, with what the tokenizer skipped before it, such as spaces.

    If several tokens share a character, the first one has it.
    """
    pieces = []
    end = 0
    for _, stop in spans:
        pieces.append(text[end:stop])
        end = max(end, stop)
    return pieces


def _facts(loaded: LoadedModel, tokens: int, cut: int) -> dict[str, str]:
    """Return what the page says about the model and the text."""
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
    """Return ln(p / (1 - p)) of one label, fp32 [B]: its logit against all others' together."""
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
    """Return how much of the log-odds each token holds: what they lose without it.

    The tokens of a long text are omitted in groups; each token of a group has the group's value.
    None means that there is only one token, and nothing would be left to read.
    """
    model: Any = loaded.model
    size = -(-len(ids) // _GROUPS)
    starts = range(0, len(ids), size)
    if len(starts) < 2:
        return None
    lost: dict[int, float] = {}
    with torch.no_grad():
        whole = log_odds(model.label_scores(_batch(loaded, [[*before, *ids, *after]])), place)
        short = {n: [*before, *ids[:n], *ids[n + size :], *after] for n in starts}
        by_length = sorted(starts, key=lambda n: len(short[n]))
        for _, same in groupby(by_length, key=lambda n: len(short[n])):
            chosen = list(same)
            for first in range(0, len(chosen), _AT_ONCE):
                some = chosen[first : first + _AT_ONCE]
                scores = model.label_scores(_batch(loaded, [short[n] for n in some]))
                values = (whole - log_odds(scores, place)).tolist()
                lost |= dict(zip(some, values, strict=True))
    return [lost[n // size * size] for n in range(len(ids))]


def last_attention(
    model: LanguageModel,
    run: Callable[[], object],
    position: int | None,
    *,
    even: bool = False,
) -> Tensor:
    """Return the last block's attention to the text: fp32 [S] of the first sample, with sum 1.

    The mean over this rank's heads of the attention weights; self-attention's, or with two stacks
    those of the written tokens on the text that is read.

    Args:
        run: runs the model; its last pass counts.
        position: the token that attends. None means the mean over all tokens.
        even: If true, as if all tokens were equal: only mask and positions count.
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
    """Return softmax(scale q k^T + mask) of the first sample, mean of heads and queries: [S]."""
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
    for head in range(N):  # one at a time: those of a long text are large
        scores_TS = q_BTNH[0, rows, head].float() @ k_BKSH[0, head // (N // K)].float().T
        total_S += (scale * scores_TS + bias_NTS[head, rows]).softmax(dim=-1).mean(dim=0)
    return total_S / N
