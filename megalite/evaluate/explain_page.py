"""The page that explains a classification: numbers first, and colours by their absolute size."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

_STRONGEST = 10
_DARKEST = 0.6  # of 1: what is written on a colour stays readable on a light and a dark page
_FULL = 1.0  # log-odds of a full colour, at least: e times as likely
_FLAT = 0.1  # log-odds below which a token counts for nothing: 0.5 becomes 0.525 at most
_FULL_RATIO = 4.0  # times as much attention as even
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
<h2>What the score loses without a token</h2>{occlusion}
<h2>What each token adds, by gradients</h2>
{gradient}
<p>Input times gradient: how the score would change if a token's embedding grew or shrank a little.
It is an approximation: where the two differ, believe the text without the token.</p>
<h2>What the last layer looks at</h2>
{attention}
<p>The mean of the heads of the last layer, as a multiple of what identical tokens would
get. {special:.0%} of the attention is on special tokens such as BOS and EOS. Attention on a token
does not mean that the token decides.</p>
<h2>The strongest tokens</h2><table><tr><th>Token<th class="number">Place
<th class="number">Without it<th class="number">By gradients<th class="number">Attention</tr>
{rows}</table></body></html>
"""


@dataclass(frozen=True)
class Explanation:
    """A classifier's view of a text of T tokens; special tokens are not among them.

    Attributes:
        log_odds: of the label that is explained, the score that the values below share out.
        probabilities: of each label, by name.
        facts: about run, checkpoint, model and text.
        pieces: the tokens as they are to be read, spaces among them.
        gradient: T values of input times gradient.
        occlusion: what the score loses without each token, T values, if there are several.
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


def explain_page(found: Explanation) -> str:
    """Return one HTML page that needs nothing else."""
    labels = sorted(found.probabilities.items(), key=lambda pair: -pair[1])
    predicted, chance = labels[0]
    facts = {**found.facts, "Prediction": f"{predicted}, {chance:.1%}", "Explained": found.label}
    deciding = found.occlusion or found.gradient
    order = sorted(range(len(found.pieces)), key=lambda i: -abs(deciding[i]))[:_STRONGEST]
    lost = found.occlusion
    only = "<p>The text has one token, so nothing would be left to read.</p>"
    return _PAGE.format(
        title=_safe(f"{predicted} {chance:.1%} – {found.facts.get('Run', '')}".removesuffix(" – ")),
        label=_safe(found.label),
        log_odds=found.log_odds,
        text=_safe(found.text),
        blue=_FOR,
        facts="".join(f"<tr><th>{_safe(k)}<td>{_safe(v)}</tr>" for k, v in facts.items()),
        bars="".join(
            f'<tr><td>{_safe(name)}<td class="number">{chance:.4f}<td style="width: 20rem">'
            f'<div class="bar" style="width: {100 * chance:.1f}%"></div></tr>'
            for name, chance in labels
        ),
        occlusion=only if lost is None else _signed(found.pieces, lost, found.label),
        gradient=_signed(found.pieces, found.gradient, found.label),
        attention=_looks(found.pieces, found.attention),
        special=found.special_attention,
        rows="".join(
            f'<tr><td class="text">{_named(found.pieces[i])}'
            f'<td class="number">{i + 1}'
            f'<td class="number">{"–" if lost is None else format(lost[i], "+.3f")}'
            f'<td class="number">{found.gradient[i]:+.3f}'
            f'<td class="number">{found.attention[i]:.2f} x</tr>'
            for i in order
        ),
    )


def _named(piece: str) -> str:
    """Return a token for the table: white space is shown, and a part of a character is named."""
    if not piece:
        return "(part of a character)"
    return _safe(piece.strip()) or "␣" * len(piece)


def _signed(pieces: Sequence[str], values: Sequence[float], label: str) -> str:
    """Return a text coloured by what speaks for and against a label, and the scale of its colours.

    A full colour is the largest value, but never less than `_FULL`: noise stays without colour.
    """
    most = max(map(abs, values), default=0.0)
    full = max(most, _FULL)
    text = _coloured(
        pieces,
        [(value, abs(value) / full, _FOR if value > 0 else _AGAINST) for value in values],
        lambda value: f"{value:+.3f}",
    )
    verdict = ""
    if most < _FLAT:
        verdict = (
            f"<p><b>No token moves the score by more than {max(most, 0.001):.3f}: on this text the "
            "model hardly depends on single tokens.</b></p>"
        )
    legend = "".join(
        _swatch(color, share, f"{sign}{share * full:.2f}")
        for color, sign, shares in ((_AGAINST, "-", (1.0, 0.5)), (_FOR, "+", (0.5, 1.0)))
        for share in shares
    )
    return (
        f'{verdict}<p class="text">{text}</p><p>{legend} red speaks against {_safe(label)}, blue '
        f"for it; the largest is {most:.3f}.</p>"
    )


def _looks(pieces: Sequence[str], ratios: Sequence[float]) -> str:
    """Return a text coloured by how much more, or less, than evenly its tokens are looked at."""
    full = math.log(_FULL_RATIO)
    shades = [
        (ratio, abs(math.log(max(ratio, 1e-6))) / full, _MORE if ratio > 1 else _LESS)
        for ratio in ratios
    ]
    text = _coloured(pieces, shades, lambda ratio: f"{ratio:.2f} x")
    least = min(ratios, default=1.0)
    most = max(ratios, default=1.0)
    verdict = ""
    if most < 1.25 and least > 0.8:
        verdict = (
            f"<p><b>The attention is nearly even, {least:.2f} to {most:.2f} x: it says nothing "
            "about single tokens.</b></p>"
        )
    legend = _swatch(_LESS, 1.0, "1/4 x") + _swatch(_MORE, 0.0, "1 x") + _swatch(_MORE, 1.0, "4 x")
    return f'{verdict}<p class="text">{text}</p><p>{legend} and more</p>'


def _coloured(
    pieces: Sequence[str],
    shades: Sequence[tuple[float, float, str]],
    written: Callable[[float], str],
) -> str:
    """Return the pieces as spans; of each shade the value, how full it is (to 1), its colour."""
    return "".join(
        f'<span title="{written(value)}" style="background: rgba({color}, '
        f'{_DARKEST * min(1.0, share):.3f})">{_safe(piece)}</span>'
        for piece, (value, share, color) in zip(pieces, shades, strict=True)
    )


def _swatch(color: str, share: float, words: str) -> str:
    fill = f"rgba({color}, {_DARKEST * share:.3f})"
    return f'<span style="background: {fill}">&ensp;{words}&ensp;</span> '


def _safe(text: str) -> str:
    """Return a text as HTML, with what neither a page nor a terminal should obey made visible.

    Control characters become their pictures, and characters that reorder a line become U+FFFD.
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
