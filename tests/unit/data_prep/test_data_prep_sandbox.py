# covers: data_prep/sandbox.py
"""Chat templates that run or grow without end, and harmless ones that resemble them."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from data_prep import sandbox
from data_prep.chat import Chat
from data_prep.records import Unusable
from megalite.errors import DataError
from megalite.tokenizers.tokenizer import ByteTokenizer

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLE = (
    "{{% set n = namespace(s='a') %}}"
    "{{% for i in range(60) %}}{{% set n.s = n.s {} n.s %}}{{% endfor %}}"
)


def render(template: str) -> str:
    return Chat(template, ByteTokenizer()).render(TURNS)[0]


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10**10 }}",
        "{{ 10**10 * 'a' }}",
        "{{ [0] * 10**10 }}",
        "{{ 2**10**10 }}",
        "{{ 'a'.center(10**10) }}",
        "{{ 'a'|center(10**10) }}",
        "{{ 'a'|indent(10**10) }}",
        "{{ '%9999999999d' % 3 }}",
        "{{ '%*d' % (10**10, 3) }}",
        "{{ '%9999999999d'|format(3) }}",
        "{{ '{:9999999999}'.format(3) }}",
        "{{ ('a' * 10**6)|replace('a', 'b' * 10**6) }}",
        "{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}",
        "{{ (['b'] * 2000)|join('a' * 10**6)|length }}",
        "{{ ('a' * 10**6).join(['b'] * 2000)|length }}",
        "{{ (['a' * 10**6] * 2000)|join|length }}",
        "{{ range(100000)|join('a' * 10**6)|length }}",
        "{{ (['b'] * 2000)|map('upper')|join('a' * 10**6)|length }}",
        DOUBLE.format("+"),
        DOUBLE.format("~"),
        "{% for i in range(99999) %}{{ 'a' * 10**6 }}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_template_that_grows_without_end_is_refused(template: str) -> None:
    with pytest.raises(Unusable, match="the chat template refuses it: "):
        render(template)


def test_template_that_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0.2)
    before, began = signal.getsignal(signal.SIGALRM), time.monotonic()
    with pytest.raises(
        DataError, match="the template has not ended after"
    ):  # not Unusable, which is for one row
        render(ENDLESS)
    assert time.monotonic() - began < 5
    assert signal.getsignal(signal.SIGALRM) == before


def test_template_is_rendered_in_another_thread() -> None:
    texts: list[str] = []
    thread = threading.Thread(target=lambda: texts.append(render("text")))
    thread.start()
    thread.join()
    assert texts == ["text"]


def test_template_that_is_nested_too_deeply_is_refused() -> None:
    with pytest.raises(DataError, match="no Jinja that can be read"):
        render("{{" + "(" * 3000 + ")" * 3000 + "}}")


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ 'ab' * 3 ~ 1 ~ none }}", "ababab1None"),
        ("{{ '%5.1f|%s' % (2, 'x') }}", "  2.0|x"),
        ("{{ 'a'|center(5) }}{{ 'a\nb'|indent(2) }}", "  a  a\n  b"),
        (
            "{{ '{:>4}'.format(3) }}{{ 'phone 12345678901'.replace('1', '') }}",
            "   3phone 234567890",
        ),
        ("{{ [1, 'b']|join(', ') }}{{ messages|join('', attribute='content') }}", "1, bhihello"),
        (
            "{{ ', '.join(['a', 'b']) }}{{ messages|map(attribute='role')|join }}",
            "a, buserassistant",
        ),
        ("{{ messages[0]['content'] + '</s>' }}{{ 7 % 2 }}{{ 2 ** 10 }}", "hi</s>11024"),
    ],
)
def test_ordinary_templates_are_rendered_as_jinja_does(template: str, text: str) -> None:
    assert render(template) == text


def test_half_a_surrogate_pair_in_a_role_is_a_bad_row() -> None:
    turns = [{"role": "us\ud83d", "content": "hi"}, TURNS[1]]
    with pytest.raises(Unusable, match="half a surrogate pair"):
        Chat("{% for m in messages %}{{ m.role }}{% endfor %}", ByteTokenizer()).encode(turns)
