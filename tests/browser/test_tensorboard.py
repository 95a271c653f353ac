"""TensorBoard as one looks at it: the charts are drawn, and text and pictures are there."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.encode import TokenizeOptions, tokenize
from megalite.spawn import free_port
from tests.dist.test_finetune import tune, tuning_file, write_rows
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import rows, run_file, train, zero

TAGS = {
    *("train/loss", "train/loss_by_tokens", "train/lr", "train/grad_norm", "train/step_seconds"),
    *("train/tokens_per_second", "train/peak_memory_gib"),
    *("valid/loss", "valid/loss_by_tokens", "valid/perplexity", "valid/accuracy"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A pretraining with samples and a fine-tuning; the last text that the first wrote."""
    folder = tmp_path_factory.mktemp("watched")
    shards = {}
    for split, count in (("train", 200), ("valid", 20)):
        line = json.dumps({"text": "the cat sat on the mat. " * 8})
        (folder / f"{split}.jsonl").write_text(f"{line}\n" * count)
        shards[split] = str(folder / split)
        tokenize(TokenizeOptions([str(folder / f"{split}.jsonl")], "bytes", folder / split))
    raw = run_file(shards, folder / "runs", name="pretrained", optimizer={"lr": 0.01})
    raw["training"]["steps"] = 40
    raw["logging"] |= {"tensorboard": True, "samples": {"prompts": ["the cat"]}}
    run_ranks(train, 1, raw)
    reviews = folder / "reviews"
    reviews.mkdir()
    write_rows(reviews / "train.jsonl", 40, 1)
    write_rows(reviews / "test.jsonl", 12, 2)
    tuned = tuning_file(reviews, "tuned", deepspeed=zero(1))
    tuned["logging"]["tensorboard"] = True
    run_ranks(tune, 1, tuned)
    return folder / "runs", rows(raw, "sample")[-1]["text"]


@pytest.fixture(scope="module")
def address(browser: Any, runs: tuple[Path, str]) -> Iterator[str]:
    """Where TensorBoard shows both runs."""
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(runs[0])]
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)], stderr=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{port}"
    try:
        expect_soon(
            lambda: len(json.loads(read(f"{address}/data/runs"))) == 4, "TensorBoard is there"
        )
        yield address
    finally:
        server.kill()
        server.wait()


def read(address: str) -> bytes:
    try:
        with urllib.request.urlopen(address, timeout=10) as reply:
            return bytes(reply.read())
    except OSError:  # not yet
        return b"[]"


def expect_soon(condition: Callable[[], bool], what: str, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"in {seconds:.0f} s not: {what}"
        time.sleep(0.2)


def picture(browser: Any) -> np.ndarray:
    """Return what is seen of the page: uint8 [height, width, 3]."""
    return np.asarray(Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB"))


def colours(seen: np.ndarray, place: Any) -> int:
    """Points of a part of the page that are neither black, white nor grey."""
    x, y, width, height = (round(place.rect[key]) for key in ("x", "y", "width", "height"))
    part = seen[y : y + height, x : x + width].astype(int)
    return int((np.ptp(part, axis=-1) > 25).sum()) if part.size else 0


def images(browser: Any) -> list[Any]:
    """Return the pictures of a page, those in the shadows of its elements among them."""
    found: list[Any] = browser.execute_script(
        "const all = (root) => [...root.querySelectorAll('*')].flatMap("
        "  (node) => [node, ...(node.shadowRoot ? all(node.shadowRoot) : [])]);"
        "return all(document).filter((node) => node.nodeName === 'IMG' && node.naturalWidth);"
    )
    return found


def test_the_charts_of_both_runs_are_drawn(
    browser: Any, address: str, keep: Callable[[str], None]
) -> None:
    browser.get(f"{address}/#timeseries")

    def drawn() -> set[str]:
        seen, found = picture(browser), set()
        for card in browser.find_elements("css selector", "scalar-card"):
            name = card.find_element("css selector", "tb-truncated-path")
            charts = card.find_elements("css selector", "line-chart .series-view")
            if charts and colours(seen, charts[0]) > 20:  # an empty one has only grey
                found.add(name.get_attribute("title"))
        return found

    end = time.monotonic() + 90
    while missing := TAGS - drawn():
        assert time.monotonic() < end, f"these charts are not drawn: {missing}"
    keep("timeseries")
    assert "pretrained/tensorboard" in browser.find_element("tag name", "body").text


def test_what_the_model_wrote_and_the_run_file(
    browser: Any, address: str, runs: tuple[Path, str], keep: Callable[[str], None]
) -> None:
    browser.get(f"{address}/#text")
    body = browser.find_element("tag name", "body")
    expect_soon(lambda: "step 40" in body.text, "the last sample is on the page")
    keep("text")
    assert f"the cat\ntext\n{runs[1].strip()}" in body.text.replace("text\n ", "text\n")
    assert '"name": "pretrained"' in body.text


def test_the_confusion_matrix_is_a_picture(
    browser: Any, address: str, keep: Callable[[str], None]
) -> None:
    browser.get(f"{address}/#images")
    body = browser.find_element("tag name", "body")
    expect_soon(lambda: "tag: valid/confusion" in body.text, "the picture has a place")
    expect_soon(
        lambda: any(colours(picture(browser), image) > 1000 for image in images(browser)),
        "the picture is drawn",
    )
    keep("images")
