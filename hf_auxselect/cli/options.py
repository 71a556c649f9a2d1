"""What users type for mixtures and for the options of estimators and selectors."""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

_WORDS = {"true": True, "false": False, "none": None, "null": None}


class UsageError(ValueError):
    """The command was called in a wrong way: exit code 2."""


def parse_tasks(
    parts: Sequence[str], known: Collection[str], option: str
) -> list[str] | dict[str, float]:
    """A subset (``a``, ``b``) or a mixture (``a=2``, ``b=1``). Names of tasks may contain ``=``.

    Args:
        parts: names, or names with weights.
        known: the run's tasks.
        option: how errors name the parts.
    """
    if all(part in known or "=" not in part for part in parts):
        names = list(parts)
        weights = None
    else:
        names, weights = [], []
        for part in parts:
            name, _, weight = part.rpartition("=")
            try:
                weights.append(float(weight))
            except ValueError:
                raise ValueError(
                    f"{option}: {part!r} is not name=weight; give names, or a weight to each."
                ) from None
            names.append(name)
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"{option} names the task {twice[0]!r} more than once.")
    return names if weights is None else dict(zip(names, weights, strict=True))


def split_options(texts: Sequence[str], flag: str) -> dict[str, str]:
    """Options ``k=v`` by name.

    Args:
        texts: as they were typed.
        flag: how errors name them.

    Raises:
        UsageError: one has no ``=``, or a name occurs twice.
    """
    options: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip()
        if not equals or not name:
            raise UsageError(f"{flag} {text!r}: give an option as name=value.")
        if name in options:
            raise UsageError(f"{flag} {text!r}: the option {name!r} was given before.")
        options[name] = value.strip()
    return options


def make_strategy(kind: type[T], options: Mapping[str, Any], flag: str) -> T:
    """An estimator or selector from options as users type them.

    Args:
        kind: its class, a dataclass whose fields are its options.
        options: name -> value. Texts are read by the type of the field: numbers, ``true``,
            ``false``, ``none``, names and numbers separated by commas (of a mapping: ``a=1,b=2``),
            or JSON, which begins with ``[`` or ``{``. Other values, as YAML has them, must have
            this type.
        flag: how errors name the options.

    Raises:
        UsageError: an option is unknown, missing, or has a wrong value; lists those there are.
    """
    hints = get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}  # type: ignore[arg-type]
    listed = "; ".join(f"{name}: {_described(hints[name])}" for name in fields)
    known = f"{kind.__name__} has {f'the options {listed}' if fields else 'no options'}."
    values = {}
    for name, value in options.items():
        if name not in fields:
            raise UsageError(f"{flag} {name}: unknown option. {known}")
        try:
            values[name] = _read(value, hints[name])
        except ValueError as error:
            raise UsageError(f"{flag} {name}={value}: {error}. {known}") from None
    for name, f in fields.items():
        if name not in values and f.default is f.default_factory is dataclasses.MISSING:
            raise UsageError(f"{flag} {name}=...: this option has no default; give it. {known}")
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        told = str(error).removeprefix(f"{flag.lstrip('-')}: ")  # the flag names it already
        raise UsageError(f"{flag}: {told}") from error


def _read(given: Any, kind: Any) -> Any:
    """A typed text or a value of YAML as a value of a type."""
    for member in _members(kind):
        value = _from_text(given.strip(), member) if isinstance(given, str) else given
        fitting, value = _fit(value, member)
        if fitting:
            return value
    raise ValueError(f"expected {_described(kind)}")


def _members(kind: Any) -> list[Any]:
    """The types of a union, those first that accept the fewest texts."""
    members = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    order = [types.NoneType, bool, int, float, Literal, Mapping, dict, tuple, list, str]
    return sorted(
        members,
        key=lambda m: order.index(o) if (o := get_origin(m) or m) in order else len(order),
    )


def _from_text(text: str, kind: Any) -> Any:
    """A text as a value that may be of a type; the text itself if it cannot."""
    origin = get_origin(kind) or kind
    if origin is str or origin is Literal:
        return text
    try:
        if text[:1] in ("[", "{"):
            return json.loads(text)
        if origin in (int, float):
            return origin(text)
        if origin in (tuple, list):
            return [_from_text(part.strip(), get_args(kind)[0]) for part in text.split(",")]
        if origin in (Mapping, dict):
            pairs = [part.rpartition("=") for part in text.split(",")]
            return {name.strip(): float(weight) for name, _, weight in pairs}
    except (ValueError, RecursionError):
        return text
    return _WORDS.get(text.lower(), text)


def _fit(value: Any, kind: Any) -> tuple[bool, Any]:
    """Whether a value is of a type, and the value as this type has it."""
    from hf_auxselect.estimators import ESTIMATORS, AbstractEstimator

    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if origin is Any:
        return True, value
    if origin is Literal:
        return value in arguments, value
    if origin in (int, float):
        is_number = isinstance(value, int | (float if origin is float else int))
        fits = is_number and not isinstance(value, bool) and math.isfinite(value)
        return fits, origin(value) if fits else value
    if origin in (tuple, list) and isinstance(value, list | tuple):
        items = [_fit(item, arguments[0]) for item in value]
        return all(fits for fits, _ in items), origin(item for _, item in items)
    if origin in (Mapping, dict) and isinstance(value, Mapping):
        fitted = {name: _fit(item, arguments[1]) for name, item in value.items()}
        fits = all(fits for fits, _ in fitted.values()) and all(isinstance(n, str) for n in fitted)
        return fits, {name: item for name, (_, item) in fitted.items()}
    if origin is AbstractEstimator:
        fits = isinstance(value, str) and value in ESTIMATORS
        return fits, ESTIMATORS[value]() if fits else value
    return isinstance(origin, type) and isinstance(value, origin), value


def _described(kind: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_described(argument) for argument in arguments)
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin in (tuple, list):
        return f"several {_described(arguments[0])} (a,b or JSON)"
    if origin in (Mapping, dict):
        return f"{_described(arguments[1])} by name (a=1,b=2 or JSON)"
    words = {types.NoneType: "none", bool: "true or false", int: "integer", float: "number"}
    words |= {str: "text"}
    return words.get(origin, getattr(origin, "__name__", str(origin)))
