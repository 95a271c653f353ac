"""Which tokens a classification rests on: what each one adds to a score, and what is looked at.

T tokens   S tokens that are looked at   N query heads   K key/value heads   H head width
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import torch
from torch import Tensor, nn

from megalite.errors import CommandError
from megalite.evaluate.opened import OpenedModel
from megalite.formats.examples import edges
from megalite.model import LanguageModel, layers

_STRONGEST = 10
_DARKEST = 0.6  # of 1: what is written on a colour stays readable on a light and a dark page
_FOR, _AGAINST, _SEEN = "40, 110, 255", "255, 60, 50", "240, 160, 0"
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title><style>
:root {{ color-scheme: light dark; background: Canvas; color: CanvasText; }}
body {{ font: 16px/1.6 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; }}
.text {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
.bar {{ height: .8em; min-width: 1px; background: rgb({blue}); }}
td, th {{ padding: 0 .8em; text-align: left; }}
.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
</style></head><body><h1>{title}</h1><p class="text">{text}</p>
<h2>Probabilities</h2><table>{bars}</table>
<h2>What speaks for it and against it</h2><p class="text">{attributions}</p>
<p><span style="background: rgba({blue}, {most})">&ensp;for it&ensp;</span>
<span style="background: rgba({red}, {most})">&ensp;against it&ensp;</span>
Input times gradient; the fuller the colour, the more.</p>
<h2>What it looks at</h2><p class="text">{attention}</p>
<p><span style="background: rgba({amber}, {most})">&ensp;looked at&ensp;</span>
Attention of the last layer, the mean of its heads.</p>
<h2>The strongest tokens</h2><table><tr><th>Token<th class="number">Place
<th class="number">Attribution<th class="number">Attention</tr>{rows}</table></body></html>
"""


def input_times_gradient(embed: nn.Module, score: Callable[[], Tensor]) -> Tensor:
    """What each token adds to a score, to the first order: fp32 [T] of the first sample.

    Embedding times gradient (Simonyan et al. 2013; Shrikumar et al. 2016).

    Args:
        embed: gives the embeddings [B, T, D], by its first call where there are several.
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


def explain_text(opened: OpenedModel, text: str, label: str | None = None) -> str:
    """The page of a classifier's view of a text.

    Args:
        label: the one that is explained; None: the one it names.
    Raises:
        CommandError: no classifier, another label than it has, no text.
    """
    config, run = opened.config, opened.run
    if not config.num_labels or run is None or run.finetune is None:
        raise CommandError(f"{opened.folder} is no classifier: give one that was fine-tuned here")
    names = run.finetune.data.labels or ()
    if label is not None and label not in names:
        raise CommandError(f"--label {label}: it knows {', '.join(names)}")
    ids, spans = opened.tokenizer.encode_with_offsets(text, [(0, len(text))])
    opened.check_ids(ids)
    before, after = edges(opened.tokenizer, leads=config.architecture == "encoder")
    room = run.finetune.data.max_length - len(before) - len(after)
    ids, spans = ids[:room], spans[:room]
    if not ids:
        raise CommandError("the text is empty; give some")
    pieces = ["" for _ in before] + [text[a:b] for a, b in spans] + ["" for _ in after]
    whole = torch.tensor([[*before, *ids, *after]], device=opened.device)
    batch = {"input_ids": whole, "lengths": torch.tensor([whole.shape[1]], device=opened.device)}
    if config.architecture == "encoder_decoder":
        start = config.decoder_start_token_id
        batch["decoder_input_ids"] = torch.full((1, 1), start, device=opened.device)
    model: Any = opened.model
    chances = model.label_scores(batch).detach().softmax(dim=-1)[0]
    place = names.index(label) if label else int(chances.argmax())
    added = input_times_gradient(
        model.model.embed_tokens, lambda: model.label_scores(batch)[0, place]
    )
    looks = {"mean": None, "first": 0, "last": whole.shape[1] - 1}[config.classifier_pooling]
    seen = last_attention(model, lambda: model.label_scores(batch), looks)
    scores = dict(zip(names, chances.tolist(), strict=True))
    return explain_page(text, pieces, added.tolist(), seen.tolist(), scores, title=names[place])


def last_attention(model: LanguageModel, run: Callable[[], object], position: int | None) -> Tensor:
    """How the last block looks at the text that is read: fp32 [S] of the first sample, of sum 1.

    The mean over this rank's heads of the attention weights; self-attention's, or with two stacks
    those of the written tokens on the text that is read.

    Args:
        run: runs the model; its last pass counts.
        position: the token that looks; None: the mean over all.
    """
    block: Any = list(model.blocks)[-1]
    branch = block.self_attn if block.cross_attn is None else block.cross_attn
    module: Any = layers
    real, calls = module.attend, list[tuple[Any, ...]]()

    def spy(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **how: Any) -> Tensor:
        calls[:] = [(q, k, mask, how["causal"], how["scale"])]
        return real(q, k, v, mask, **how)

    def enter(*_: Any) -> None:
        module.attend = spy

    def leave(*_: Any) -> None:
        module.attend = real

    handles = branch.register_forward_pre_hook(enter), branch.register_forward_hook(leave)
    try:
        run()
    finally:
        leave()
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        return _weights(position, *calls[0])


def _weights(
    position: int | None,
    q_BTNH: Tensor,
    k_BKSH: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
) -> Tensor:
    """softmax(scale q k^T + mask) of the first sample, the mean of heads and queries: [S]."""
    (B, T, N, H), (K, S), device = q_BTNH.shape, k_BKSH.shape[1:3], q_BTNH.device
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


def explain_page(
    text: str,
    pieces: Sequence[str],
    attributions: Sequence[float],
    attention: Sequence[float],
    scores: Mapping[str, float],
    *,
    title: str,
) -> str:
    """One HTML page that needs nothing else: the text, coloured, and its strongest tokens.

    Args:
        pieces: the tokens as they are to be read, spaces among them.
        attributions: of each piece; above 0 speaks for the label.
        scores: the probability of each label, by name.
    """
    order = sorted(range(len(pieces)), key=lambda i: -abs(attributions[i]))[:_STRONGEST]
    return _PAGE.format(
        title=escape(title),
        text=escape(text),
        blue=_FOR,
        red=_AGAINST,
        amber=_SEEN,
        most=_DARKEST,
        bars="".join(
            f'<tr><td>{escape(name)}<td class="number">{chance:.4f}<td style="width: 20rem">'
            f'<div class="bar" style="width: {100 * chance:.1f}%"></div></tr>'
            for name, chance in sorted(scores.items(), key=lambda pair: -pair[1])
        ),
        attributions=_coloured(pieces, attributions, _FOR, _AGAINST),
        attention=_coloured(pieces, attention, _SEEN, _SEEN),
        rows="".join(
            f'<tr><td class="text">{escape(pieces[i])}<td class="number">{i + 1}'
            f'<td class="number">{attributions[i]:+.4g}<td class="number">{attention[i]:.4f}</tr>'
            for i in order
        ),
    )


def _coloured(pieces: Sequence[str], values: Sequence[float], above: str, below: str) -> str:
    most = max(map(abs, values), default=0.0) or 1.0
    return "".join(
        f'<span title="{value:+.4g}" style="background: rgba({above if value > 0 else below}, '
        f'{_DARKEST * abs(value) / most:.3f})">{escape(piece)}</span>'
        for piece, value in zip(pieces, values, strict=True)
    )
