# covers: megalite/evaluate/explain_page.py
"""The page of an explanation: its numbers, its colours, and its safety."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

from megalite.evaluate.explain_page import Explanation, explain_page


class Tags(HTMLParser):
    """Parser that collects all tags with their attributes, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def explanation(**changes: Any) -> Explanation:
    values: dict[str, Any] = {
        "text": "abc",
        "label": "b",
        "log_odds": 1.25,
        "probabilities": {"a": 0.2, "b": 0.8},
        "facts": {"Run": "reviews", "Checkpoint": "runs/reviews/checkpoints/step_00000009"},
        "pieces": ["a", "b", "c"],
        "gradient": [0.5, -0.25, 0.0],
        "occlusion": [2.0, -0.5, 0.01],
        "attention": [4.0, 1.0, 0.25],
        "special_attention": 0.4,
    }
    return Explanation(**values | changes)


def test_page_escapes_its_content_and_loads_nothing() -> None:
    evil = '<script>alert("1")</script>{0} &amp; https://a.example/x.png'
    page = Tags(
        explain_page(
            explanation(
                text=evil,
                label=evil,
                pieces=["<script>", 'a"b', " c\n"],
                probabilities={evil: 0.75, "b": 0.25},
                facts={"Run": evil},
            )
        )
    )
    names = [tag for tag, _ in page.tags]
    assert not {"script", "link", "img", "iframe", "a", "base"} & set(names)
    keys = [key for _, attributes in page.tags for key in attributes]
    assert not {"src", "href", "onload", "onclick"} & set(keys)
    assert "light dark" in explain_page(explanation())
    assert "url(" not in explain_page(explanation())
    assert page.text.count(evil) >= 5
    widths = [a["style"] for _, a in page.tags if a.get("class") == "bar"]
    assert widths == ["width: 75.0%", "width: 25.0%"]


def test_page_names_run_checkpoint_and_prediction() -> None:
    text = Tags(explain_page(explanation())).text
    assert "b 80.0% – reviews" in text
    assert "Checkpointruns/reviews/checkpoints/step_00000009" in text
    assert "Predictionb, 80.0%" in text
    assert "40% of the attention is on special tokens" in text
    assert "= +1.25" in text


def colours(page: str) -> list[dict[str, str | None]]:
    return [attributes for tag, attributes in Tags(page).tags if "title" in attributes]


def test_colours_are_proportional_to_the_values() -> None:
    spans = colours(explain_page(explanation()))
    assert [span["title"] for span in spans[:3]] == ["+2.000", "-0.500", "+0.010"]
    assert spans[0]["style"] == "background: rgba(40, 110, 255, 0.600)"
    assert spans[1]["style"] == "background: rgba(255, 60, 50, 0.150)"  # a quarter of the largest
    assert spans[3]["style"] == "background: rgba(40, 110, 255, 0.300)"  # half of the minimum, 1
    assert [span["title"] for span in spans[6:]] == ["4.00 x", "1.00 x", "0.25 x"]
    assert [span["style"] for span in spans[6:]] == [
        "background: rgba(240, 160, 0, 0.600)",
        "background: rgba(120, 120, 120, 0.000)",
        "background: rgba(120, 120, 120, 0.600)",
    ]
    legends = Tags(explain_page(explanation())).text
    assert all(number in legends for number in ("-2.00", "-1.00", "+1.00", "+2.00", "4 x"))


def test_flat_values_have_no_colour_and_a_remark() -> None:
    """Noise of 0.01 must not look like a result."""
    flat = {"gradient": [0.001, -0.002, 0.0], "occlusion": [0.004, -0.009, 0.0]}
    page = explain_page(explanation(**flat, attention=[1.02, 0.98, 1.0]))
    for span in colours(page):
        assert float(str(span["style"]).rpartition(",")[2].strip(" )")) < 0.02
    text = Tags(page).text
    assert "No token moves the score by more than 0.009" in text
    assert "No token moves the score by more than 0.002" in text
    assert "The attention is nearly even, 0.98 to 1.02 x" in text
    assert "No token moves" not in Tags(explain_page(explanation())).text
    assert "nearly even" not in Tags(explain_page(explanation())).text


def test_strongest_tokens_are_those_with_the_largest_occlusion() -> None:
    many = [0.1 * n for n in range(12)]
    page = explain_page(
        explanation(
            pieces=[f" t{n}" for n in range(12)],
            gradient=many[::-1],
            occlusion=many,
            attention=[1.0] * 12,
        )
    )
    table = Tags(page).text.rpartition("Attention")[2]
    assert next(word for word in table.split() if word.startswith("t"))[:3] == "t11"
    assert "t1" not in table.split()
    without = explain_page(explanation(pieces=["x"], gradient=[1.0], occlusion=None, attention=[1]))
    assert "only one token, so there is no text without it" in without


def test_page_has_no_control_characters() -> None:
    """Examples are terminal escapes, NUL, and marks that change the direction of a line."""
    hostile = "a\x1b[31mred\x00\x7f\x9b\u202etxt\u2066\ud800"
    page = explain_page(
        explanation(text=hostile, pieces=[hostile, "b", "c"], facts={"Run": hostile})
    )
    assert not {"\x1b", "\x00", "\x7f", "\x9b", "\u202e", "\u2066", "\ud800"} & set(page)
    assert "␛[31mred␀␡" in page
    assert page.encode()
