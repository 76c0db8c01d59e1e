"""Plain arguments, checked where they are given: whole numbers, numbers, names and kinds."""

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from torch import Size


def check_whole(name: str, value: Any, least: int = 1, or_none: str = "") -> None:
    """Refuses all but whole numbers (truth values are none).

    Args:
        least: the smallest.
        or_none: what None stands for, where it is allowed.
    """
    if (or_none and value is None) or (_is(value, Integral) and value >= least):
        return
    wanted = {0: "0 or a positive integer", 1: "a positive integer"}
    kind = wanted.get(least, f"an integer of at least {least}") + _none(or_none)
    raise ValueError(f"{name} must be {kind}, but got {_shown(value)}")


def check_number(
    name: str, value: Any, low: float | int, high: float | int, ends: str = "[]", or_none: str = ""
) -> None:
    """Refuses all but numbers between two others.

    Args:
        ends: which of them count: "[]", "[)", "(]" or "()".
        or_none: what None stands for, where it is allowed.
    """
    if or_none and value is None:
        return
    above = _is(value, Real) and (value > low or (ends[0] == "[" and value == low))
    if not (above and (value < high or (ends[1] == "]" and value == high))):
        span = f"in {ends[0]}{low:g}, {high:g}{ends[1]}"
        if high == math.inf:
            span = f"of at least {low:g}" if ends[0] == "[" else f"above {low:g}"
        raise ValueError(f"{name} must be a number {span}{_none(or_none)}, but got {_shown(value)}")


def check_option(name: str, value: Any, options: Iterable[str]) -> None:
    """Refuses all but some names."""
    *most, last = map(repr, options)
    if not isinstance(value, str) or repr(value) not in (*most, last):
        names = f"{', '.join(most)} or {last}" if most else last
        raise ValueError(f"{name} must be {names}, but got {_shown(value)}")


def check_kind(name: str, value: Any, kind: Any, example: str, optional: bool = False) -> None:
    """Refuses what is no ``kind``, one class or a union (the class itself in its place, say)."""
    if not isinstance(value, kind) and not (optional and value is None):
        kinds = " or ".join(_a(each) for each in getattr(kind, "__args__", (kind,)))
        raise ValueError(f"{name} must be {kinds}, such as {example}, but got {_shown(value)}")


def check_callable(name: str, value: Any, example: str, optional: bool = False) -> None:
    """Refuses what cannot be called, and classes."""
    if (not callable(value) or isinstance(value, type)) and not (optional and value is None):
        raise ValueError(f"{name} must be a function, such as {example}, but got {_shown(value)}")


def check_names(name: str, value: Any) -> None:
    """Refuses one string in place of several."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        example = f"({value!r},)" if isinstance(value, str) else "('y',)"
        raise ValueError(f"{name} takes several names, as in {example}, but got {_shown(value)}")


def check_shape(name: str, value: Any) -> Size:
    """A shape, from a sequence of positive integers."""
    sizes = tuple(value) if isinstance(value, Iterable) else ()
    if not sizes or not all(_is(size, Integral) and size >= 1 for size in sizes):
        raise ValueError(
            f"{name} must be a sequence of positive integers, such as (4,) or (1, 28, 28), but got "
            f"{_shown(value)}"
        )
    return Size(sizes)


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _none(meaning: str) -> str:
    return f" (or None: {meaning})" if meaning else ""


def _a(kind: type) -> str:
    return f"an {kind.__name__}" if kind.__name__[0] in "AEIOU" else f"a {kind.__name__}"


def _shown(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__} itself: make one with {value.__name__}()"
    text = repr(value)
    return text if len(text) < 60 and "<" not in text else _a(type(value))
