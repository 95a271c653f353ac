"""The HTML page of an explanation: numbers, and a text coloured by their absolute values."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

_STRONGEST = 10
_DARKEST = 0.6  # maximum opacity of a colour, so that text stays readable on light and dark pages
_FULL = 1.0  # minimum log-odds of a full colour: e times as likely
_FLAT = 0.1  # log-odds below which a token has no effect: 0.5 becomes 0.525 at most
_FULL_RATIO = 4.0  # multiple of even attention of a full colour
_FOR = "40, 110, 255"
_AGAINST = "255, 60, 50"
_MORE = "240, 160, 0"
_LESS = "120, 120, 120"
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title><style>
:root {{ color-scheme: light dark; background: Canvas; color: CanvasText; }}
body {{ font: 16px/1.6 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; }}
.text {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
.bar {{ height: .8em; min-width: 1px; background: rgb({blue}); }}
td, th {{ padding: 0 .8em; text-align: left; vertical-align: top; }}
.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
</style></head><body><h1>{title}</h1><table>{facts}</table><p class="text">{text}</p>
<h2>Probabilities</h2><table>{bars}</table>
<p>The score of {label} is its log-odds, ln(p / (1 - p)) = {log_odds:+.2f}. All numbers below are in
its unit: +0.69 doubles the odds.</p>
<h2>Loss of the score without a token</h2>{occlusion}
<h2>Contribution of each token, by gradients</h2>
{gradient}
<p>Input times gradient: how the score would change if a token's embedding grew or shrank a little.
This is an approximation. If it differs from the loss without the token, trust the latter.</p>
<h2>Attention of the last layer</h2>
{attention}
<p>The mean over the heads of the last layer, as a multiple of the attention that identical tokens
would get. {special:.0%} of the attention is on special tokens such as BOS and EOS. High attention
on a token does not mean that the token decides.</p>
<h2>The strongest tokens</h2><table><tr><th>Token<th class="number">Position
<th class="number">Without it<th class="number">By gradients<th class="number">Attention</tr>
{rows}</table></body></html>
"""


@dataclass(frozen=True)
class Explanation:
    """An explanation of a classifier's prediction for a text of T tokens, without special tokens.

    Attributes:
        label: the label that is explained.
        log_odds: log-odds of the label: the score that the values below explain.
        probabilities: probability of each label, by name.
        facts: facts about run, checkpoint, model and text.
        pieces: texts of the tokens, including spaces.
        gradient: T values of input times gradient.
        occlusion: T losses of the score without each token. None if there is only one token.
        attention: T multiples of even attention.
        special_attention: share of the attention on special tokens.
    """

    text: str
    label: str
    log_odds: float
    probabilities: Mapping[str, float]
    facts: Mapping[str, str]
    pieces: Sequence[str]
    gradient: Sequence[float]
    occlusion: Sequence[float] | None
    attention: Sequence[float]
    special_attention: float


def explain_page(explanation: Explanation) -> str:
    """Return a self-contained HTML page."""
    labels = sorted(explanation.probabilities.items(), key=lambda pair: -pair[1])
    predicted, chance = labels[0]
    facts = {
        **explanation.facts,
        "Prediction": f"{predicted}, {chance:.1%}",
        "Explained": explanation.label,
    }
    pieces = explanation.pieces
    losses = explanation.occlusion
    deciding = losses or explanation.gradient
    order = sorted(range(len(pieces)), key=lambda i: -abs(deciding[i]))[:_STRONGEST]
    only = "<p>The text has only one token, so there is no text without it.</p>"
    run = explanation.facts.get("Run", "")
    return _PAGE.format(
        title=_safe(f"{predicted} {chance:.1%} – {run}".removesuffix(" – ")),
        label=_safe(explanation.label),
        log_odds=explanation.log_odds,
        text=_safe(explanation.text),
        blue=_FOR,
        facts="".join(f"<tr><th>{_safe(k)}<td>{_safe(v)}</tr>" for k, v in facts.items()),
        bars="".join(
            f'<tr><td>{_safe(name)}<td class="number">{chance:.4f}<td style="width: 20rem">'
            f'<div class="bar" style="width: {100 * chance:.1f}%"></div></tr>'
            for name, chance in labels
        ),
        occlusion=only if losses is None else _signed(pieces, losses, explanation.label),
        gradient=_signed(pieces, explanation.gradient, explanation.label),
        attention=_attention(pieces, explanation.attention),
        special=explanation.special_attention,
        rows="".join(
            f'<tr><td class="text">{_named(pieces[i])}'
            f'<td class="number">{i + 1}'
            f'<td class="number">{"–" if losses is None else format(losses[i], "+.3f")}'
            f'<td class="number">{explanation.gradient[i]:+.3f}'
            f'<td class="number">{explanation.attention[i]:.2f} x</tr>'
            for i in order
        ),
    )


def _named(piece: str) -> str:
    """Return a token for the table, with visible names for white space and parts of characters."""
    if not piece:
        return "(part of a character)"
    return _safe(piece.strip()) or "␣" * len(piece)


def _signed(pieces: Sequence[str], values: Sequence[float], label: str) -> str:
    """Return a text coloured by contributions for and against a label, with a legend.

    A full colour stands for the largest value, but at least for `_FULL`, so that noise stays pale.
    """
    most = max(map(abs, values), default=0.0)
    full = max(most, _FULL)
    text = _coloured(
        pieces,
        [(value, abs(value) / full, _FOR if value > 0 else _AGAINST) for value in values],
        lambda value: f"{value:+.3f}",
    )
    remark = ""
    if most < _FLAT:
        remark = (
            f"<p><b>No token moves the score by more than {max(most, 0.001):.3f}: on this text the "
            "model hardly depends on single tokens.</b></p>"
        )
    legend = "".join(
        _swatch(color, share, f"{sign}{share * full:.2f}")
        for color, sign, shares in ((_AGAINST, "-", (1.0, 0.5)), (_FOR, "+", (0.5, 1.0)))
        for share in shares
    )
    return (
        f'{remark}<p class="text">{text}</p><p>{legend} red speaks against {_safe(label)}, blue '
        f"for it; the largest is {most:.3f}.</p>"
    )


def _attention(pieces: Sequence[str], ratios: Sequence[float]) -> str:
    """Return a text coloured by attention as a multiple of even attention, with a legend."""
    full = math.log(_FULL_RATIO)
    shades = [
        (ratio, abs(math.log(max(ratio, 1e-6))) / full, _MORE if ratio > 1 else _LESS)
        for ratio in ratios
    ]
    text = _coloured(pieces, shades, lambda ratio: f"{ratio:.2f} x")
    least = min(ratios, default=1.0)
    most = max(ratios, default=1.0)
    remark = ""
    if most < 1.25 and least > 0.8:
        remark = (
            f"<p><b>The attention is nearly even, {least:.2f} to {most:.2f} x: it says nothing "
            "about single tokens.</b></p>"
        )
    legend = _swatch(_LESS, 1.0, "1/4 x") + _swatch(_MORE, 0.0, "1 x") + _swatch(_MORE, 1.0, "4 x")
    return f'{remark}<p class="text">{text}</p><p>{legend} and more</p>'


def _coloured(
    pieces: Sequence[str],
    shades: Sequence[tuple[float, float, str]],
    written: Callable[[float], str],
) -> str:
    """Return the pieces as coloured spans.

    Args:
        shades: (value, saturation from 0 to 1, colour) of each piece.
        written: formats a value for the tooltip.
    """
    return "".join(
        f'<span title="{written(value)}" style="background: rgba({color}, '
        f'{_DARKEST * min(1.0, share):.3f})">{_safe(piece)}</span>'
        for piece, (value, share, color) in zip(pieces, shades, strict=True)
    )


def _swatch(color: str, share: float, words: str) -> str:
    fill = f"rgba({color}, {_DARKEST * share:.3f})"
    return f'<span style="background: {fill}">&ensp;{words}&ensp;</span> '


def _safe(text: str) -> str:
    """Return a text as HTML without characters that a page or a terminal would act on.

    Control characters become their symbols. Characters that reorder a line become U+FFFD.
    """
    return escape("".join(map(_visible, text)))


def _visible(character: str) -> str:
    if character in "\n\t" or character.isprintable():
        return character
    code = ord(character)
    if code < 32 or code == 127:
        return chr(0x2400 + code) if code < 32 else "\u2421"
    hidden = unicodedata.category(character) in ("Cc", "Cs", "Co", "Cn")
    reorders = unicodedata.bidirectional(character) in (
        *("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"),
    )
    return "\ufffd" if hidden or reorders else character
