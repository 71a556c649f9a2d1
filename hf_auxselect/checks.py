"""Checks of numbers that users give as options."""

from __future__ import annotations

import math


def is_count(value: object, least: int) -> bool:
    """Whether it is an int of at least ``least``.

    True, 2.0 and NumPy's integers are none: options are written to JSON and compared on resume.
    """
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object, *, finite: bool = True) -> bool:
    """Whether it is an int or a float, no bool and not NaN; finite unless ``finite=False``."""
    if not isinstance(value, int | float) or isinstance(value, bool) or math.isnan(value):
        return False
    return not finite or math.isfinite(value)


def require_count(name: str, value: object, least: int, *, optional: bool = False) -> None:
    """Raise ValueError unless an option is an int of at least ``least``, or an allowed None.

    Args:
        name: of the option, as the user typed it.
        value: what was given.
        least: smallest number allowed.
        optional: whether None is allowed.
    """
    if (optional and value is None) or is_count(value, least):
        return
    or_none = ", or None;" if optional else ","
    raise ValueError(f"{name} must be an int of at least {least}{or_none} got {value!r}.")
