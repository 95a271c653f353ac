"""TensorBoard in a browser shows the charts, texts and images of a run."""

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
    """Train a pretraining run with samples and a fine-tuning run.

    Returns:
        the folder of the runs, and the last sample of the pretraining run.
    """
    folder = tmp_path_factory.mktemp("tensorboard")
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
    """Start TensorBoard on both runs. Yield its address."""
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(runs[0])]
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)], stderr=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{port}"
    try:
        expect_soon(
            lambda: len(json.loads(read(f"{address}/data/runs"))) == 4, "TensorBoard lists the runs"
        )
        yield address
    finally:
        server.kill()
        server.wait()


def read(address: str) -> bytes:
    """Return the content at an address, or an empty JSON list if the server does not answer."""
    try:
        with urllib.request.urlopen(address, timeout=10) as reply:
            return bytes(reply.read())
    except OSError:
        return b"[]"


def expect_soon(condition: Callable[[], bool], expected: str, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {expected}"
        time.sleep(0.2)


def screenshot(browser: Any) -> np.ndarray:
    """Return the visible part of the page: uint8 [height, width, 3]."""
    return np.asarray(Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB"))


def count_coloured(pixels: np.ndarray, element: Any) -> int:
    """Count the pixels of an element that are not black, white or grey."""
    x, y, width, height = (round(element.rect[key]) for key in ("x", "y", "width", "height"))
    part = pixels[y : y + height, x : x + width].astype(int)
    return int((np.ptp(part, axis=-1) > 25).sum()) if part.size else 0


def images(browser: Any) -> list[Any]:
    """Return the loaded images of a page, including those in shadow DOM trees."""
    elements: list[Any] = browser.execute_script(
        "const all = (root) => [...root.querySelectorAll('*')].flatMap("
        "  (node) => [node, ...(node.shadowRoot ? all(node.shadowRoot) : [])]);"
        "return all(document).filter((node) => node.nodeName === 'IMG' && node.naturalWidth);"
    )
    return elements


def test_charts_of_both_runs_are_drawn(
    browser: Any, address: str, save_screenshot: Callable[[str], None]
) -> None:
    browser.get(f"{address}/#timeseries")

    def drawn() -> set[str]:
        pixels = screenshot(browser)
        tags = set()
        for card in browser.find_elements("css selector", "scalar-card"):
            name = card.find_element("css selector", "tb-truncated-path")
            charts = card.find_elements("css selector", "line-chart .series-view")
            if charts and count_coloured(pixels, charts[0]) > 20:  # an empty chart is grey
                tags.add(name.get_attribute("title"))
        return tags

    end = time.monotonic() + 90
    while missing := TAGS - drawn():
        assert time.monotonic() < end, f"these charts are not drawn: {missing}"
    save_screenshot("timeseries")
    assert "pretrained/tensorboard" in browser.find_element("tag name", "body").text


def test_samples_and_run_file_are_shown_as_text(
    browser: Any, address: str, runs: tuple[Path, str], save_screenshot: Callable[[str], None]
) -> None:
    browser.get(f"{address}/#text")
    body = browser.find_element("tag name", "body")
    expect_soon(lambda: "step 40" in body.text, "the page has the last sample")
    save_screenshot("text")
    assert f"the cat\ntext\n{runs[1].strip()}" in body.text.replace("text\n ", "text\n")
    assert '"name": "pretrained"' in body.text


def test_confusion_matrix_is_an_image(
    browser: Any, address: str, save_screenshot: Callable[[str], None]
) -> None:
    browser.get(f"{address}/#images")
    body = browser.find_element("tag name", "body")
    expect_soon(lambda: "tag: valid/confusion" in body.text, "the page has the tag of the image")
    expect_soon(
        lambda: any(count_coloured(screenshot(browser), image) > 1000 for image in images(browser)),
        "the image is drawn",
    )
    save_screenshot("images")
