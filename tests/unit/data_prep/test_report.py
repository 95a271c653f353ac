# covers: data_prep/report.py
"""`inspect`: summaries and histograms of documents of any lengths."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.report import Lengths, inspect
from megalite.errors import CommandError
from megalite.formats.manifest import ShardManifest, SourceInfo, TokenizerInfo, write_manifest
from megalite.formats.shards import ShardWriter
from megalite.tokenizers.tokenizer import ByteTokenizer

SVG = "{http://www.w3.org/2000/svg}"
Lists = list[list[int]]


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes shards of documents of given lengths, a list for each shard."""

    def make(lengths: Lists, *, inputs: int = 1, bad_records: int = 0) -> Path:
        folder, tokenizer = tmp_path / "shards", ByteTokenizer()
        (folder / "tokenizer").mkdir(parents=True)
        name, shards = tokenizer.save(folder / "tokenizer"), []
        for number, sizes in enumerate(lengths):
            shard = f"shard_{number:05d}"
            with ShardWriter(folder, shard, np.dtype("<u2"), vocab_size=258) as writer:
                for size in sizes:
                    writer.add_document(np.full(size, 65, np.int64))
                shards.append(writer.close())
        tokens, documents = sum(map(sum, lengths)), sum(map(len, lengths))
        source = {"files": 1, "bytes": 2 * tokens, "bad_records": bad_records}
        write_manifest(
            folder,
            ShardManifest(
                dtype="uint16",
                vocab_size=258,
                tokenizer=TokenizerInfo(path=f"tokenizer/{name}", sha256=tokenizer.sha256),
                bos=None,
                eos=None,
                documents=documents,
                tokens=tokens,
                shards=shards,
                sources=[
                    SourceInfo(input=f"in{n}", documents=n, tokens=tokens // inputs, **source)
                    for n in range(inputs)
                ],
            ),
        )
        return folder

    return make


def test_inspect_summary_names_counts(
    make_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder([[1, 2, 3], [4] * 5 + [90, 10]], inputs=2, bad_records=3)
    assert inspect(folder, None) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "documents          10",
        "tokens             126 as uint16",
        "tokens a document  1 to 90, mean 12.6, median 4, 90 % up to 10",
        "text               504 bytes, 4.00 a token",
    ]
    assert "shards             2: shard_00000 to shard_00001, 120 tokens at most" in lines
    assert "from               in0: 50.0 % of the tokens, 0 documents, 3 bad records" in lines
    assert lines[-1] == "80 to 95  ████████                                          1   10.0 %"
    assert sum("4  ████████████████████████████████████████ " in line for line in lines) == 1


def test_inspect_summary_of_many_inputs_is_short(
    make_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    inspect(make_folder([[100]], inputs=50), None)
    out = capsys.readouterr().out
    assert out.count("from  ") == 21
    assert "30 more inputs: 60.0 % of the tokens" in out


def test_inspect_picture_shows_the_counts(
    make_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder([[0, 7, 7], [3000]])
    inspect(folder, None, tmp_path / "lengths.svg")
    drawing = ET.parse(tmp_path / "lengths.svg").getroot()
    bars = drawing.findall(f"{SVG}rect")[1:]
    titles = [bar.findtext(f"{SVG}title") for bar in bars]
    assert titles[0] == "0 to 0 tokens: 1 documents"
    assert [title for title in titles if title and ": 0 " not in title][1:] == [
        "6 to 7 tokens: 2 documents",
        "2,048 to 3,071 tokens: 1 documents",
    ]
    heights = [float(bar.attrib["height"]) for bar in bars]
    assert max(heights) == 2 * heights[0] == 2 * heights[-1] > 100
    assert "median: 7" in [text.text for text in drawing.findall(f"{SVG}text")]


def test_inspect_accepts_a_folder_without_documents(
    make_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inspect(make_folder([[]]), None, tmp_path / "a.svg")
    assert "tokens a document  0 to 0, mean 0.0, median 0" in capsys.readouterr().out
    assert ET.parse(tmp_path / "a.svg").getroot().tag == f"{SVG}svg"


def test_inspect_accepts_shards_without_manifest_and_tokenizer(
    make_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder([[2, 3]])
    for ending in ("bin", "idx"):
        (folder / f"shard_00000.{ending}").rename(folder / f"web_text_document.{ending}")
    (folder / "manifest.json").unlink()
    (folder / "tokenizer").rename(folder.parent / "tokenizer")
    inspect(folder, None)
    assert "tokenizer          unknown" in capsys.readouterr().out.splitlines()
    inspect(folder / "web_text_document", 1)
    assert capsys.readouterr().out == "65 65 65\n"


def test_inspect_refuses_what_cannot_be_shown(
    make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_folder([[1, 2]])
    with pytest.raises(CommandError, match=r"--document 2: .* has 2 documents, 0 to 1"):
        inspect(folder, 2)
    with pytest.raises(CommandError, match="remove one of them"):
        inspect(folder, 0, tmp_path / "a.svg")
    with pytest.raises(CommandError, match=r"name a file \.svg"):
        inspect(folder, None, tmp_path / "a.png")
    with pytest.raises(CommandError, match=r"cannot be written: .*No such file"):
        inspect(folder, None, tmp_path / "none" / "a.svg")


@given(st.lists(st.lists(st.integers(0, 2**31 - 1)), max_size=5))
def test_bars_count_every_document_and_quantiles_are_close(lists: Lists) -> None:
    lengths = Lengths()
    for shard in lists:
        lengths.add(np.array(shard, np.int64))
    everything = sorted(length for shard in lists for length in shard)
    assert sum(lengths.counts.values()) == len(everything)
    if not everything:
        return
    assert (lengths.shortest, lengths.longest) == (everything[0], everything[-1])
    bins = lengths.bins()
    assert len(bins) <= 33
    assert [high + 1 for _, high, _ in bins[:-1]] == [low for low, _, _ in bins[1:]]
    for low, high, count in bins:
        assert count == sum(low <= length <= high for length in everything)
    for share in (0.5, 0.9):
        exact = int(np.quantile(everything, share, method="inverted_cdf"))
        assert exact * (1 - 2**-11) <= lengths.below(share) <= exact


def test_lengths_have_few_distinct_counts(capsys: pytest.CaptureFixture[str]) -> None:
    lengths = Lengths()
    random = np.random.default_rng(0)
    for _ in range(20):
        lengths.add(random.integers(0, 1 << 24, 100_000))
    assert sum(lengths.counts.values()) == 2_000_000
    assert len(lengths.counts) < 4096 + 2048 * 13
