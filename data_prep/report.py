"""`verify` and `inspect`: the check of a shard folder, and a summary of its content."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import numpy.typing as npt

from megalite.errors import CommandError
from megalite.formats.manifest import ShardManifest
from megalite.formats.shards import ShardSet, open_shards
from megalite.formats.verify import verify_folder
from megalite.log import encodable, logger, printable, write_report
from megalite.tokenizers.tokenizer import load_tokenizer

_EXACT_BITS = 12  # leading bits of a length that are counted, an error below 1/2048
_MOST_BINS = 24
_BAR = 40  # characters
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_SOURCES = 20  # sources with a line of their own


def verify(folder: Path) -> int:
    """Print all faults of a shard folder, and return the exit code: 1 if there are any, else 0."""
    faults = verify_folder(folder)
    for fault in faults:
        write_report(f"{fault}\n")
    if not faults:
        manifest = open_shards(folder).manifest
        write_report(f"{folder}: {manifest.counts()}, all as written\n")
    return 1 if faults else 0


def inspect(folder: Path, document: int | None, picture: Path | None = None) -> int:
    """Print a summary of a shard folder, or the text of one document.

    Without a known tokenizer, the document's ids are printed. Memory holds the lengths of one
    shard's documents.

    Args:
        picture: an SVG file for a histogram of the documents' lengths.
    Raises:
        CommandError: there is no such document, or the picture cannot be written.
        DataError: the folder has no shards, or is damaged.
    """
    if picture and document is not None:
        raise CommandError("--picture shows all documents, --document one; remove one of them")
    if picture and picture.suffix.lower() != ".svg":
        raise CommandError(f"--picture {picture}: only SVG is supported; name a file .svg")
    shards = open_shards(folder)
    if document is not None:
        text = _document(shards, document)
        sys.stdout.write(encodable(printable(text, terminal=sys.stdout.isatty())))
        return 0
    lengths = Lengths.of(shards)
    write_report("".join(f"{name:18s} {value}\n" for name, value in _summary(shards, lengths)))
    write_report("".join(f"{line}\n" for line in _bars(lengths)))
    if picture:
        try:
            picture.write_text(_svg(f"{folder}", lengths), encoding="utf-8")
        except OSError as error:
            raise CommandError(f"--picture {picture} cannot be written: {error}") from error
    return 0


@dataclass
class Lengths:
    """Histogram of the number of tokens in documents.

    Lengths of 4,096 and more are counted by their 12 leading bits, which bounds their number.
    `shortest` and `longest` are exact.
    """

    counts: Counter[int] = field(default_factory=Counter)
    shortest: int = 0
    longest: int = 0

    @classmethod
    def of(cls, shards: ShardSet) -> Lengths:
        """Return the lengths of a folder's documents, read shard by shard."""
        lengths = cls()
        for shard in range(len(shards.manifest.shards)):
            lengths.add(shards.document_lengths(shard))
        return lengths

    def add(self, lengths: npt.NDArray[np.int64]) -> None:
        """Count more documents."""
        if not lengths.size:
            return
        low = int(lengths.min())
        high = int(lengths.max())
        self.shortest = min(self.shortest, low) if self.counts else low
        self.longest = max(self.longest, high)
        cut = np.maximum(np.frexp(lengths)[1] - _EXACT_BITS, 0)
        values, counts = np.unique(lengths >> cut << cut, return_counts=True)
        self.counts.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))

    def below(self, share: float) -> int:
        """Return the quantile of the lengths at a fraction of the documents."""
        values = sorted(self.counts)
        ends = np.cumsum([self.counts[value] for value in values])
        place = int(np.searchsorted(ends, share * ends[-1])) if values else 0
        return values[place] if values else 0

    def bins(self) -> list[tuple[int, int, int]]:
        """Return (first length, last length, documents) of each bar of the histogram.

        Bars are octaves, divided into as many equal parts (1, 2, 4 or 8) as give at most 24 bars.
        Documents without tokens have a bar of their own.
        """
        finest = (self._edges(parts) for parts in (8, 4, 2))
        edges = next((edges for edges in finest if len(edges) <= _MOST_BINS + 1), self._edges(1))
        values = np.array(list(self.counts), np.int64)
        counts, _ = np.histogram(values, edges, weights=list(self.counts.values()))
        return [
            (low, high - 1, int(count))
            for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
        ]

    def _edges(self, parts: int) -> list[int]:
        """Return the edges of the bars, from the shortest to the longest document."""
        octaves = range(self.longest.bit_length() + 1)
        steps = {int(2**octave * (1 + part / parts)) for octave in octaves for part in range(parts)}
        edges = sorted({0, *steps})
        first = max(edge for edge in edges if edge <= self.shortest)
        last = min(edge for edge in edges if edge > self.longest)
        return [edge for edge in edges if first <= edge <= last]


def _summary(shards: ShardSet, lengths: Lengths) -> Iterator[tuple[str, str]]:
    manifest = shards.manifest
    size = sum(source.bytes for source in manifest.sources)
    yield "documents", f"{manifest.documents:,}"
    yield "tokens", f"{manifest.tokens:,} as {manifest.dtype}"
    yield (
        "tokens a document",
        f"{lengths.shortest:,} to {lengths.longest:,}, "
        f"mean {manifest.tokens / max(manifest.documents, 1):,.1f}, "
        f"median {lengths.below(0.5):,}, 90 % up to {lengths.below(0.9):,}",
    )
    if size:
        yield "text", f"{size:,} bytes, {size / max(manifest.tokens, 1):.2f} a token"
    yield "vocabulary", f"{manifest.vocab_size:,} ids, BOS {manifest.bos}, EOS {manifest.eos}"
    tokenizer = manifest.tokenizer
    yield "tokenizer", f"{tokenizer.path} {tokenizer.sha256[:12]}" if tokenizer.path else "unknown"
    yield "fingerprint", shards.fingerprint
    if manifest.shards:
        first = manifest.shards[0].name
        last = manifest.shards[-1].name
        most = max(shard.tokens for shard in manifest.shards)
        names = first if first == last else f"{first} to {last}"
        yield "shards", f"{len(manifest.shards):,}: {names}, {most:,} tokens at most"
    yield from _sources(manifest)


def _sources(manifest: ShardManifest) -> Iterator[tuple[str, str]]:
    sources = sorted(manifest.sources, key=lambda source: -source.tokens)
    for source in sources[:_SOURCES]:
        share = 100 * source.tokens / max(manifest.tokens, 1)
        bad = f", {source.bad_records:,} bad records" if source.bad_records else ""
        yield (
            "from",
            f"{source.input}: {share:.1f} % of the tokens, {source.documents:,} documents{bad}",
        )
    if rest := sources[_SOURCES:]:
        share = 100 * sum(source.tokens for source in rest) / max(manifest.tokens, 1)
        yield "from", f"{len(rest):,} more inputs: {share:.1f} % of the tokens"


def _bars(lengths: Lengths) -> Iterator[str]:
    """Return the histogram in block characters, a line for each bar."""
    bins = lengths.bins() if lengths.counts else []
    total = sum(count for *_, count in bins)
    most = max((count for *_, count in bins), default=0)
    wide = len(f"{bins[-1][1]:,}") if bins else 0
    if bins:
        yield "\ntokens a document".ljust(2 * wide + _BAR + 8) + "documents"
    for low, high, count in bins:
        eighths = max(round(8 * _BAR * count / most), 1 if count else 0)
        bar = _EIGHTHS[8] * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
        label = f"{low:{wide},} to {high:{wide},}" if high > low else f"{low:{2 * wide + 4},}"
        yield f"{label}  {bar:{_BAR}s}  {count:>9,}  {100 * count / total:5.1f} %"


# Sizes of the drawing, in its own units.
_WIDTH = 800
_HEIGHT = 350
_LEFT = 70
_RIGHT = 720
_TOP = 60
_FLOOR = 290


def _svg(title: str, lengths: Lengths) -> str:
    """Return the histogram as a drawing, with lines at the median and at 90 % of the documents."""
    bins = lengths.bins() if lengths.counts else [(0, 0, 0)]
    total = sum(lengths.counts.values())
    most = max(max(count for *_, count in bins), 1)
    step = (_RIGHT - _LEFT) / len(bins)
    body = [_text(_LEFT, 22, f"{title}: {total:,} documents by their tokens", size=15)]
    for part in range(5):
        y = _FLOOR - (_FLOOR - _TOP) * part / 4
        body.append(f'<path d="M{_LEFT} {y:.1f}H{_RIGHT}" stroke="#d8d8d8"/>')
        body.append(
            _text(_LEFT - 6, y + 4, f"{100 * most * part / 4 / max(total, 1):.1f} %", "end")
        )
    for place, (low, high, count) in enumerate(bins):
        x = _LEFT + place * step
        tall = (_FLOOR - _TOP) * count / most
        body.append(
            f'<rect x="{x + 1:.1f}" y="{_FLOOR - tall:.1f}" width="{step - 2:.1f}" '
            f'height="{tall:.1f}" fill="#3b75af"><title>{low:,} to {high:,} tokens: {count:,} '
            "documents</title></rect>"
        )
        if place % -(-len(bins) // 12) == 0:
            body.append(_text(x, _FLOOR + 16, f"{low:,}", "middle"))
    for name, share, side in (("median", 0.5, "end"), ("90 %", 0.9, "start")):
        x = _LEFT + step * _place(bins, lengths.below(share))
        body.append(
            f'<path d="M{x:.1f} {_TOP - 6}V{_FLOOR}" stroke="#222222" stroke-dasharray="4"/>'
        )
        body.append(_text(x, _TOP - 10, f"{name}: {lengths.below(share):,}", side))
    body.append(_text((_LEFT + _RIGHT) / 2, _FLOOR + 44, "tokens in a document", "middle"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'font-family="sans-serif"><rect width="100%" height="100%" fill="#ffffff"/>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def _text(x: float, y: float, text: str, anchor: str = "start", *, size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="#222222">'
        f"{escape(text)}</text>"
    )


def _place(bins: Sequence[tuple[int, int, int]], length: int) -> float:
    """Return the position of a length on an axis on which every bar is 1 wide."""
    for place, (low, high, _) in enumerate(bins):
        if length <= high:
            return place + (length - low) / (high + 1 - low)
    return len(bins)


def _document(shards: ShardSet, number: int) -> str:
    if not 0 <= number < shards.documents:
        raise CommandError(
            f"--document {number}: {shards.folder} has {shards.documents} documents, 0 to "
            f"{shards.documents - 1}"
        )
    ids = np.asarray(shards.document(number), np.int64).tolist()
    if not shards.manifest.tokenizer.path:
        logger.warning("the folder has no manifest and no tokenizer/: these are the ids")
        return " ".join(map(str, ids)) + "\n"
    return load_tokenizer(shards.folder / shards.manifest.tokenizer.path).decode(ids) + "\n"
