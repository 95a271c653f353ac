"""Sandbox for chat templates, which come with models, and could run or grow without end."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 10.0  # limit for one conversation; normal templates take milliseconds
_LONGEST = 1 << 26  # characters of a rendering, or elements of a value
_LARGEST = 10**6  # a number passed to a function, such as a width
_PRODUCT = 1 << 30  # characters of a text times characters of a replacement
_WIDE = ("batch", "center", "format", "indent", "replace", "slice", "truncate", "wordwrap")


class TooSlow(TemplateError):
    """Error for a rendering that takes longer than `SECONDS`."""


class _Code(CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """Compile `~` to a call of the sandbox, which checks the result's size."""
        self.write("environment.join_values((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which also refuses values that are too large for any conversation."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))
    code_generator_class = _Code

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters |= {name: _limited(name, self.filters[name]) for name in _WIDE}
        self.filters["join"] = _limited_join(self.filters["join"])

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(v) for v in (left, right) if isinstance(v, str | list | tuple)]
        factors = [abs(v) for v in (left, right) if isinstance(v, int)]
        large = operator == "**" and any(factor > 1000 for factor in factors)
        large |= operator == "+" and sum(sizes) > _LONGEST
        large |= operator == "%" and isinstance(left, str) and _is_wide("%", left, right)
        large |= operator == "*" and any(s * f > _LONGEST for s in sizes for f in factors)
        if large:
            raise TemplateError(f"the template makes a value too large with {operator!r}")
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__obj, "__self__", None)
        name = getattr(__obj, "__name__", "")
        if name == "join" and isinstance(owner, str) and args:
            args = (_joinable(args[0], owner), *args[1:])
        _check(name, owner if isinstance(owner, str) else "", args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Any:
        """Return Jinja's replacement of `text.format`, with a check of its widths."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def limited(*args: Any, **kwargs: Any) -> Any:
            _check("format", value.__self__, args, kwargs)
            return wrapped(*args, **kwargs)

        return limited

    def join_values(self, values: tuple[Any, ...]) -> str:
        """Return the concatenated texts of `values`, as `~` does."""
        texts = [str(value) for value in values]
        if sum(map(len, texts)) > _LONGEST:
            raise TemplateError("the template makes a value too large with '~'")
        return "".join(texts)


def _limited_join(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return Jinja's filter `join` with a limit on the result's size."""

    @wraps(function)
    def limited(context: Any, value: Any, d: str = "", attribute: Any = None) -> Any:
        return function(context, _joinable(value, str(d)), d, attribute)

    return limited


def _joinable(parts: Any, between: str) -> list[Any]:
    """Return the parts of a join as a list. Raise TemplateError if the result is too large."""
    items = list(parts)
    length = sum(len(part) for part in items if isinstance(part, str))
    if length + len(between) * len(items) > _LONGEST:
        raise TemplateError("the template makes a value too large with 'join'")
    return items


def _limited(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that calls `_check` first."""

    @wraps(function)  # also copies Jinja's marks on the function
    def limited(*args: Any, **kwargs: Any) -> Any:
        text = next((value for value in args if isinstance(value, str)), "")
        _check(name, text, args, kwargs)
        return function(*args, **kwargs)

    return limited


def _check(name: str, text: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise TemplateError if a call would make a value too large."""
    values = (*args, *kwargs.values())
    large = any(isinstance(value, int) and abs(value) > _LARGEST for value in values)
    large |= name in ("format", "format_map") and _is_wide("%{", text, values)
    longest = max((len(value) for value in values[1:] if isinstance(value, str)), default=0)
    large |= name == "replace" and len(text) * longest > _PRODUCT
    if large:
        raise TemplateError(f"the template makes a value too large with {name or 'a call'}")


def _is_wide(signs: str, form: str, values: Any) -> bool:
    """Return whether a format has a width of a million or more, in its text or in a value."""
    wide = any(len(number) > 6 for number in re.findall(r"\d+", form))
    values = values if isinstance(values, tuple) else (values,)
    named = "*" in form and any(isinstance(v, int) and abs(v) > _LARGEST for v in values)
    return (wide and any(sign in form for sign in signs)) or named


@contextmanager
def in_time() -> Iterator[None]:
    """Raise TemplateError if the block takes longer than `SECONDS`.

    Only the main thread can be interrupted. Other threads have no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_: object) -> None:
        raise TooSlow(f"the template has not ended after {SECONDS:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    remaining, _ = signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, remaining)
        signal.signal(signal.SIGALRM, before)


def collect(blocks: Iterable[str], into: list[str]) -> None:
    """Append the blocks of a rendering to a list. Raise TemplateError if it is too long."""
    length = 0
    for block in blocks:
        into.append(block)
        length += len(block)
        if length > _LONGEST:
            raise TemplateError(f"the template writes over {_LONGEST} characters")
